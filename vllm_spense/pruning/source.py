"""The dense source: a transformers model whose tensors are read from the files when they are needed."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_spense.format import Checkpoint, CheckpointError
from vllm_spense.format.checkpoint import CONFIG_NAME
from vllm_spense.format.errors import RESAVE, one_line
from vllm_spense.format.settings import portable
from vllm_spense.format.side_files import NEVER_USED
from vllm_spense.models.fused import left_out, model_parameter
from vllm_spense.models.parts import DecoderLayer, UnsupportedModelError, decoder, decoder_layers
from vllm_spense.models.split import SourceCheckpoint, checkpoint_name, split_fused
from vllm_spense.network import auto_class, module_names, stored_names
from vllm_spense.sources import building, check_source, check_tensors, load_config, refusal

_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def source_directory(model: str | Path) -> Path:
    """The local directory of ``model``, looked at with :func:`check_source`.

    A hub name is downloaded, without pickled weights, other formats and code.
    """
    path = Path(model).expanduser()
    if not path.exists():
        path = _download(model)
    check_source(path)
    return path


def _download(model: str | Path) -> Path:
    if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise ValueError(f"{model}: no such model directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), ignore_patterns=NEVER_USED))
    except Exception as error:
        raise ValueError(
            f"{model}: neither a local directory nor a model that can be downloaded ({one_line(str(error))})"
        ) from None


def meta_network(directory: Path, dtype: torch.dtype) -> nn.Module:
    """The transformers model that config.json describes, on the meta device: no memory, no foreign code."""
    config = load_config(directory)
    with building(directory), torch.device("meta"):
        network: nn.Module = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
    for owner, short, tensor in list(_owned(network)):
        if not tensor.is_meta:  # made with a device of its own (DiffLlama): it would count as read
            _put(owner, short, torch.empty_like(tensor, device="meta"))
    split_fused(network)
    return network.eval()


def layers_of(
    network: nn.Module, directory: Path, stored: Mapping[str, str] | None = None
) -> list[DecoderLayer]:
    """The decoder layers of the ``network`` of ``directory``; :class:`UnsupportedModelError` names that.

    ``stored``: the checkpoint's names of modules that it calls otherwise than the network.
    """
    try:
        return decoder_layers(network, stored)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(refusal(network, directory, str(error))) from None


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """bf16, fp16 or fp32, whichever most matrices are stored in; :class:`CheckpointError` for others."""
    found = Counter(info.dtype for info in checkpoint.tensors.values() if len(info.shape) > 1)
    name = found.most_common(1)[0][0] if found else "BF16"
    if name not in _FLOATS:
        raise CheckpointError(
            f"the weights are stored as {name}, expected one of {', '.join(_FLOATS)}",
            file=checkpoint.directory,
            fix="prune the unquantised model",
        )
    return _FLOATS[name]


class SourceModel:
    """A dense safetensors directory as a model of which only the parts in use take memory.

    ``network`` has all parameters on the meta device; :meth:`resident` lends a module its tensors, on
    ``device`` in ``dtype`` (default: fp32 on CPUs, elsewhere as stored). Buffers that no file holds
    (rotary frequencies) are real from the start. ``layers`` are its decoder layers. Fused linears are
    split, in the network and in ``checkpoint`` (:mod:`vllm_spense.models.split`). ``names``: what
    the files call each of the network's tensors (:mod:`vllm_spense.network.names`); ``layers`` speak of
    their parts by the files' names.

    Raises :class:`CheckpointError` naming file and tensor for a tensor that is missing or has another
    shape, :class:`UnsupportedModelError` for other architectures, ``ValueError`` for a Spense
    directory. All of that is found here, from headers, before any tensor is read.
    """

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.checkpoint = SourceCheckpoint(directory)
        if self.checkpoint.quantization is not None:
            raise ValueError(f"{directory} is a Spense checkpoint already; prune the dense model instead")
        check_tensors(self.checkpoint)
        self.device = device
        self.stored_dtype = _stored_dtype(self.checkpoint)
        default = torch.float32 if device.type == "cpu" else self.stored_dtype
        self.dtype = default if dtype is None else dtype
        self.network: Any = meta_network(directory, self.dtype)
        self.names = stored_names(self.network, self.checkpoint.tensors)
        self.layers: list[DecoderLayer] = layers_of(self.network, directory, module_names(self.names))
        self._tied: dict[str, str] = dict(getattr(self.network, "all_tied_weights_keys", None) or {})
        with building(directory):
            _fill_buffers(decoder(self.network), device)
        self._used: set[str] = set()
        for name, _ in _stored_tensors(self.network, ""):
            self._read(name, self._header)
        self._leave_out(set(self.checkpoint.tensors) - self._used)

    def _leave_out(self, unused: set[str]) -> None:
        """Forget tensors that the network does not use; one line says which.

        Raises :class:`UnsupportedModelError` where they are the head of another model class, and warns of
        what config.json loses.
        """
        directory, config = self.checkpoint.directory, self.checkpoint.config
        kind = next(iter(config.get("architectures") or ()), None)
        mine = (type(self.network).__name__, "ForCausalLM", "LMHeadModel")
        if unused and isinstance(kind, str) and not kind.endswith(mine):
            raise UnsupportedModelError(
                f"{directory / CONFIG_NAME}: the model is a {one_line(kind, 100)}, whose {min(unused)} a "
                f"{type(self.network).__name__} lacks; give a causal language model"
            )
        for name in unused:
            del self.checkpoint.tensors[name]
        if unused:
            warnings.warn(left_out(unused, directory), stacklevel=4)
        if dropped := portable(config)[1]:
            what = ", ".join(one_line(key, 100) for key in dropped)
            warnings.warn(f"{directory / CONFIG_NAME}: {what} is not taken over", stacklevel=4)

    # -- one tensor ------------------------------------------------------------------------------

    def fetch(self, name: str) -> torch.Tensor:
        """The parameter ``name`` of the network as the files hold it, on the CPU in its stored dtype."""
        return self._read(name, self.checkpoint.load)

    def _read(self, name: str, load: Callable[[str], torch.Tensor]) -> torch.Tensor:
        inside = checkpoint_name(name)
        if inside not in self.names:
            inside = self._tied.get(inside, inside)
        value = model_parameter(inside, self.names, lambda found: load(self.names[found]))
        stored = self.names.get(inside, inside)
        if value is None:
            problem = "the model of config.json needs this tensor, and it is missing"
            raise CheckpointError(problem, file=self.checkpoint.directory, tensor=stored, fix=RESAVE)
        expected = self.network.get_parameter_or_buffer(name).shape
        if value.shape != expected:
            info = self.checkpoint.tensors.get(stored)
            raise CheckpointError(
                f"shape {list(value.shape)}, but the model of config.json needs {list(expected)}",
                file=self.checkpoint.directory if info is None else info.file,
                tensor=stored,
                fix=RESAVE,
            )
        return value

    def _header(self, stored: str) -> torch.Tensor:
        """A tensor of the files on the meta device, from its header."""
        info = self.checkpoint.tensors[stored]
        self._used.add(stored)
        if info.dtype not in _FLOATS:
            problem = f"dtype {info.dtype}, expected one of {', '.join(_FLOATS)}"
            raise CheckpointError(problem, file=info.file, tensor=stored, fix=RESAVE)
        return torch.empty(info.shape, dtype=_FLOATS[info.dtype], device="meta")

    # -- modules ---------------------------------------------------------------------------------

    @contextmanager
    def resident(self, *modules: nn.Module) -> Iterator[None]:
        """While open, ``modules`` hold their tensors; then they go back to meta, changes and all."""
        try:
            for module in modules:
                self._load(module)
            yield
        finally:
            for module in modules:
                for owner, short, tensor in _owned(module):
                    _put(owner, short, torch.empty_like(tensor, device="meta"))

    def embedding(self) -> list[nn.Module]:
        """All of the decoder but its layers: what turns tokens into the first layer's arguments."""
        return [child for name, child in decoder(self.network).named_children() if name != "layers"]

    def _load(self, module: nn.Module) -> None:
        prefix = next(name for name, found in self.network.named_modules() if found is module)
        for name, tensor in list(_stored_tensors(module, prefix)):
            if tensor.is_meta:
                owner, _, short = name.rpartition(".")
                # A copy always: a view of the mapped file would keep all of the file mapped.
                value = self.fetch(name).to(self.device, self.dtype, copy=True)
                _put(self.network.get_submodule(owner), short, value)


