"""From a checkpoint's tensors to one rank's fused parameters, and the proof that all have arrived.

vLLM accepts missing shards silently, so every copy is recorded and :meth:`LoadPlan.check_complete`
names what never came. The loader is a plain function of our own, because vLLM's loaders assume that a
slice is one proportional piece: ours cuts the 2:4 region and the dense region separately.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_spense.format.codecs import Stored
from vllm_spense.format.errors import REPRUNE, CheckpointError
from vllm_spense.format.layout import Axis, Layout
from vllm_spense.format.linear import Codecs, LinearFormat
from vllm_spense.format.schema import ModuleSpec
from vllm_spense.ops.linear.spec import LinearSpec

Loaded = set[tuple[str, int]]
_QKV = {"q": 0, "k": 1, "v": 2}


def shard_indices(shard_id: object, count: int, prefix: str) -> tuple[int, ...]:
    """Positions of a tensor in its fused layer, from vLLM's shard id (None: all; int, tuple, or q/k/v)."""
    several = tuple(range(count)) if shard_id is None else shard_id
    found = several if isinstance(several, tuple) else (several,)
    indices = [_QKV.get(one, -1) if isinstance(one, str) else one for one in found]
    if all(type(one) is int and 0 <= one < count for one in indices):
        return tuple(indices)
    raise CheckpointError(
        f"shard id {shard_id!r} does not fit a layer of {count} parts",
        module=prefix,
        fix="use a model class that vllm-spense supports",
    )


@dataclass(frozen=True)
class ModuleSlice:
    """One checkpoint module and the part of it that this rank owns."""

    name: str
    linear: LinearFormat
    axis: Axis
    rank: int
    parts: int

    @cached_property
    def stored(self) -> dict[str, Stored]:
        """The module's tensors in files, by short name."""
        return self.linear.tensors()

    @cached_property
    def mine(self) -> LinearFormat:
        """This rank's part of the module."""
        return self.linear.shard(self.axis, self.parts)

    @cached_property
    def held(self) -> dict[str, Stored]:
        """This rank's part of them."""
        return self.mine.tensors()

    @property
    def local(self) -> Layout:
        return self.mine.layout


@dataclass(frozen=True)
class LoadPlan:
    """How the tensors of one (possibly fused) vLLM layer are filled on this rank."""

    prefix: str
    modules: tuple[ModuleSlice, ...]

    @property
    def codecs(self) -> Codecs:
        return self.modules[0].linear.codecs

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters to create (bias excepted: vLLM owns it)."""
        return tuple(name for name in self.modules[0].stored if name != "bias")

    def dtype(self, name: str) -> torch.dtype:
        return self.modules[0].stored[name].dtypes[-1]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the fused parameter: the modules' local tensors stacked along the output axis."""
        shapes = [m.held[name].shape for m in self.modules]
        return (sum(s[0] for s in shapes), *shapes[0][1:])

    def spec(self) -> LinearSpec:
        return LinearSpec.of([m.local for m in self.modules], self.modules[0].mine.codecs)

    def expected(self) -> Loaded:
        """(tensor, module index) of everything that must be loaded before the layer may run."""
        modules = enumerate(self.modules)
        return {(name, i) for i, m in modules for name, stored in m.held.items() if stored.held}

    def check_complete(self, loaded: Loaded) -> None:
        """Raise :class:`CheckpointError` naming the first tensor that was never loaded."""
        missing = sorted(self.expected() - loaded, key=lambda x: (x[1], x[0]))
        if missing:
            name, index = missing[0]
            more = f" ({len(missing)} tensors of {self.prefix} are missing)"
            raise CheckpointError(
                "the tensor was never loaded, the checkpoint does not hold it" + more,
                module=self.modules[index].name,
                tensor=name,
                fix=REPRUNE,
            )

    def check_bias(self, wanted: bool) -> None:
        """A bias that the model has and the checkpoint lacks would stay uninitialised memory."""
        for module in self.modules:
            if wanted and not module.linear.bias:
                raise CheckpointError(
                    "the model in config.json has a bias here, quantization_config says that there is none",
                    module=module.name,
                    tensor="bias",
                    fix=REPRUNE,
                )

    def copy(
        self, name: str, target: torch.Tensor, source: torch.Tensor, shard_id: object
    ) -> tuple[int, ...]:
        """Copy this rank's part of one checkpoint tensor into the fused parameter.

        Returns the indices of the parts that it fills; raises :class:`CheckpointError` on a wrong shape or
        dtype.
        """
        indices = shard_indices(shard_id, len(self.modules), self.prefix)
        if len({self.modules[index].name for index in indices}) > 1:
            raise CheckpointError(
                f"shard id {shard_id!r} does not fit a layer of {len(self.modules)} parts: layers that are "
                "fused on disk are not supported",
                module=self.prefix,
                fix="split the fused projection before pruning",
            )
        parts = [self.modules[index].stored.get(name) for index in indices]
        rows = [part.shape[0] for part in parts if part is not None]
        pieces = [source]
        if len(rows) > 1 and source.ndim and source.shape[0] == sum(rows):
            pieces = list(source.split(rows))
        for index, piece in zip(indices, pieces, strict=len(pieces) > 1):
            self._copy(name, target, piece, index)
        return indices

    def _copy(self, name: str, target: torch.Tensor, source: torch.Tensor, index: int) -> None:
        module = self.modules[index]
        self._check_source(module, name, source)
        part = module.linear.cut(name, source, module.axis, module.rank, module.parts)
        start = sum(m.held[name].shape[0] for m in self.modules[:index])
        target.narrow(0, start, part.shape[0]).copy_(module.linear.loaded(name, part))

    def _check_source(self, module: ModuleSlice, name: str, source: torch.Tensor) -> None:
        stored = module.stored.get(name)
        if stored is None:
            problem = f"unexpected tensor: the config says that this module has no {name}"
        elif tuple(source.shape) != stored.shape:
            problem = f"shape {list(source.shape)}, expected {list(stored.shape)}"
        elif source.dtype not in stored.dtypes:
            problem = f"dtype {source.dtype}, expected {stored.dtypes[0]}"
        elif not stored.held:
            problem = "unexpected tensor: the config says that this region is empty"
        else:
            return
        raise CheckpointError(problem, module=module.name, tensor=name, fix=REPRUNE)


