"""Random layers for tests of operators, loading and GPU kernels, and the bound that results are held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_spense.format import FP8_DTYPE, Codecs, Layout, LinearFormat
from vllm_spense.format.online import prune_and_pack
from vllm_spense.format.sparse24 import LEGAL_NIBBLES
from vllm_spense.ops import LinearArguments, LinearSpec
from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear.reference import full_weight

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}
"""Relative error of rounding once to the output dtype."""
ACCUMULATION = 2.0**-20
"""fp32 sums of up to 2080 products, relative to the sum of their magnitudes (16 ulp; any order)."""
CODECS = {FP8_DTYPE: "fp8", torch.int8: "int8", torch.bfloat16: "bf16"}
LARGEST = {FP8_DTYPE: 448, torch.int8: 127}
SPREAD = 64
"""Standard deviation of stored values of one byte: they fill most of e4m3's range, and int8's."""


@dataclass
class Layer:
    """A (fused) layer: the tensors of each of its modules as files hold them, and a bias in output order."""

    layouts: list[Layout]
    parts: list[Tensors]
    weight_dtype: torch.dtype
    bias: torch.Tensor | None

    @property
    def spec(self) -> LinearSpec:
        return LinearSpec.of(self.layouts, self.codecs)

    @property
    def codecs(self) -> Codecs:
        return Codecs.of(CODECS[self.weight_dtype])

    def tensors(self) -> Tensors:
        """Copies of the modules' tensors, stacked by region; those that files leave out have a size of 0."""
        dtypes = {"sparse_values": self.weight_dtype, "sparse_meta": torch.uint8}
        dtypes |= {"dense_weight": self.weight_dtype, "weight_scale": torch.float32}
        linears = [LinearFormat(layout, self.codecs) for layout in self.layouts]
        result = {}
        for name, dtype in dtypes.items():
            if name == "weight_scale" and name not in self.parts[0]:
                continue
            stacked = [
                part.get(name, torch.empty(linear.tensors()[name].shape, dtype=dtype))
                for part, linear in zip(self.parts, linears, strict=True)
            ]
            bits = torch.uint8 if dtype.itemsize == 1 else dtype
            result[name] = torch.cat([tensor.view(bits) for tensor in stacked]).view(dtype)
        return result

    def arguments(self) -> LinearArguments:
        return LinearArguments.of(self.spec, self.tensors(), self.bias)


def make_layer(
    layouts: Sequence[Layout], weight_dtype: torch.dtype = FP8_DTYPE, *, bias: bool = False, seed: int = 0
) -> Layer:
    """A layer with random contents; its bias is bf16."""
    generator = torch.Generator().manual_seed(seed)
    parts = [make_part(layout, weight_dtype, generator) for layout in layouts]
    rows = sum(layout.out_features for layout in layouts)
    vector = torch.randn(rows, generator=generator).bfloat16() if bias else None
    return Layer(list(layouts), parts, weight_dtype, vector)


def make_part(layout: Layout, weight_dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    """One module's tensors as a file holds them: any pair of places per group, weights of about 1."""
    spread = SPREAD if weight_dtype in LARGEST else 1
    nibbles = torch.tensor(LEGAL_NIBBLES, dtype=torch.uint8)
    part = {}
    for name, stored in LinearFormat(layout, Codecs.of(CODECS[weight_dtype])).held().items():
        shape = stored.shape
        if name == "sparse_meta":
            low, high = (nibbles[torch.randint(6, shape, generator=generator)] for _ in range(2))
            part[name] = low | high << 4
        else:
            noise = torch.randn(shape, generator=generator) * spread
            largest = LARGEST.get(weight_dtype, 448)
            part[name] = noise.clamp(-largest, largest).to(weight_dtype)
    if weight_dtype in LARGEST:
        part["weight_scale"] = (torch.rand(layout.out_features, generator=generator) + 0.5) / spread
    return part


def packed_part(layout: Layout, codec: str, generator: torch.Generator) -> Tensors:
    """One module's tensors in any codec, of a random weight pruned by magnitude."""
    weight = torch.randn(layout.out_features, layout.in_features, generator=generator)
    return prune_and_pack(weight, layout, codec)


def layouts_of(spec: LinearSpec) -> list[Layout]:
    """Modules that form this layer."""
    if spec.split == "input":
        return [Layout("input", spec.out_features, spec.in_features, spec.sparse_sizes[0])]
    sizes = zip(spec.sparse_sizes, spec.dense_sizes, strict=True)
    return [Layout("output", sparse + dense, spec.in_features, sparse) for sparse, dense in sizes]


def assert_within_rounding(
    y: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    layer: LinearArguments,
    out_dtype: torch.dtype,
    *,
    weight: torch.Tensor | None = None,
    rounding: Mapping[torch.dtype, float] = ROUNDING,
    accumulation: float = ACCUMULATION,
) -> None:
    """Every element of ``y`` is the float64 product, but for the order of an fp32 sum and one rounding.

    ``layer``: in the checkpoint's layout; ``weight``: its stored values ``[N, K]`` where they come from
    elsewhere.
    """
    weight = full_weight(layer).double() if weight is None else weight.double()
    if layer.weight_scale is not None:
        weight = weight * layer.weight_scale.double()[:, None]
    wide = x.double() if x_scale is None else x.double() * x_scale.double()
    bias = torch.zeros(len(weight)).double() if layer.bias is None else layer.bias.double()
    expected = wide @ weight.T + bias
    magnitude = wide.abs() @ weight.abs().T + bias.abs()
    assert (y.dtype, y.shape) == (out_dtype, expected.shape)
    error = (y.double() - expected).abs()
    step = rounding[out_dtype]
    bound = step * expected.abs() + (1 + step) * accumulation * magnitude
    assert (error <= bound).all(), f"worst {float((error / bound).max()):.2f} times the bound"


def four_bit_tensors(spec: LinearSpec, seed: int = 0) -> Tensors:
    """Tensors of a layer in 4 bits as serving loads them: any code, absmax in fp32, weights of about 1."""
    generator = torch.Generator().manual_seed(seed)
    nibbles = torch.tensor(LEGAL_NIBBLES, dtype=torch.uint8)
    found = {}
    for name, stored in spec.stored.tensors().items():
        shape = stored.shape
        if name == "sparse_meta":
            low, high = (nibbles[torch.randint(6, shape, generator=generator)] for _ in range(2))
            found[name] = low | high << 4
        elif name.endswith(("_absmax", "_scale")):
            found[name] = torch.rand(shape, generator=generator) + 0.5
        elif stored.dtypes[0] == torch.uint8:
            found[name] = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        else:
            found[name] = torch.randn(shape, generator=generator).to(stored.dtypes[0])
    return found