def _stored_tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Full names of the parameters and buffers that checkpoints hold."""
    names = {owner: name for name, owner in module.named_modules(prefix=prefix)}
    for owner, short, tensor in _owned(module):
        yield f"{names[owner]}.{short}".lstrip("."), tensor


def _owned(module: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for owner in module.modules():
        tensors: dict[str, Any] = dict(owner._parameters)
        tensors |= {n: b for n, b in owner._buffers.items() if n not in owner._non_persistent_buffers_set}
        for short, tensor in tensors.items():
            if tensor is not None:
                yield owner, short, tensor


def _put(owner: nn.Module, short: str, tensor: torch.Tensor) -> None:
    is_parameter = short in owner._parameters
    setattr(owner, short, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _fill_buffers(network: Any, device: torch.device) -> None:
    """Give the buffers that no file holds their values, through transformers' own initialisation.

    It is what ``from_pretrained`` does after building on the meta device. NaN finds what it leaves out.
    """
    absent: list[tuple[str, nn.Module, str]] = []
    for name, module in network.named_modules():
        for short in module._non_persistent_buffers_set:
            if (buffer := module._buffers[short]) is not None:
                module._buffers[short] = _unset(buffer)
                absent.append((f"{name}.", module, short))
    for name, module in network.named_modules():  # Falcon-H1's decoder fills those of its layers
        if any(owner.startswith(f"{name}." if name else "") for owner, _, _ in absent):
            network._init_weights(module)
    for name, module, short in absent:
        buffer = module.get_buffer(short)
        if buffer.is_floating_point() and not bool(torch.isfinite(buffer).all()):
            raise ValueError(f"{name}{short}: transformers does not initialise this buffer")
        module._buffers[short] = buffer.to(device)


def _unset(buffer: torch.Tensor) -> torch.Tensor:
    return torch.full_like(buffer, float("nan") if buffer.is_floating_point() else 0, device="cpu")
