"""4-bit checkpoints that transformers and bitsandbytes have written, read as what they are.

A module's ``weight`` has two codes per byte, of its flattened ``[N, K]``, the first in the high half; beside
it lie ``weight.absmax`` per block of the flattened matrix, ``weight.quant_map`` (what a code stands for), and
``weight.quant_state.bitsandbytes__nf4``, JSON in bytes. With double quantisation absmax are 8-bit codes, too
(QLoRA, arXiv 2305.14314, section 3), of ``weight.nested_quant_map``, times ``weight.nested_absmax``, plus an
offset.

Such a module is a dense layer of the codec :class:`~vllm_spense.format.codecs.FourBit` with the same bits:
every block is cut where a row ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import gcd, prod
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_spense.format.checkpoint import CONFIG_NAME, Checkpoint, TensorInfo, read_json
from vllm_spense.format.codecs import FP4, NF4, FourBit
from vllm_spense.format.errors import CheckpointError
from vllm_spense.format.layout import Layout
from vllm_spense.format.linear import Codecs, LinearFormat
from vllm_spense.format.schema import MAX_FEATURES, ModuleSpec, checkpoint_config
from vllm_spense.format.twell_checkpoint import TwellCheckpoint
from vllm_spense.format.twell_config import is_twell

METHOD = "bitsandbytes"
DOWNLOAD = "download the checkpoint again, or make it again with transformers and bitsandbytes"
STATE = "quant_state.bitsandbytes__"
"""What the name of a module's JSON begins with, behind ``weight.``; the codec's name follows."""
CODECS: dict[str, FourBit] = {"nf4": NF4, "fp4": FP4}
BLOCK = 64
"""The largest blocks that are kept as they are; larger ones are cut."""
_STORAGE = ("U8", "I8", "BF16", "F16", "F32")
"""What ``bnb_4bit_quant_storage`` may be: bytes all the same."""
_MAX_STATE = 4096
"""Bytes of JSON; bitsandbytes writes about 180."""
_PLAIN = ("BF16", "F16", "F32")
_MOST_FP32 = float(torch.finfo(torch.float32).max)
_CODES = 16
_NESTED_CODES = 256
_MAX_BLOCK = 1 << 16

BlockSize = Annotated[int, Field(ge=2, le=_MAX_BLOCK)]
Side = Annotated[int, Field(ge=1, le=MAX_FEATURES)]


class Settings(BaseModel):
    """What matters of ``quantization_config``: the tensors say the rest."""

    model_config = ConfigDict(frozen=True)

    quant_method: Literal["bitsandbytes"]
    load_in_4bit: bool = False
    load_in_8bit: bool = False


class QuantState(BaseModel):
    """The JSON beside a weight, complete and nothing else in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    quant_type: Literal["nf4", "fp4"]
    blocksize: BlockSize
    dtype: Literal["bfloat16", "float16", "float32"]
    shape: Annotated[list[Side], Field(min_length=2, max_length=2)]
    nested_blocksize: BlockSize | None = None
    nested_dtype: Literal["float32"] | None = None
    nested_offset: Annotated[float, Field(ge=-_MOST_FP32, le=_MOST_FP32)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> QuantState:
        nested = [self.nested_blocksize, self.nested_dtype, self.nested_offset]
        if any(value is None for value in nested) and any(value is not None for value in nested):
            raise ValueError("nested_blocksize, nested_dtype and nested_offset belong together")
        if self.blocksize & (self.blocksize - 1):
            raise ValueError(f"blocksize {self.blocksize} is no power of two")
        if prod(self.shape) % 2 or self.shape[1] % 2:
            raise ValueError(f"shape {self.shape} has rows of an odd number of values: they share bytes")
        return self

    @property
    def nested(self) -> bool:
        return self.nested_blocksize is not None

    @property
    def blocks(self) -> int:
        """Absmax of the whole weight."""
        return -(-prod(self.shape) // self.blocksize)

    @property
    def layout(self) -> Layout:
        return Layout("output", self.shape[0], self.shape[1], 0)

    @property
    def kept_block(self) -> int:
        """Values that share an absmax in rows that begin with a block."""
        return gcd(self.blocksize, self.shape[1], BLOCK)

    def codec(self, table: torch.Tensor | None = None) -> FourBit:
        """The codec of the weight; ``table [16]`` fp32: what its codes stand for, if not what is usual."""
        values = None if table is None else tuple(table.tolist())
        return CODECS[self.quant_type].variant(self.kept_block, values)

    def parts(self) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """Shape and dtypes, as safetensors spells them, of what lies beside the weight but the state."""
        found: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
            "absmax": ((self.blocks,), ("U8" if self.nested else "F32",)),
            "quant_map": ((_CODES,), ("F32",)),
        }
        if self.nested_blocksize is not None:
            found["nested_absmax"] = ((-(-self.blocks // self.nested_blocksize),), ("F32",))
            found["nested_quant_map"] = ((_NESTED_CODES,), ("F32",))
        return found


def split_name(name: str) -> tuple[str, str] | None:
    """Module and part of a tensor beside a 4-bit weight: ``absmax``, …; None for every other tensor."""
    module, found, part = name.partition(".weight.")
    return (module, part) if found else None


def parse_state(raw: torch.Tensor, *, module: str, file: object = None) -> QuantState:
    """A module's state from its bytes; :class:`CheckpointError` says what is wrong with them."""
    try:
        if raw.dtype != torch.uint8 or raw.ndim != 1 or not 2 <= raw.numel() <= _MAX_STATE:
            raise ValueError(f"{raw.dtype} {list(raw.shape)} are not up to {_MAX_STATE} bytes of JSON")
        return QuantState.model_validate(
            json.loads(bytes(raw.tolist()).decode("ascii"), parse_constant=_refuse)
        )
    except ValidationError as error:
        found = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
        problem = "; ".join(found)
    except (
        ValueError,
        RecursionError,
    ) as error:  # also of bytes that are no text, and of text that is no JSON
        problem = str(error)
    raise CheckpointError(
        f"bitsandbytes' state of the weight cannot be used ({problem})",
        file=file,
        module=module,
        fix=DOWNLOAD,
    )


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def check_settings(raw: Any, file: object = "config.json") -> None:
    """Refuse what is not 4 bits; :class:`CheckpointError`."""
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        raise CheckpointError(
            f"quantization_config of bitsandbytes cannot be used ({error.errors()[0]['msg']})",
            file=file,
            fix=DOWNLOAD,
        ) from None
    if settings.load_in_8bit:
        raise CheckpointError(
            "8-bit bitsandbytes (LLM.int8) is not supported",
            file=file,
            fix="use a 4-bit one, or `spense prune --weight-dtype int8 --dense-ratio 1` on the original",
        )
    if not settings.load_in_4bit:
        raise CheckpointError("quantization_config says neither 4 nor 8 bits", file=file, fix=DOWNLOAD)


@dataclass(frozen=True)
class BitsAndBytesLinear:
    """A 4-bit module: its state, and what lies beside its weight, checked, by part."""

    module: str
    state: QuantState
    parts: Mapping[str, torch.Tensor]

    @classmethod
    def of(
        cls, module: str, state: QuantState, parts: Mapping[str, torch.Tensor], file: object = None
    ) -> BitsAndBytesLinear:
        """:class:`CheckpointError` for values that no kernel may see."""

        def refuse(part: str, problem: str) -> None:
            raise CheckpointError(problem, file=file, module=module, tensor=f"weight.{part}", fix=DOWNLOAD)

        for part, (shape, _) in state.parts().items():
            tensor = parts[part]
            if tuple(tensor.shape) != shape:
                refuse(part, f"shape {list(tensor.shape)}, expected {list(shape)}")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                refuse(part, "NaN or infinity")
        check_table(parts["quant_map"], module, file)
        linear = cls(module, state, parts)
        if state.nested and not bool(torch.isfinite(linear.absmax()).all()):
            refuse("absmax", "decoded, some are beyond what fp32 holds")
        return linear

    @property
    def codec(self) -> FourBit:
        return self.state.codec(self.parts["quant_map"])

    def absmax(self) -> torch.Tensor:
        """fp32 ``[N, K / block]`` of :attr:`codec`, of the bits with which bitsandbytes multiplies."""
        state, absmax = self.state, self.parts["absmax"]
        if state.nested_blocksize is not None:
            outer = self.parts["nested_absmax"].repeat_interleave(state.nested_blocksize)[: state.blocks]
            offset = torch.tensor(state.nested_offset, dtype=torch.float32, device=absmax.device)
            absmax = self.parts["nested_quant_map"][absmax.int()] * outer + offset
        pieces = absmax.repeat_interleave(state.blocksize // state.kept_block)
        return pieces[: prod(state.shape) // state.kept_block].view(state.shape[0], -1)


def check_table(table: torch.Tensor, module: str, file: object = None) -> None:
    """:class:`CheckpointError` for what cannot be what 16 codes stand for; NaN compares as nothing does."""
    if not (bool((table == 0).any()) and bool((table.abs() <= 1).all())):
        raise CheckpointError(
            "not 16 values from -1 to 1 with a zero among them",
            file=file,
            module=module,
            tensor="weight.quant_map",
            fix=DOWNLOAD,
        )


def weight_rows(weight: torch.Tensor, state: QuantState, *, module: str, file: object = None) -> torch.Tensor:
    """Codes uint8 ``[N, K / 2]`` of a stored weight of any dtype; refuses another size."""
    flat = weight.contiguous().view(-1).view(torch.uint8)
    if flat.numel() * 2 != prod(state.shape):
        raise CheckpointError(
            f"{flat.numel()} bytes, expected {prod(state.shape) // 2} for {state.shape}",
            file=file,
            module=module,
            tensor="weight",
            fix=DOWNLOAD,
        )
    return flat.view(state.shape[0], -1)


def is_bitsandbytes(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of such a checkpoint."""
    raw = config.get("quantization_config")
    return isinstance(raw, dict) and raw.get("quant_method") == METHOD


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """A directory of ours, of bitsandbytes, or with a dense model; :class:`CheckpointError`."""
    path = Path(directory) / CONFIG_NAME
    config = read_json(path) if path.is_file() else {}
    if is_bitsandbytes(config):
        return BitsAndBytesCheckpoint(directory)
    return TwellCheckpoint(directory) if is_twell(config) else Checkpoint(directory)


class BitsAndBytesCheckpoint(Checkpoint):
    """A local directory of bitsandbytes' as if it were ours: the same modules, tensors and weights.

    Opening reads headers and states, and checks the headers of 4-bit weights and all that lies beside them.
    """

    foreign = True

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory)
        self.headers = grouped(self.tensors)
        self.states = {module: self._state(module, parts) for module, parts in self.headers.items()}
        if not self.states:
            raise CheckpointError(
                "config.json says bitsandbytes, and no weight is stored in 4 bits",
                file=self.directory,
                fix=DOWNLOAD,
            )
        modules = {
            module: ModuleSpec.of(state.layout, self._has_bias(module, state))
            for module, state in self.states.items()
        }
        self._refuse_bytes()
        own = {module: Codecs.of(state.quant_type) for module, state in self.states.items()}
        self.quantization = checkpoint_config(
            CODECS[next(iter(self.states.values())).quant_type],
            own=own,
            tensor_parallel_sizes=[1, 2, 4, 8],  # nothing has two regions to cut
            modules=modules,
            ignore=[],
            provenance={"made with": METHOD},
        )

    def _parse(self, raw: object) -> None:
        check_settings(raw, self.directory / CONFIG_NAME)

    def _state(self, module: str, parts: Mapping[str, TensorInfo]) -> QuantState:
        name = state_name(module, parts, self.directory)
        state = parse_state(self.load(f"{module}.weight.{name}"), module=module, file=parts[name].file)
        check_parts(module, state, parts)
        return state

    def _has_bias(self, module: str, state: QuantState) -> bool:
        info = self.tensors.get(f"{module}.bias")
        if info is not None and (problem := _wrong(info, (state.shape[0],), _PLAIN, as_bytes=False)):
            raise CheckpointError(problem, file=info.file, module=module, tensor="bias", fix=DOWNLOAD)
        return info is not None

    def _refuse_bytes(self) -> None:
        """A plain weight of integers has lost what lay beside it, or is one of 8 bits."""
        for name in self.plain_tensors():
            info = self.tensors[name]
            if name.endswith(".weight") and info.dtype in ("U8", "I8"):
                raise CheckpointError(
                    f"dtype {info.dtype}, and no state of 4 bits lies beside it",
                    file=info.file,
                    module=name.removesuffix(".weight"),
                    tensor="weight",
                    fix=DOWNLOAD,
                )

    def _stray(self, files: Iterable[Path]) -> list[Path]:
        """Pickles, too: without a manifest nobody knows which of two copies is the one that counts."""
        return super()._stray(files) + sorted(self.directory.glob("pytorch_model*.bin"))

    def linear(self, module: str) -> LinearFormat:
        state, table = self.states[module], self.load(f"{module}.weight.quant_map")
        check_table(table, module, self.tensors[f"{module}.weight.quant_map"].file)
        codec = state.codec(table)
        return LinearFormat(state.layout, Codecs(codec, codec), f"{module}.bias" in self.tensors)

    def stored_bytes(self, module: str) -> int:
        return sum(nbytes_of(info) for info in self.headers[module].values())

    def module_tensors(self, module: str) -> dict[str, torch.Tensor]:
        """The module in the form of our codec; raises :class:`CheckpointError` for illegal values."""
        state = self.states[module]
        parts = {part: self.load(f"{module}.weight.{part}") for part in state.parts()}
        linear = BitsAndBytesLinear.of(module, state, parts, self.directory)
        weight = weight_rows(self.load(f"{module}.weight"), state, module=module, file=self.directory)
        tensors = {
            "dense_weight": weight,
            "dense_absmax": linear.absmax(),
            "weight_scale": torch.ones(state.shape[0], dtype=torch.float32),
        }
        bias = f"{module}.bias"
        return tensors | ({"bias": self.load(bias)} if bias in self.tensors else {})

    def plain_tensors(self) -> Iterator[str]:
        for name in self.tensors:
            module, _, short = name.rpartition(".")
            if split_name(name) is None and not (module in self.states and short in ("weight", "bias")):
                yield name


def grouped(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """What lies beside each 4-bit weight, by module and part; the weight itself as part ``""``."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        split = split_name(name)
        if split is not None:
            found.setdefault(split[0], {})[split[1]] = info
    for module, parts in found.items():
        if f"{module}.weight" in tensors:
            parts[""] = tensors[f"{module}.weight"]
    return found


def state_name(module: str, parts: Mapping[str, object], file: object = None) -> str:
    """The part that is the module's state; :class:`CheckpointError` unless there is one."""
    states = [part for part in parts if part.startswith(STATE)]
    if len(states) != 1 or states[0].removeprefix(STATE) not in CODECS:
        raise CheckpointError(
            f"{' and '.join(states) or 'no state'} beside a weight of bitsandbytes, expected {STATE}nf4 "
            f"or {STATE}fp4",
            file=file,
            module=module,
            tensor="weight",
            fix=DOWNLOAD,
        )
    return states[0]


def check_parts(module: str, state: QuantState, parts: Mapping[str, TensorInfo]) -> None:
    """Headers of a module's tensors against its state; :class:`CheckpointError`."""
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        **state.parts(),
        f"{STATE}{state.quant_type}": ((-1,), ("U8",)),
        "": ((prod(state.shape) // 2,), _STORAGE),
    }
    for part in sorted(set(parts) | set(expected)):
        info = parts.get(part)
        problem: str | None
        if info is None:
            problem = "the tensor is missing"
        elif part not in expected:
            problem = "unexpected tensor beside a weight of bitsandbytes"
        else:
            problem = _wrong(info, *expected[part], as_bytes=part == "")
        if problem:
            raise CheckpointError(
                problem,
                file=info.file if info else next(iter(parts.values())).file,
                module=module,
                tensor=f"weight.{part}".rstrip("."),
                fix=DOWNLOAD,
            )


def nbytes_of(info: TensorInfo) -> int:
    """Bytes of a weight, whatever ``bnb_4bit_quant_storage`` it has."""
    return prod(info.shape) * {"F32": 4, "BF16": 2, "F16": 2}.get(info.dtype, 1)


def _wrong(
    info: TensorInfo, shape: tuple[int, ...], dtypes: tuple[str, ...], *, as_bytes: bool
) -> str | None:
    if info.dtype not in dtypes:
        return f"dtype {info.dtype}, expected {' or '.join(dtypes)}"
    if as_bytes and nbytes_of(info) != shape[0]:
        return f"{nbytes_of(info)} bytes, expected {shape[0]}"
    if not as_bytes and shape != (-1,) and info.shape != shape:
        return f"shape {list(info.shape)}, expected {list(shape)}"
    return None
