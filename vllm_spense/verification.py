"""``spense verify``: is this directory what it says it is, and does it fit its model?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_spense.format import manifest
from vllm_spense.format.bitsandbytes import open_checkpoint
from vllm_spense.format.checkpoint import Checkpoint
from vllm_spense.format.errors import REPRUNE, CheckpointError
from vllm_spense.format.twell_checkpoint import TwellCheckpoint
from vllm_spense.format.twell_config import RESPARSIFY
from vllm_spense.format.validate import check_checkpoint
from vllm_spense.models.fused import model_parameter
from vllm_spense.network import auto_class, spense_names
from vllm_spense.sources import load_config


@dataclass(frozen=True)
class VerifyReport:
    """What was checked; reaching it means that everything was right.

    ``hashes_checked``: not those of bitsandbytes' directories, which have no manifest.
    """

    directory: Path
    modules: int
    tensors: int
    hashed_bytes: int
    architecture_checked: bool
    hashes_checked: bool = True


def verify(
    directory: str | Path,
    *,
    update_manifest: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> VerifyReport:
    """Check hashes, schema, headers, all values and the fit to the model that config.json describes.

    ``update_manifest`` rewrites the manifest once everything else has passed, after an edit on purpose; new
    files come into it if they are loaded. Raises :class:`CheckpointError` at the first mistake.
    """
    checkpoint = open_checkpoint(directory)
    if isinstance(checkpoint, TwellCheckpoint):
        return _verify_thresholds(checkpoint, update_manifest, progress)
    config = checkpoint.require_spense()
    if update_manifest and checkpoint.foreign:
        raise CheckpointError(
            "only Spense checkpoints have a manifest", file=checkpoint.directory, fix="leave it out"
        )
    hashed = 0
    if not (update_manifest or checkpoint.foreign):
        hashed = manifest.check_manifest(checkpoint.directory, progress=progress)
    check_checkpoint(checkpoint, progress)
    fits = check_architecture(checkpoint)
    if update_manifest:
        manifest.update_manifest(checkpoint.directory)
    return VerifyReport(
        checkpoint.directory,
        len(config.modules),
        len(checkpoint.tensors),
        hashed,
        fits,
        not checkpoint.foreign,
    )


def check_architecture(checkpoint: Checkpoint) -> bool:
    """Compare every tensor with the model built (without memory) from config.json.

    Returns False when transformers is not installed, so that nothing could be compared.
    """
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError:
        return False
    path = checkpoint.directory / "config.json"
    model = _network(checkpoint)
    modules = checkpoint.require_spense().modules
    names = spense_names(model, checkpoint)
    linears = names.modules
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())

    def header(name: str) -> torch.Tensor:
        return torch.empty(checkpoint.tensors[names.plain[name]].shape, device="meta")

    for name, parameter in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module in linears:
            parts = linears[module]
            if kind == "weight":
                _same(module, "weight", tuple(parameter.shape), _extents(checkpoint, parts), path)
            elif kind == "bias" and not all(modules[part].bias for part in parts):
                raise CheckpointError("the model has a bias, the checkpoint none", module=module, fix=REPRUNE)
        elif (stored := model_parameter(name, names.plain, header)) is not None:
            _same(module, kind, tuple(parameter.shape), tuple(stored.shape), path)
        elif name not in tied:
            raise CheckpointError(
                "the model needs this tensor, the checkpoint does not hold it",
                file=checkpoint.directory,
                module=module,
                tensor=kind,
                fix=REPRUNE,
            )
    known = set(model.state_dict())
    for module, parts in linears.items():
        if f"{module}.weight" not in known:
            raise CheckpointError("the model has no such module", file=path, module=module, fix=REPRUNE)
        if f"{module}.bias" not in known and any(modules[part].bias for part in parts):
            raise CheckpointError("the checkpoint has a bias, the model none", module=module, fix=REPRUNE)
    return True


def _network(checkpoint: Checkpoint) -> Any:
    """The model that config.json describes, without memory."""
    import torch

    try:
        model_config = load_config(checkpoint.directory)
        model_config.__dict__.pop("quantization_config", None)
        with torch.device("meta"):
            return auto_class(model_config).from_config(model_config)
    except Exception as error:  # whatever a damaged config makes transformers raise
        raise CheckpointError(
            f"transformers cannot build the model ({type(error).__name__}: {error})",
            file=checkpoint.directory / "config.json",
            fix=REPRUNE,
        ) from None


def _verify_thresholds(
    checkpoint: TwellCheckpoint, update_manifest: bool, progress: Callable[[str], None]
) -> VerifyReport:
    """Hashes, and that every threshold is one of a linear of the model; the weights are plain."""
    hashed = 0 if update_manifest else manifest.check_manifest(checkpoint.directory, progress=progress)
    linears = {
        name: module.weight.shape for name, module in _network(checkpoint).named_modules() if _linear(module)
    }
    for name in checkpoint.thresholds.inputs:
        stored = checkpoint.tensors[f"{name}.weight"].shape
        if tuple(linears.get(name, ())) != stored:
            raise CheckpointError(
                f"a threshold for a module of shape {list(stored)}, which the model has not as a linear",
                file=checkpoint.directory / "config.json",
                module=name,
                fix=RESPARSIFY,
            )
    if update_manifest:
        manifest.update_manifest(checkpoint.directory)
    inputs = len(checkpoint.thresholds.inputs)
    return VerifyReport(checkpoint.directory, inputs, len(checkpoint.tensors), hashed, True)


def _linear(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.ndim == 2


def _extents(checkpoint: Checkpoint, parts: list[str]) -> tuple[int, int]:
    layouts = [checkpoint.layout(part) for part in parts]
    return sum(layout.out_features for layout in layouts), layouts[0].in_features


def _same(module: str, tensor: str, model: tuple, stored: tuple, path: Path) -> None:
    if model != stored:
        raise CheckpointError(
            f"the checkpoint has {list(stored)}, the model {list(model)}",
            file=path,
            module=module,
            tensor=tensor,
            fix=REPRUNE,
        )
