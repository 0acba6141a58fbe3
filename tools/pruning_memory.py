"""Does ``spense prune`` take the memory and time that ``--dry-run`` says?

    python -m tools.pruning_memory [--layers 8 --hidden 2048 --intermediate 8192]

makes a random model, plans, prunes it in a process of its own and compares the process's highest resident
set with the plan; once with the activations in host memory, once on disk. Writes results/pruning_memory.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import results

RESULT = results.ROOT / "benchmarks" / "results" / "pruning_memory.json"
VOCAB = 4096


def make_model(directory: Path, layers: int, hidden: int, intermediate: int) -> None:
    """A random Llama in bf16 with a tokenizer of the words w0 … w4095."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        vocab_size=VOCAB,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(directory)
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)


def prune_and_report(model: Path, out: Path, options: dict[str, Any]) -> None:
    """Prune, then print the process's peak and its parts. The peak is that of this program alone
    (VmHWM starts at exec), where getrusage would count the parent's memory at the fork."""
    from vllm_spense.pruning import PruneConfig, prune
    from vllm_spense.pruning.plan import plan

    config = PruneConfig(**options)
    planned = plan(model, config)
    report = prune(model, out, config)
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    peak = int(kilobytes) * 1024
    measured_bytes = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    print(
        json.dumps(
            {
                "planned_host_bytes": planned.host_bytes,
                "planned_activation_bytes": planned.activation_bytes,
                "measured_peak_bytes": peak,
                "planned_output_bytes": planned.output_bytes,
                "measured_output_bytes": measured_bytes,
                "planned_seconds": round(planned.seconds, 1),
                "measured_seconds": round(report.seconds, 1),
            }
        )
    )


def run(step: str, *arguments: object) -> str:
    command = [*results.program("tools.pruning_memory"), "--step", step]
    command += ["--arguments", json.dumps([*map(str, arguments)])]
    return subprocess.run(command, check=True, cwd=results.ROOT, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--cache", nargs="*", default=["host", "disk"])
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--arguments", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step == "make":
        directory, *sizes = options.arguments
        return make_model(Path(directory), *map(int, sizes))
    if options.step == "prune":
        model, out, text = options.arguments
        return prune_and_report(Path(model), Path(out), json.loads(text))
    with tempfile.TemporaryDirectory(prefix="spense-memory-") as folder:
        root = Path(folder)
        run("make", root / "model", options.layers, options.hidden, options.intermediate)
        words = random.Random(0).choices([f"w{i}" for i in range(VOCAB)], k=50_000)
        (root / "text.txt").write_text(" ".join(words))
        rows = {}
        for cache in options.cache:
            config = {
                "calibration": str(root / "text.txt"),
                "num_samples": options.samples,
                "seq_len": options.seq_len,
                "cache_activations": cache,
            }
            said = run("prune", root / "model", root / cache, json.dumps(config))
            rows[cache] = json.loads(said.splitlines()[-1])
            print(cache, json.dumps(rows[cache], indent=1))
        sizes = {k: getattr(options, k) for k in ("layers", "hidden", "intermediate", "samples", "seq_len")}
        results.write(RESULT, {"sizes": sizes, "runs": rows, "provenance": results.provenance()})


if __name__ == "__main__":
    main()
