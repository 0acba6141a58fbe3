"""A vLLM engine in a process of its own, which times or profiles batches of random prompts when told to.

usage: python -m benchmarks.serving.engine DIR [--length 4608] [--load-format auto]

DIR may have config.json alone: weights are random but with ``--load-format auto``.

Reads one JSON object a line from standard input, ``{"batch": n, "input": tokens, "output": tokens}``, and
answers with a line ``RESULT {…}``; the first such line says that the engine is ready. ``"profile": true``
runs the same under torch.profiler in the worker. :class:`Engine` is the other side. Two engines may stay on
one GPU: only one is asked at a time, so A and B can be taken in turn. The KV cache has a given size, for vLLM
would take memory that the other engine grows by for its own; start the second when the first is ready.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import random
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.results import ROOT, program
from benchmarks.common.supervise import end_group

MARK = "RESULT "
LONGEST = 3600.0
"""Seconds that any answer may take."""
SHARE = 0.1
"""Share of the GPU's memory, free at the start: vLLM checks it even where its cache's size is given."""
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # workers take the functions below
    "TEARDOWN_CUPTI": "0",  # a second profile with CUDA graphs would crash under CUDA before 12.6
    "DISABLE_CUPTI_LAZY_REINIT": "1",
}
Kernels = dict[str, list[float]]
"""By name: how often it ran, and microseconds in all."""


class ProfileError(RuntimeError):
    """There is no profile, and the engine goes on."""


class NoAnswer(RuntimeError):
    """The engine runs, but its answer did not come in time."""


@dataclass(frozen=True)
class Point:
    """``batch`` prompts of ``input`` tokens, ``output`` tokens each (1: prefill alone)."""

    batch: int
    input: int
    output: int

    @property
    def key(self) -> str:
        return f"{self.batch}x{self.input}+{self.output}"

    @classmethod
    def of(cls, key: str) -> Point:
        """From its key; ``ValueError`` if it is none."""
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)\+([1-9]\d*)", key)
        if found is None:
            raise ValueError(f"a point is BATCHxINPUT+OUTPUT, like 32x128+128, not {key}")
        return cls(*map(int, found.groups()))

    def tokens(self) -> int:
        """Decoded tokens, or those of the prompts in a point of prefill."""
        return self.batch * (self.output - 1 or self.input)


class Engine:
    """Starts at once; :meth:`wait` returns when it is ready, :meth:`time` and :meth:`profile` measure."""

    PROGRAM = program("benchmarks.serving.engine")

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.stream = log.open("w")
        self.process = subprocess.Popen(
            [*self.PROGRAM, str(model.absolute()), *options],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=ENVIRONMENT | os.environ,
            start_new_session=True,
        )
        self.answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                self.answers.put(json.loads(line.removeprefix(MARK)))
            else:
                self.stream.write(line)
                self.stream.flush()
        self.answers.put(None)

    def wait(self, timeout: float) -> dict[str, Any]:
        """The next answer; :class:`NoAnswer` if ``timeout`` seconds bring none, ``RuntimeError`` if the
        engine has ended. Both show the end of the log.
        """
        seconds = min(max(timeout, 0.1), LONGEST)
        try:
            answer = self.answers.get(timeout=seconds)
        except queue.Empty:
            raise NoAnswer(f"no answer from the engine in {seconds:.0f} s; {self._tail()}") from None
        if answer is None:
            raise RuntimeError(f"the engine has ended; {self._tail()}")
        return answer

    def _tail(self) -> str:
        lines = self.log.read_text().splitlines()[-15:]
        return "\n".join([f"end of {self.log}:", *lines])

    def time(self, batch: int, input: int, output: int, timeout: float) -> float:
        """Seconds from ``batch`` prompts of ``input`` tokens to ``output`` tokens each."""
        return self._ask({"batch": batch, "input": input, "output": output}, timeout)["seconds"]

    def profile(self, batch: int, input: int, output: int, timeout: float) -> Kernels:
        """What the device runs in the same; :class:`ProfileError` if that cannot be recorded."""
        asked = {"batch": batch, "input": input, "output": output, "profile": True}
        answer = self._ask(asked, timeout)
        if not answer.get("kernels"):
            raise ProfileError(answer.get("error", "the profiler saw no kernels"))
        return answer["kernels"]

    def _ask(self, asked: dict[str, Any], timeout: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the log says why
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
        return self.wait(timeout)

    def stop(self) -> None:
        """Ends the process with its workers."""
        end_group(self.process, wait=0)
        self.stream.close()


def memory(worker: Any) -> dict[str, int]:
    """Bytes of the model's parameters and buffers on one worker, and of all that torch holds on its GPU."""
    import torch

    model = worker.model_runner.get_model()
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    on_gpu = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    return {"weights": sum(held.values()), "allocated": on_gpu}


