"""spense::sparse_mlp_cpu, every instruction set that this CPU has, both ways, against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from vllm_spense.ops.linear.cpu import ISAS
from vllm_spense.ops.mlp import sparse_mlp_cpu
from vllm_spense.ops.mlp.activation import KINDS, Activation
from vllm_spense.ops.mlp.select import select_sparse_mlp
from vllm_spense.ops.mlp.sparse_mlp import SparseMlpReference, SparseMlpSpec
from vllm_spense.ops.mlp.sparse_mlp_cpu import SparseMlpCpuBackend

CPU = torch.device("cpu")
REASON = sparse_mlp_cpu.why_not_here()
needs_kernels = pytest.mark.skipif(REASON is not None, reason=str(REASON))
every_kernel = pytest.mark.parametrize(
    "isa",
    [
        pytest.param(i, id=name, marks=needs_kernels)
        for i, name in enumerate(ISAS, 1)
        if REASON or name in sparse_mlp_cpu.isas()
    ],
)
CHOOSE, ACTIVE, ALL = range(3)
every_way = pytest.mark.parametrize("way", [ACTIVE, ALL], ids=["active", "all"])
ACTIVATIONS = [Activation(kind, 0.3 if kind == "fatrelu" else 0.0) for kind in KINDS]
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=KINDS)
ROUNDING = 2.0**-8
"""Of a bf16 value, and a little more: results, and hidden values where all neurons are computed."""
ACCUMULATION = 2.0**-18
"""Sums in fp32, in any order, relative to the sum of magnitudes."""
SIZES = [(1, 1, 1), (64, 64, 64), (97, 61, 45), (70, 130, 129), (300, 2100, 40), (530, 66, 200)]
"""Neurons, columns of x, outputs: on either side of every block of columns, of neurons and of outputs."""
TOKENS = (0, 1, 2, 3, 8, 17, 64)


@dataclass
class Case:
    x: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down_t: torch.Tensor
    up_bias: torch.Tensor | None
    bias: torch.Tensor | None
    activation: Activation

    @classmethod
    def of(
        cls,
        sizes: tuple[int, int, int],
        tokens: int,
        activation: Activation,
        *,
        density: float = 0.3,
        bias: bool = False,
        seed: int = 0,
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        neurons, k, n = sizes
        opened = torch.rand(tokens, neurons, generator=generator) < density
        size = normal(tokens, neurons).abs()
        gate = torch.where(opened, size + activation.threshold, -size).bfloat16()
        up, down_t = normal(neurons, k) / k**0.5, normal(neurons, n) / max(1.0, density * neurons) ** 0.5
        biases = (normal(neurons).bfloat16(), normal(n).bfloat16()) if bias else (None, None)
        return cls(normal(tokens, k).bfloat16(), gate, up.bfloat16(), down_t.bfloat16(), *biases, activation)

    def run(self, isa: int = 0, way: int = CHOOSE) -> torch.Tensor:
        act = self.activation
        return torch.ops.spense.sparse_mlp_cpu(
            *(self.x, self.gate, self.up, self.down_t, self.up_bias, self.bias),
            *(KINDS.index(act.kind), act.threshold, isa, way),
        )

    def token(self, first: int, last: int) -> Case:
        return replace(self, x=self.x[first:last], gate=self.gate[first:last])

    def check(self, y: torch.Tensor, rounded: bool = True) -> None:
        """``rounded``: hidden values may have been, to bf16."""
        products = self.x.double() @ self.up.double().t()
        sizes = self.x.double().abs() @ self.up.double().abs().t()
        if self.up_bias is not None:
            products, sizes = products + self.up_bias.double(), sizes + self.up_bias.double().abs()
        down, kind = self.down_t.double(), self.activation.kind
        gate = torch.where(self.gate.double() > self.activation.threshold, self.gate.double(), 0.0)
        gate = gate.square() if kind == "relu2" else gate
        hidden = gate * (products.clamp_min(0) if kind == "drelu" else products)
        wanted = hidden @ down
        if self.bias is not None:
            wanted = wanted + self.bias.double()
        bound = ROUNDING * wanted.abs() + ACCUMULATION * ((gate * sizes) @ down.abs() + 1e-30)
        if rounded:
            bound += ROUNDING * (hidden.abs() @ down.abs())
        assert y.dtype == torch.bfloat16
        assert y.shape == wanted.shape
        assert bool(((y.double() - wanted).abs() <= bound).all())


@every_kernel
@every_way
@every_activation
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_float64(sizes: tuple[int, int, int], activation: Activation, way: int, isa: int) -> None:
    for tokens in TOKENS:
        case = Case.of(sizes, tokens, activation, bias=tokens % 2 == 1, seed=tokens)
        case.check(case.run(isa, way), rounded=way == ALL)


@every_kernel
@every_way
@pytest.mark.parametrize("sizes", [(0, 33, 65), (70, 0, 65), (70, 33, 0), (0, 0, 0)], ids=str)
def test_sizes_of_zero(sizes: tuple[int, int, int], way: int, isa: int) -> None:
    """Sums begin with zero, whatever the call before has left in memory."""
    for tokens in (1, 3, 20, 64):
        Case.of((70, 33, 65), tokens, ACTIVATIONS[0], density=1.0).run(isa, way)
        case = Case.of(sizes, tokens, ACTIVATIONS[0], bias=True)
        case.check(case.run(isa, way), rounded=way == ALL)


@every_kernel
@every_way
@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
def test_none_few_and_all_neurons_of_many_tokens(density: float, way: int, isa: int) -> None:
    """More tokens than one pass takes; at a density of 0 the bias alone is left."""
    case = Case.of((130, 96, 80), 600, ACTIVATIONS[0], density=density, bias=True)
    y = case.run(isa, way)
    case.check(y, rounded=way == ALL)
    if not density:
        assert case.bias is not None
        assert torch.equal(y, case.bias.expand_as(y))


@needs_kernels
def test_random_sizes_and_densities() -> None:
    generator = torch.Generator().manual_seed(20)
    for seed in range(1000):
        neurons, k, n, tokens, kind = (
            int(torch.randint(1, most, (), generator=generator))
            for most in (200, 150, 150, 40, len(KINDS) + 1)
        )
        density = float(torch.rand((), generator=generator)) ** 3
        case = Case.of((neurons, k, n), tokens - 1, ACTIVATIONS[kind - 1], density=density, seed=seed)
        case.check(case.run())


@every_kernel
@every_way
def test_rows_of_some_tokens_without_neurons_or_with_all(way: int, isa: int) -> None:
    case = Case.of((97, 64, 64), 9, ACTIVATIONS[0])
    case.gate[2] = -0.0
    case.gate[5] = 1.0
    y = case.run(isa, way)
    case.check(y, rounded=way == ALL)
    assert not y[2].any()


@every_kernel
@every_way
@every_activation
@pytest.mark.parametrize("sign", [0x7FC0, -0x40], ids=["NaN", "-NaN"])
def test_what_is_not_a_number_is_seen_in_its_token_only(
    sign: int, activation: Activation, way: int, isa: int
) -> None:
    case = Case.of((97, 64, 64), 9, activation)
    whole = case.run(isa, way)
    case.gate.view(torch.int16)[4, 7] = sign
    y = case.run(isa, way)
    assert y[4].isnan().all()
    y[4] = whole[4]
    assert torch.equal(y, whole)


@every_kernel
@every_way
def test_inputs_that_are_not_finite_are_seen_where_neurons_are_open(way: int, isa: int) -> None:
    case = Case.of((97, 64, 64), 4, ACTIVATIONS[0], density=0.5)
    case.x[1, 3] = float("nan")
    case.gate[2] = -1.0
    case.x[2, 3] = float("inf")
    y = case.run(isa, way)
    assert y[1].isnan().all()
    assert not y[2].any(), "what the gate closes is zero, whatever up is there"


@every_kernel
@every_way
def test_bits_do_not_depend_on_threads_or_chance(way: int, isa: int) -> None:
    case = Case.of((700, 500, 300), 33, ACTIVATIONS[1])
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            found.append(case.run(isa, way))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)


@every_kernel
@every_way
def test_a_tokens_bits_do_not_depend_on_its_company(way: int, isa: int) -> None:
    """Up to so many tokens that other tiles take them."""
    case = Case.of((300, 200, 100), 40, ACTIVATIONS[0])
    together = case.run(isa, way)
    for first, last in ((0, 1), (5, 7), (3, 19), (39, 40)):
        assert torch.equal(case.token(first, last).run(isa, way), together[first:last])


@needs_kernels
def test_the_way_follows_density_and_tokens() -> None:
    """Few active ones go by the neuron, whatever the batch; many of many tokens do not, few tokens always."""
    for tokens, density, way in ((64, 0.02, ACTIVE), (1, 1.0, ACTIVE), (64, 0.9, ALL)):
        case = Case.of((512, 256, 256), tokens, ACTIVATIONS[0], density=density)
        y = case.run()
        assert torch.equal(y, case.run(0, way))
    assert not torch.equal(y, case.run(0, ACTIVE)) or "avx512_bf16" not in sparse_mlp_cpu.isas()


@every_kernel
@every_way
def test_rows_may_lie_apart(way: int, isa: int) -> None:
    """Gates that are columns of a wider tensor, and x with an odd pitch."""
    case = Case.of((96, 60, 64), 70, ACTIVATIONS[0], density=0.5)
    wide = torch.full((70, 301), float("nan")).bfloat16()
    wide[:, 10:106], wide[:, 200:260] = case.gate, case.x
    apart = replace(case, gate=wide[:, 10:106], x=wide[:, 200:260])
    assert torch.equal(apart.run(isa, way), case.run(isa, way))


@every_kernel
@every_way
@pytest.mark.parametrize("sizes", [(97, 61, 45), (131, 98, 70)], ids=str)
def test_nothing_beside_a_tensor_is_used(sizes: tuple[int, int, int], way: int, isa: int) -> None:
    """Every tensor lies among NaN: a row or a column too many of any of them would be seen."""

    def among_nan(tensor: torch.Tensor) -> torch.Tensor:
        around = torch.full([size + 64 for size in tensor.shape], torch.nan, dtype=tensor.dtype)
        inside = around[tuple(slice(size) for size in tensor.shape)]
        return inside.copy_(tensor)

    for tokens in (1, 3, 20, 64, 130):
        case = Case.of(sizes, tokens, ACTIVATIONS[0], density=0.5, bias=True)
        tensors = {name: value for name, value in vars(case).items() if isinstance(value, torch.Tensor)}
        beside = replace(case, **{name: among_nan(value) for name, value in tensors.items()})
        assert torch.equal(beside.run(isa, way), case.run(isa, way))


@every_kernel
@every_way
def test_weights_whose_rows_lie_apart(way: int, isa: int) -> None:
    """As they are prepared where rows would fall into the same sets of the cache; few tokens and many."""
    sizes = neurons, k, n = 150, 1024, 2048
    for tokens in (5, 70, 130):
        case = Case.of(sizes, tokens, ACTIVATIONS[0], density=0.5)
        tensors = SparseMlpCpuBackend().prepare(
            SparseMlpSpec(k, neurons, n, ACTIVATIONS[0]), {"up": case.up, "down": case.down_t.t()}
        )
        up, down_t = tensors["up"], tensors["down_t"]
        assert (up.stride(), down_t.stride()) == ((k + 32, 1), (n + 32, 1))
        y = replace(case, up=up, down_t=down_t).run(isa, way)
        assert torch.equal(y, case.run(isa, way))
        case.check(y, rounded=way == ALL)


def changed(**change: Any) -> list[Any]:
    case = Case.of((32, 64, 48), 3, ACTIVATIONS[0], bias=True)
    usual: dict[str, Any] = {name: getattr(case, name) for name in ("x", "gate", "up", "down_t")}
    usual |= {"up_bias": case.up_bias, "bias": case.bias, "kind": 0, "threshold": 0.0, "isa": 0, "way": 0}
    assert usual.keys() >= change.keys()
    return list((usual | change).values())


@needs_kernels
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(3, 64)}, r"x must be a bf16 CPU tensor \[M, K\]"),
        ({"x": torch.zeros(64, 3).bfloat16().t()}, "x must be .* whose rows are contiguous"),
        ({"x": torch.zeros(3, 63).bfloat16()}, r"up must be .* \[I, K\]"),
        ({"gate": torch.zeros(2, 32).bfloat16()}, r"gate must be .* \[M, I\]"),
        ({"gate": torch.zeros(3, 31).bfloat16()}, r"gate must be .* \[M, I\]"),
        ({"down_t": torch.zeros(48, 32).bfloat16()}, r"down_t must be .* \[I, N\]"),
        ({"up_bias": torch.zeros(31).bfloat16()}, r"up_bias must be .* bf16 \[I\]"),
        ({"bias": torch.zeros(48)}, r"bias must be .* bf16 \[N\]"),
        ({"kind": 4}, "there is no activation 4"),
        ({"threshold": -1.0}, "threshold -1 must be a number from 0 on"),
        ({"threshold": float("nan")}, "threshold nan must be a number from 0 on"),
        ({"isa": 2}, "instruction set 2 is none that this CPU has kernels in"),
        ({"isa": 9}, "instruction set 9 is none that this CPU has kernels in"),
        ({"way": 3}, "there is no way 3"),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, dict) else "",
)
def test_wrong_arguments_are_refused(change: dict[str, Any], said: str) -> None:
    torch.ops.spense.sparse_mlp_cpu(*changed())
    with pytest.raises(RuntimeError, match=said):
        torch.ops.spense.sparse_mlp_cpu(*changed(**change))


@needs_kernels
def test_as_a_torch_operator() -> None:
    torch.library.opcheck(torch.ops.spense.sparse_mlp_cpu.default, tuple(changed()))


SPEC = SparseMlpSpec(64, 97, 48, ACTIVATIONS[1])


def prepared(backend: SparseMlpCpuBackend | SparseMlpReference, case: Case) -> dict[str, torch.Tensor]:
    assert case.up_bias is not None
    assert case.bias is not None
    tensors = {"up": case.up, "down": case.down_t.t(), "up_bias": case.up_bias, "bias": case.bias}
    return backend.prepare(SPEC, {name: tensor.clone() for name, tensor in tensors.items()})


@needs_kernels
def test_the_back_end() -> None:
    case = Case.of((97, 64, 48), 5, ACTIVATIONS[1], bias=True)
    backend = select_sparse_mlp(SPEC, CPU)
    assert isinstance(backend, SparseMlpCpuBackend)
    tensors = prepared(backend, case)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "up": (97, 64),
        "up_bias": (97,),
        "bias": (48,),
        "down_t": (97, 48),
    }
    x = case.x.t().contiguous().t()  # columns contiguous, and not rows
    case.check(backend.apply(SPEC, tensors, x, case.gate))
    reference = SparseMlpReference().apply(SPEC, prepared(SparseMlpReference(), case), case.x, case.gate)
    case.check(reference)


@needs_kernels
def test_compiled() -> None:
    """The operator is a node of a whole graph, for any number of tokens."""
    case = Case.of((97, 64, 48), 8, ACTIVATIONS[1], bias=True)
    backend = SparseMlpCpuBackend()
    tensors = prepared(backend, case)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def double(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return backend.apply(SPEC, tensors, x, gate) * 2

    for tokens in (8, 3, 5):
        here = case.token(0, tokens)
        assert torch.equal(double(here.x, here.gate), 2 * backend.apply(SPEC, tensors, here.x, here.gate))


def test_what_it_does_not_run() -> None:
    backend = SparseMlpCpuBackend()
    assert backend.why_not(SPEC, torch.device("cuda")) == "runs on CPUs, not on cuda"
    half = replace(SPEC, dtype=torch.float16)
    assert backend.why_not(half, CPU) == "the kernels take bf16 weights, not torch.float16"
    assert select_sparse_mlp(half, CPU).name == "reference"
    with pytest.raises(ValueError, match=r"'cpu' cannot run this layer: the kernels take bf16 weights"):
        select_sparse_mlp(half, CPU, "cpu")
