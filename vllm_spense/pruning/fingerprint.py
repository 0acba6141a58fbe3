"""Everything that decides the bytes of a pruned checkpoint, to tell whether a run can be continued."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vllm_spense.format import Checkpoint
from vllm_spense.format.checkpoint import CONFIG_NAME
from vllm_spense.format.manifest import sha256
from vllm_spense.pruning.config import PruneConfig
from vllm_spense.sources import BaseModel
from vllm_spense.text import TextRecord

_HEADER_LIMIT = 100_000_000
"""safetensors refuses longer headers."""


def fingerprint(
    base: BaseModel,
    source: Checkpoint,
    config: PruneConfig,
    text: TextRecord | None,
    windows: torch.Tensor | None,
    device: torch.device,
) -> dict[str, Any]:
    """Nested dictionaries of plain values. Weight files count by size, time and header, not by content."""
    calibration: dict[str, Any] | None = None
    if text is not None and windows is not None:
        tokens = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        calibration = text.dump() | {"tokens": tokens}
    files = {info.file for info in source.tensors.values()}
    return {
        "options": config.decisive(),
        "model": base.name,
        "revision": base.revision,
        "source": {CONFIG_NAME: sha256(source.directory / CONFIG_NAME)}
        | {file.name: _weight_file(file) for file in sorted(files)},
        "calibration": calibration,
        "versions": versions("vllm-spense", "torch", "transformers", "safetensors"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def versions(*packages: str) -> dict[str, str]:
    """Installed versions by package name."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _weight_file(path: Path) -> dict[str, Any]:
    stat = path.stat()
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(min(length, _HEADER_LIMIT))
    return {"bytes": stat.st_size, "mtime": stat.st_mtime_ns, "header": hashlib.sha256(header).hexdigest()}
