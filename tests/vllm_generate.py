"""Run real vLLM engines one after another in one process: greedy tokens and logprobs for token ids, as JSON.

usage: python vllm_generate.py REQUESTS.json RESPONSES
REQUESTS: {name: {"model": DIR, "llm": {LLM keyword arguments}, "prompts": [[ids]], "max_tokens": n,
"lora": DIR?, "calls": [[method, {keyword arguments}]]?, "save": DIR?, "pool": task?, "onednn": bool?,
"imports": [modules]?}}.
``calls`` go to every worker before prompts are answered; ``save``: where to leave a sharded state; ``pool``:
ask for what this pooling task gives instead of tokens; ``onednn`` false: torch's own products; ``imports``:
modules of these tests that register something. A prompt may be {"text": words, "image": seed}, with a random
image. The answer to each request is RESPONSES/name.json,
what it printed RESPONSES/name.log; an engine that fails leaves only a log.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any


def main() -> None:
    from vllm.model_executor.models import registry

    # Each model class would be looked at in a process of its own, for the sake of CUDA: ten seconds each.
    registry._run_in_subprocess = lambda look: look()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    requests, responses = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name, request in requests.items():
        for module in request.get("imports", []):
            importlib.import_module(module)
        with (responses / f"{name}.log").open("w") as log:  # of this process and of the workers it starts
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            with without_onednn() if request.get("onednn") is False else nullcontext():
                answer = run(request)
        except BaseException:  # vLLM ends some failed starts by SystemExit
            traceback.print_exc()
        else:
            (responses / f"{name}.json").write_text(json.dumps(answer))
        clean_up()
        sys.stdout.flush()


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Tokens and logprobs per prompt, prompt tokens found in the cache, and the engine's counters."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.metrics.reader import Counter

    options = {"max_model_len": 256, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20, "seed": 0}
    options |= {"skip_tokenizer_init": True} | request["llm"]
    llm = LLM(request["model"], **options)
    try:
        for method, arguments in request.get("calls", []):
            llm.collective_rpc(method, kwargs=arguments)
        if request.get("save"):
            llm.llm_engine.engine_core.save_sharded_state(request["save"])
        prompts = [_prompt(asked) for asked in request["prompts"]]
        if request.get("pool"):
            pooled = llm.encode(prompts, pooling_task=request["pool"], use_tqdm=False)
            return {"outputs": [o.outputs.data.tolist() for o in pooled]}
        params = SamplingParams(
            temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, logprobs=1, detokenize=False
        )
        lora = LoRARequest("test", 1, request["lora"]) if request.get("lora") else None
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=lora)
        counted = llm.get_metrics() if request["llm"].get("disable_log_stats") is False else []
        metrics = {metric.name: metric.value for metric in counted if isinstance(metric, Counter)}
    finally:
        llm.llm_engine.engine_core.shutdown()
    answers = [
        {
            "tokens": list(o.outputs[0].token_ids),
            "logprobs": [
                step[token].logprob
                for step, token in zip(o.outputs[0].logprobs, o.outputs[0].token_ids, strict=True)
            ],
        }
        for o in outputs
    ]
    answered = [list(o.prompt_token_ids) for o in outputs]
    return {
        "outputs": answers,
        "prompts": answered,
        "cached": [o.num_cached_tokens for o in outputs],
        "metrics": metrics,
    }


def _prompt(asked: list[int] | dict[str, Any]) -> dict[str, Any]:
    if isinstance(asked, list):
        return {"prompt_token_ids": asked}
    from PIL import Image

    pixels = random.Random(asked["image"]).randbytes(56 * 56 * 3)
    image = Image.frombytes("RGB", (56, 56), pixels)
    return {"prompt": asked["text"], "multi_modal_data": {"image": image}}


def without_onednn() -> AbstractContextManager[None]:
    """While open, torch does its own products.

    On CPUs with AMX it leaves those of FP8 to oneDNN, which has but a scalar reference for most of them:
    fifty times as slow, and the same to fp32's rounding.
    """
    import torch

    return torch.backends.mkldnn.flags(enabled=False)


def clean_up() -> None:
    """Forget the last engine's weights and process groups."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
