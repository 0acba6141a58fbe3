"""What is checked of a checkpoint's directory before vLLM loads a tensor from it."""

from __future__ import annotations

from pathlib import Path

from vllm_spense.format.checkpoint import Checkpoint
from vllm_spense.format.errors import CheckpointError
from vllm_spense.format.manifest import MANIFEST_NAME, check_manifest, is_loaded_file
from vllm_spense.format.validate import check_headers

_verified: set[tuple[str, int]] = set()
"""Directories (with the manifest's mtime) already checked in this process: vLLM builds configs often."""


def check_directory(directory: Path) -> None:
    """Check a Spense checkpoint's files: kinds, manifest, headers, hashes; once per process and manifest.

    A directory without weights passes: ``--load-format dummy`` needs none. Raises :class:`CheckpointError`.
    """
    if not any(directory.glob("*.safetensors")):
        refuse_pickles(directory)
        return
    _refuse_sharded_state(directory)
    manifest = directory / MANIFEST_NAME
    if not manifest.is_file():
        raise CheckpointError(
            "the manifest is missing, so damaged or missing tensors could not be noticed",
            file=manifest,
            fix=f"`spense verify --update-manifest {directory}` checks all else and writes one",
        )
    key = (str(directory.resolve()), manifest.stat().st_mtime_ns)
    if key in _verified:
        return
    check_headers(Checkpoint(directory))
    check_manifest(directory, only=is_loaded_file)
    _verified.add(key)


def refuse_pickles(directory: Path) -> None:
    """:class:`CheckpointError` for a directory with pickled weights."""
    pickled = [p for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
    if pickled:
        raise CheckpointError(
            "pickled weights are never loaded", file=sorted(pickled)[0], fix="use safetensors files"
        )


def _refuse_sharded_state(directory: Path) -> None:
    sharded = sorted(directory.glob("model-rank-*.safetensors"))
    if sharded:
        raise CheckpointError(
            "--load-format sharded_state is not supported: such files hold weights the way one back end "
            "arranged them",
            file=sharded[0],
            fix="serve the Spense checkpoint that they were saved from",
        )