def make_loader(plan: LoadPlan, name: str, loaded: Loaded) -> Callable[..., None]:
    """The ``weight_loader`` of one parameter; it holds the plan, never the layer (vLLM reloads)."""

    def spense_weight_loader(
        param: torch.nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: object = None
    ) -> None:
        loaded.update((name, i) for i in plan.copy(name, param.data, loaded_weight, loaded_shard_id))

    return spense_weight_loader


def make_plan(
    prefix: str,
    specs: dict[str, ModuleSpec],
    codecs: Codecs,
    promised_sizes: list[int],
    *,
    axis: Axis,
    in_features: int,
    local_outputs: list[int],
    rank: int,
    size: int,
) -> LoadPlan:
    """Match the checkpoint's extents with what the model asks for on this rank.

    ``in_features``: input features of the whole layer; ``local_outputs``: output features of each fused
    module on this rank; ``rank``, ``size``: tensor parallel. A module may be cut into fewer parts than
    ranks (replicated key/value heads); a dense one may fill several parts of the layer (linear attention's
    q, k and v). Raises :class:`CheckpointError` when they contradict.
    """
    modules = _parts(prefix, specs, local_outputs, size)
    splits = {(s.split, s.sparse if s.split == "input" else 0) for s in specs.values()}
    if len(splits) > 1:
        raise CheckpointError(
            "the parts of a fused layer must have the same split",
            module=prefix,
            fix=REPRUNE,
        )
    slices = []
    for (name, spec), n_local in zip(modules, local_outputs, strict=True):
        parts = size if axis == "input" else spec.out_features // max(n_local, 1)
        expected = (n_local if axis == "input" else n_local * parts, in_features)
        if expected != (spec.out_features, spec.in_features) or size % max(parts, 1):
            raise CheckpointError(
                f"quantization_config says [{spec.out_features}, {spec.in_features}], the model in "
                f"config.json has [{n_local * (parts if axis == 'output' else 1)}, {in_features}]",
                module=name,
                fix=REPRUNE,
            )
        hybrid = spec.sparse > 0 and axis == spec.split
        if hybrid and parts not in promised_sizes:
            raise CheckpointError(
                f"tensor parallel size {parts} is not among the sizes {promised_sizes} that this "
                "checkpoint was made for",
                module=name,
                fix="serve with one of these sizes, or prune again with --max-tp",
            )
        linear = LinearFormat(spec.layout(), codecs, spec.bias)
        try:
            linear.shard(axis, parts)
        except ValueError as error:
            raise CheckpointError(
                f"cannot be cut into {parts} tensor-parallel parts: {error}",
                module=name,
                fix=f"serve with a tensor parallel size among {promised_sizes}",
            ) from None
        slices.append(ModuleSlice(name, linear, axis, rank * parts // size, parts))
    return LoadPlan(prefix, tuple(slices))


def _parts(
    prefix: str, specs: dict[str, ModuleSpec], local_outputs: list[int], size: int
) -> list[tuple[str, ModuleSpec]]:
    """The module that each part of the layer comes from, with the rows that it takes of it."""
    if len(local_outputs) == len(specs):
        return list(specs.items())
    parts: list[tuple[str, ModuleSpec]] = []
    rows = [n * size for n in local_outputs]
    for name, spec in specs.items():
        taken = 0
        while rows and taken < spec.out_features and not spec.sparse:
            taken += rows[0]
            layout = Layout("output", rows.pop(0), spec.in_features, 0)
            parts.append((name, ModuleSpec.of(layout, spec.bias)))
        if taken != spec.out_features:
            parts = []
            break
    if len(parts) != len(local_outputs):
        raise CheckpointError(
            f"vLLM builds the layer from {len(local_outputs)} parts, the checkpoint lists {len(specs)}",
            module=prefix,
            fix="use a model class that vllm-spense supports, or prune again",
        )
    return parts


def check_heads(plan: LoadPlan, head_size: int) -> None:
    """A rank's q, k and v must hold whole heads that belong together: vLLM pairs them by their position.

    Rows alone do not show it: half a key head of S and half of one of D are a slice, too. Raises
    :class:`CheckpointError`.
    """
    key = plan.modules[1]
    for module in plan.modules:
        whole = module.local.sparse * key.local.out_features == key.local.sparse * module.local.out_features
        if module.parts > 1 and (key.local.sparse % head_size or not whole):
            raise CheckpointError(
                f"a tensor-parallel size of {module.parts} would cut the regions of attention inside a group "
                "of heads",
                module=module.name,
                fix="serve with a smaller size, or prune again with another --attention-dense-ratio",
            )