def start_profiler(worker: Any) -> None:
    """Record the kernels of this worker from here on; on CPUs its operators."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    worker.kernel_profiler = profile(activities=[activity])
    worker.kernel_profiler.start()


def stop_profiler(worker: Any) -> dict[str, list[float]]:
    """What ran since, by name: calls and microseconds on the device (operators: of their own)."""
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    worker.kernel_profiler.stop()
    kernels = {}
    for event in worker.kernel_profiler.key_averages():
        on_cpu = event.device_type == torch.autograd.DeviceType.CPU
        if on_cpu != on_gpu and not event.is_user_annotation:
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            kernels[event.key] = [event.count, microseconds]
    del worker.kernel_profiler
    return kernels


def has_flash_attention() -> bool:
    """Whether vLLM's FlashAttention is there: without it vLLM would choose it on Hopper, and fail."""
    import vllm

    return any(Path(vllm.__file__).parent.glob("vllm_flash_attn/*.so"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=4608, help="longest prompt and answer together")
    parser.add_argument("--cache", type=int, default=256, help="MiB of the KV cache")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=8192, help="most tokens of one step")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--load-format", choices=("dummy", "auto"), default="dummy")
    parser.add_argument("--quantization", help="as `vllm serve` takes it")
    parser.add_argument("--capture-sizes", type=int, nargs="+", help="of CUDA graphs (default: vLLM's 50)")
    parser.add_argument(
        "--no-onednn",
        action="store_true",
        help="for rehearsals: with AMX, oneDNN's FP8 products are a scalar reference",
    )
    arguments = parser.parse_args()
    import torch
    from vllm import LLM, SamplingParams

    began = time.perf_counter()
    more: dict[str, Any] = {}
    if torch.cuda.is_available():
        more["gpu_memory_utilization"] = SHARE
        if not has_flash_attention():
            more["attention_backend"] = "TRITON_ATTN"
    if arguments.capture_sizes:
        more["compilation_config"] = {"cudagraph_capture_sizes": arguments.capture_sizes}
    if arguments.no_onednn:
        torch.backends.mkldnn.set_flags(False)
    llm = LLM(
        arguments.model,
        load_format=arguments.load_format,
        quantization=arguments.quantization,
        skip_tokenizer_init=True,
        max_model_len=arguments.length,
        max_num_seqs=arguments.sequences,
        max_num_batched_tokens=arguments.chunk,
        kv_cache_memory_bytes=arguments.cache << 20,
        enable_prefix_caching=False,
        enforce_eager=arguments.eager,
        seed=0,
        **more,
    )
    say({"start_seconds": time.perf_counter() - began, "memory": llm.collective_rpc(memory)})
    vocab = llm.llm_engine.model_config.get_vocab_size()
    rng = random.Random(0)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [
            {"prompt_token_ids": [rng.randrange(3, vocab) for _ in range(asked["input"])]}
            for _ in range(asked["batch"])
        ]
        params = SamplingParams(temperature=0, max_tokens=asked["output"], ignore_eos=True, detokenize=False)
        if asked.get("profile"):
            say(profiled(llm, prompts, params))
        else:
            began = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            say({"seconds": time.perf_counter() - began})


def profiled(llm: Any, prompts: list[Any], params: Any) -> dict[str, Any]:
    """The first worker's kernels, or why there are none: an engine that cannot profile can still be timed."""
    try:
        llm.collective_rpc(start_profiler)
        llm.generate(prompts, params, use_tqdm=False)
        return {"kernels": llm.collective_rpc(stop_profiler)[0]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def say(answer: dict[str, Any]) -> None:
    print(f"\n{MARK}{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main()
