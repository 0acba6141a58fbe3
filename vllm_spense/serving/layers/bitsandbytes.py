"""The vLLM linear method of a bitsandbytes checkpoint: its 4-bit weights as a rank's part of our codec.

A rank takes its rows and columns of the codes while they arrive. What lies beside a weight is small and
counts the blocks of the whole matrix, so every rank keeps all of it until the layer is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import gcd, prod
from typing import Any, NoReturn

import torch
from torch.nn.functional import pad

from vllm_spense.format.bitsandbytes import (
    BLOCK,
    CODECS,
    DOWNLOAD,
    STATE,
    BitsAndBytesLinear,
    QuantState,
    parse_state,
)
from vllm_spense.format.codecs import BF16, FourBit
from vllm_spense.format.errors import CheckpointError
from vllm_spense.format.linear import Codecs
from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear.random import random_layer
from vllm_spense.ops.linear.spec import LinearSpec
from vllm_spense.serving import compat
from vllm_spense.serving.layers.method import SpenseMethod
from vllm_spense.serving.loading import shard_indices
from vllm_spense.serving.summary import LoadSummary

PREFIX = "bnb_"
"""What the parameters beside ``weight`` are called: the part of the file's name follows."""
STATE_PARAMETER = f"{PREFIX}quant_state"
STATE_BYTES = 512
"""Room for a state: that of other weights, which a reload brings, may have some digits more."""
DTYPES = {"U8": torch.uint8, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredWeight:
    """What headers tell of a module: bytes of its 4-bit weight, or the rows of a plain one (the other is 0),
    shape and dtype of what lies beside it, by part, and whether it has a bias."""

    name: str
    nbytes: int
    plain_rows: int
    beside: Mapping[str, tuple[tuple[int, ...], str]]
    bias: bool

    def parameters(self) -> dict[str, tuple[int, torch.dtype]]:
        """Size and dtype of the parameters that keep what lies beside it; :class:`CheckpointError`."""
        for part, (_, stored) in self.beside.items():
            if stored not in DTYPES:
                raise CheckpointError(
                    f"dtype {stored}", module=self.name, tensor=f"weight.{part}", fix=DOWNLOAD
                )
        found = {
            parameter_of(part): (prod(shape), DTYPES[dtype]) for part, (shape, dtype) in self.beside.items()
        }
        if STATE_PARAMETER in found:
            size, dtype = found[STATE_PARAMETER]
            found[STATE_PARAMETER] = (max(size, STATE_BYTES), dtype)
        return found


@dataclass(frozen=True)
class Rows:
    """Rows of one part of a layer on this rank: from ``first`` on of a module's, by its index."""

    module: int
    first: int
    count: int


def parameter_of(part: str) -> str:
    """Name of the parameter that keeps a part beside the weight."""
    return STATE_PARAMETER if part.startswith(STATE) else PREFIX + part


class BitsAndBytesLinearMethod(SpenseMethod):
    """Linear method of one vLLM layer, fused from the ``modules``; some of them may be plain ones."""

    def __init__(self, prefix: str, modules: list[StoredWeight], summary: LoadSummary) -> None:
        super().__init__(prefix, summary)
        self.modules = modules
        self.mixed = not all(module.nbytes for module in modules)
        self.rows: list[Rows] = []
        self.codes: dict[int, torch.Tensor] = {}

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Allocate this rank's codes, or its plain weight where not all modules are in 4 bits."""
        rank, size = getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)
        cut = input_size_per_partition != input_size
        self.columns = input_size_per_partition
        self.first_column = rank * self.columns if cut else 0
        self.in_features = input_size
        if self.columns % 2:
            self._refuse(
                f"a rank would have {self.columns} columns, and two share a byte", fix="use fewer ranks"
            )
        self.rows = self._rows(output_partition_sizes, input_size, *((0, 1) if cut else (rank, size)))
        shape = (sum(output_partition_sizes), self.columns if self.mixed else self.columns // 2)
        names = {"weight": torch.empty(shape, dtype=params_dtype if self.mixed else torch.uint8)}
        for name, (sizes, dtype) in self._beside.items():
            names[name] = torch.empty(sum(sizes), dtype=dtype)
        for name, data in names.items():
            load = self._load_weight if name == "weight" else self._loader_beside(name)
            layer.register_parameter(name, compat.BasevLLMParameter(data=data, weight_loader=load))
        layer.logical_widths = output_partition_sizes
        layer.input_size_per_partition = input_size_per_partition
        layer.output_size_per_partition = sum(output_partition_sizes)
        layer.orig_dtype = params_dtype
        self.created(layer, tuple(names))

    def _rows(self, widths: list[int], in_features: int, rank: int, size: int) -> list[Rows]:
        """Where the rows of each part of the layer lie in the modules."""
        if len(self.modules) == 1 and len(widths) > 1:  # fused in the file, too
            rows = [width * size for width in widths]
            total = self._rows_of(self.modules[0], in_features)
            if sum(rows) > total and len(rows) == 3:  # ranks hold copies of key/value heads
                rows[1:] = [(total - rows[0]) // 2] * 2
            starts = [0, *accumulate(rows)]
            if starts[-1] != total:
                self._refuse(f"{total} rows, the layer takes {' + '.join(map(str, rows))}", self.modules[0])
            shares = zip(starts, rows, widths, strict=False)
            return [
                Rows(0, start + rank * (all_ // width) // size * width, width)
                for start, all_, width in shares
            ]
        if len(self.modules) != len(widths):
            self._refuse(f"vLLM builds the layer from {len(widths)} parts, the file has {len(self.modules)}")
        found = []
        for index, (module, width) in enumerate(zip(self.modules, widths, strict=True)):
            total = self._rows_of(module, in_features)
            parts = total // width
            if total % width or not parts or size % parts:
                self._refuse(f"{total} rows of {in_features} columns, a rank takes {width}", module)
            found.append(Rows(index, rank * parts // size * width, width))
        return found

    def _rows_of(self, module: StoredWeight, in_features: int) -> int:
        if module.nbytes * 2 % in_features:
            self._refuse(f"{module.nbytes} bytes are no rows of {in_features} codes of 4 bits", module)
        return module.nbytes * 2 // in_features or module.plain_rows

    # -- loading ---------------------------------------------------------------------------------

    @cached_property
    def _beside(self) -> dict[str, tuple[list[int], torch.dtype]]:
        """Sizes of every parameter beside the weight, by module, and its dtype."""
        found: dict[str, tuple[list[int], torch.dtype]] = {}
        for index, module in enumerate(self.modules):
            for name, (size, dtype) in module.parameters().items():
                sizes, known = found.setdefault(name, ([0] * len(self.modules), dtype))
                sizes[index] = size
                if known != dtype:
                    self._refuse(
                        "the parts of a fused layer were quantised with and without nested absmax", module
                    )
        return found

    def _indices(self, shard_id: object) -> tuple[int, ...]:
        return shard_indices(shard_id, len(self.rows), self.prefix)

    def _load_weight(
        self, param: torch.nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: object = None
    ) -> None:
        for index in self._indices(loaded_shard_id):
            rows = self.rows[index]
            module = self.modules[rows.module]
            start = sum(part.count for part in self.rows[:index])
            weight = (
                self._codes(loaded_weight, module) if module.nbytes else self._plain(loaded_weight, module)
            )
            mine = weight.narrow(0, rows.first, rows.count)
            per_item = 2 if module.nbytes else 1
            mine = mine.narrow(1, self.first_column // per_item, self.columns // per_item)
            if module.nbytes and self.mixed:
                self.codes[index] = mine.clone()
            else:
                param.data.narrow(0, start, rows.count).copy_(mine)
            self.loaded.add(("weight", index))

    def _codes(self, weight: torch.Tensor, module: StoredWeight) -> torch.Tensor:
        flat = weight.contiguous().view(-1).view(torch.uint8)
        if flat.numel() != module.nbytes:
            self._refuse(f"{flat.numel()} bytes, its header said {module.nbytes}", module)
        return flat.view(-1, self.in_features // 2)

    def _plain(self, weight: torch.Tensor, module: StoredWeight) -> torch.Tensor:
        expected = [module.plain_rows, self.in_features]
        if list(weight.shape) != expected or not weight.is_floating_point():
            self._refuse(f"{weight.dtype} {list(weight.shape)}, expected {expected} of plain values", module)
        return weight

    def _loader_beside(self, name: str) -> Callable[..., None]:
        sizes = self._beside[name][0]

        def bitsandbytes_loader(
            param: torch.nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: object = None
        ) -> None:
            for module in sorted({self.rows[index].module for index in self._indices(loaded_shard_id)}):
                flat = loaded_weight.reshape(-1)
                if name == STATE_PARAMETER:
                    flat = pad(flat, (0, max(0, sizes[module] - flat.numel())), value=ord(" "))
                if flat.numel() != sizes[module] or flat.dtype != param.dtype:
                    self._refuse(
                        f"{name.removeprefix(PREFIX)}: {flat.dtype} {list(loaded_weight.shape)}, "
                        f"expected {param.dtype} [{sizes[module]}]",
                        self.modules[module],
                    )
                param.data.narrow(0, sum(sizes[:module]), sizes[module]).copy_(flat)
                self.loaded.add((name, module))

        return bitsandbytes_loader

    # -- when all has come -----------------------------------------------------------------------

    def collect(self, layer: Any) -> tuple[LinearSpec, Tensors]:
        """The layer as tensors of our codec, complete and every value legal."""
        if self.dummy and not self.loaded:
            spec = self._spec(CODECS["nf4"].variant(gcd(BLOCK, self.columns)))
            return spec, random_layer(spec, layer.weight.device)
        self._check_complete()
        if getattr(layer, "bias", None) is not None and not all(module.bias for module in self.modules):
            self._refuse("the model in config.json has a bias here, the checkpoint none")
        linears = {i: self._linear(layer, i) for i, module in enumerate(self.modules) if module.nbytes}
        if self.mixed:
            return self._as_plain(layer, linears)
        tables = {linear.codec.table for linear in linears.values()}
        if len(tables) > 1:
            self._refuse("the parts of a fused layer have different quant_maps")
        block = gcd(self.columns, *(linear.codec.block for linear in linears.values()))
        spec = self._spec(type(linears[0].codec).variant(block, tables.pop()))
        absmax = [self._absmax(linears[rows.module], rows, block) for rows in self.rows]
        device = layer.weight.device
        return spec, _empty(spec, device) | {
            "dense_weight": layer.weight.data,
            "dense_absmax": torch.cat(absmax),
            "weight_scale": torch.ones(spec.out_features, dtype=torch.float32, device=device),
        }

    def _spec(self, codec: FourBit) -> LinearSpec:
        return self._dense(Codecs(codec, codec))

    def _dense(self, codecs: Codecs) -> LinearSpec:
        sizes = tuple(rows.count for rows in self.rows)
        return LinearSpec("output", sum(sizes), self.columns, (0,) * len(sizes), sizes, codecs)

    def _linear(self, layer: Any, index: int) -> BitsAndBytesLinear:
        module, parts = self.modules[index], {}
        for part in module.beside:
            name = parameter_of(part)
            sizes = self._beside[name][0]
            parts["" if name == STATE_PARAMETER else part] = getattr(layer, name).data.narrow(
                0, sum(sizes[:index]), sizes[index]
            )
        state = parse_state(parts.pop(""), module=module.name)
        self._check_state(state, module)
        return BitsAndBytesLinear.of(module.name, state, parts)

    def _check_state(self, state: QuantState, module: StoredWeight) -> None:
        expected = [module.nbytes * 2 // self.in_features, self.in_features]
        if state.shape != expected:
            self._refuse(
                f"its state says shape {state.shape}, the model and the weight's bytes {expected}", module
            )
        beside = {part: shape for part, (shape, _) in module.beside.items() if not part.startswith(STATE)}
        wanted = {part: shape for part, (shape, _) in state.parts().items()}
        if beside != wanted:
            self._refuse(f"beside it lie {beside}, its state needs {wanted}", module)

    def _absmax(self, linear: BitsAndBytesLinear, rows: Rows, block: int) -> torch.Tensor:
        """This rank's part of it, for blocks that may be smaller: they begin where its columns do."""
        mine = linear.absmax().narrow(0, rows.first, rows.count)
        mine = mine.repeat_interleave(linear.codec.block // block, 1)
        return mine.narrow(1, self.first_column // block, self.columns // block).contiguous()

    def _as_plain(self, layer: Any, linears: Mapping[int, BitsAndBytesLinear]) -> tuple[LinearSpec, Tensors]:
        """A layer of which only some modules are in 4 bits: decoded, as nothing multiplies both at once."""
        weight = layer.weight.data
        for index, rows in enumerate(self.rows):
            if not self.modules[rows.module].nbytes:
                continue
            linear = linears[rows.module]
            block = gcd(self.columns, linear.codec.block)
            codec = type(linear.codec).variant(block, linear.codec.table)
            one = LinearSpec("output", rows.count, self.columns, (0,), (rows.count,), Codecs(codec, codec))
            tensors = {
                "dense_weight": self.codes.pop(index).to(weight.device),
                "dense_absmax": self._absmax(linear, rows, block),
                "weight_scale": torch.ones(rows.count, dtype=torch.float32, device=weight.device),
            }
            start = sum(part.count for part in self.rows[:index])
            weight.narrow(0, start, rows.count).copy_(one.stored.decode(tensors))
        spec = self._dense(Codecs(BF16, BF16))
        stored = spec.stored.tensors().items()
        empty = {
            n: torch.empty(s.shape, dtype=s.dtypes[-1], device=weight.device) for n, s in stored if not s.held
        }
        return spec, empty | {"dense_weight": weight}

    def _check_complete(self) -> None:
        for index, rows in enumerate(self.rows):
            if ("weight", index) not in self.loaded:
                self._refuse("weight: the tensor was never loaded", self.modules[rows.module])
        for index, module in enumerate(self.modules):
            for name in module.parameters():
                if (name, index) not in self.loaded:
                    self._refuse(f"weight.{name.removeprefix(PREFIX)}: the tensor was never loaded", module)

    def _refuse(self, problem: str, module: StoredWeight | None = None, fix: str = DOWNLOAD) -> NoReturn:
        raise CheckpointError(problem, module=module.name if module else self.prefix, fix=fix)


def _empty(spec: LinearSpec, device: torch.device) -> Tensors:
    """The tensors of the regions that a layer does not have."""
    stored = spec.stored.tensors().items()
    return {n: torch.empty(s.shape, dtype=s.dtypes[-1], device=device) for n, s in stored if not s.held}
