"""The checkpoints that are damaged: small, but written by the project's own writer and pruner."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from tests.tiny import make_llama, make_spense
from tests.tiny_text import add_tokenizer, write_text
from vllm_spense.format import CheckpointWriter

NAMES = ("fp8", "sharded", "bf16", "pruned")


def build(out: Path) -> dict[str, Path]:
    """The checkpoints by name.

    ``fp8`` and ``bf16`` lie in one weight file; ``sharded`` is the first in three files with an index;
    ``pruned`` comes from ``spense prune``: no biases, 2:4 in attention, too, provenance, tokenizer, card.
    """
    dense = make_llama(out / "dense", layers=1)
    bases = {name: out / name for name in NAMES}
    make_spense(dense, bases["fp8"])
    make_spense(dense, bases["bf16"], codec="bf16")
    tensors = load_file(bases["fp8"] / "model.safetensors")
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with CheckpointWriter(bases["sharded"], max_shard_bytes=int(size * 0.41)) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.write_config(json.loads((bases["fp8"] / "config.json").read_text()))
    _prune(add_tokenizer(make_llama(out / "plain", layers=1, bias=False)), bases["pruned"], out)
    return bases


def _prune(dense: Path, out: Path, work: Path) -> None:
    from vllm_spense import PruneConfig, prune

    config = PruneConfig(
        preset="spensegpt",
        targets="mlp+attention",
        weight_dtype="fp8",
        num_samples=2,
        seq_len=32,
        calibration=str(write_text(work / "text.txt")),
    )
    prune(dense, out, config)
