"""The Triton kernels for activation-sparse MLPs without a GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

import importlib.util
import random
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.mlps import ACTIVATIONS, Mlp, assert_within_rounding, mlp, words_of
from tests.ops.test_triton import SHARED_MEMORY, Target, interpreter, triton_cache  # noqa: F401
from vllm_spense.ops.mlp.activation import Activation
from vllm_spense.ops.mlp.many_tokens import most_tokens
from vllm_spense.ops.mlp.select import select_sparse_input, select_sparse_mlp
from vllm_spense.ops.mlp.sparse_input import SparseInputSpec, sparse_input_definition
from vllm_spense.ops.mlp.sparse_input_triton import SparseInputTritonBackend, triton_sparse_input
from vllm_spense.ops.mlp.sparse_mlp import SparseMlpSpec
from vllm_spense.ops.mlp.sparse_mlp_triton import SparseMlpTritonBackend
from vllm_spense.ops.mlp.twell import SHARES, TILES, TwellShape, overflowed

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

CUT_OFF = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
"""The interpreter cuts bf16 off where a GPU rounds."""
RELU = ACTIVATIONS[0]
ONE, SOME, ALL = "one tile", "some tiles", "all tiles"


def check(y: torch.Tensor, given: Mlp, activation: Activation) -> None:
    assert_within_rounding(y, given, activation, rounding=CUT_OFF[y.dtype])


def interpreted(given: Mlp, activation: Activation, shape: TwellShape) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and y, in the interpreting process."""
    from vllm_spense.ops.mlp import sparse_mlp_triton_kernel as kernel

    words = kernel.pack(given.gate, shape, activation.threshold)
    return words, kernel.multiply(*given.tensors(), activation, shape)  # type: ignore[arg-type]


def run(
    interpreter: ProcessPoolExecutor,  # noqa: F811
    given: Mlp,
    activation: Activation = RELU,
    tile: int = 256,
    share: int = 8,
) -> torch.Tensor:
    """y, which is checked, as are its words."""
    shape = TwellShape(given.gate.shape[1], tile, share)
    words, y = interpreter.submit(interpreted, given, activation, shape).result()
    if given.gate.dtype == torch.bfloat16:
        assert torch.equal(words, words_of(given.gate, activation, shape))
    check(y, given, activation)
    return y


# --- in Triton's interpreter ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
def test_every_activation(
    interpreter: ProcessPoolExecutor,  # noqa: F811
    activation: Activation,
    bias: bool,
    dtype: torch.dtype,
) -> None:
    run(interpreter, mlp(3, 72, 300, 40, 0.1, dtype, bias=bias), activation)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 16, 8, 8),
        (2, 1, 1, 1),
        (5, 33, 127, 65),
        (1, 520, 513, 130),
        (2, 24, 256, 64),
        (1, 1024, 384, 128),
    ],
    ids=str,
)
def test_ragged_sizes(interpreter: ProcessPoolExecutor, sizes: tuple[int, ...]) -> None:  # noqa: F811
    run(interpreter, mlp(*sizes, 0.1, bias=True, seed=sum(sizes)), share=4)


@pytest.mark.parametrize("sizes", [(0, 8, 40, 8), (2, 8, 0, 8), (2, 0, 40, 8), (2, 8, 40, 0)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_nothing(interpreter: ProcessPoolExecutor, sizes: tuple[int, ...], bias: bool) -> None:  # noqa: F811
    run(interpreter, mlp(*sizes, bias=bias))


def test_rows_of_zeros_and_rows_that_are_all_open(interpreter: ProcessPoolExecutor) -> None:  # noqa: F811
    given = mlp(4, 24, 300, 16, bias=True)
    given.gate[0] = 0.0
    given.gate[1] = -1.0
    given.gate[2] = 0.5
    y = run(interpreter, given)
    assert given.bias is not None
    assert torch.equal(y[:2], given.bias.expand(2, -1))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("which", [ONE, SOME, ALL])
def test_no_overflow_is_lost(
    interpreter: ProcessPoolExecutor,  # noqa: F811
    which: str,
    share: int,
    tile: int,
) -> None:
    given = mlp(2, 24, 3 * tile + 40, 16, 0.02, seed=tile + share)
    full = {ONE: [1], SOME: [0, 2], ALL: [0, 1, 2, 3]}[which]
    for which_tile in full:  # one more than fits, and all of the last, which is ragged
        columns = torch.arange(tile * which_tile, min(tile * (which_tile + 1), given.gate.shape[1]))
        given.gate[1, columns[: max(tile // share, 40)]] = 0.25
    words = words_of(given.gate, RELU, TwellShape(given.gate.shape[1], tile, share))
    expected = [len(set(full) - ({3} if tile // share > 40 else set())) > 0]
    assert overflowed(words, TwellShape(given.gate.shape[1], tile, share)).tolist() == [False, *expected]
    run(interpreter, given, tile=tile, share=share)


def test_a_full_tile_has_not_overflowed(interpreter: ProcessPoolExecutor) -> None:  # noqa: F811
    given = mlp(2, 24, 256, 16, 0.0)
    given.gate[0, 100:131] = 0.5
    given.gate[1, 100:132] = 0.5
    shape = TwellShape(256)
    assert overflowed(words_of(given.gate, RELU, shape), shape).tolist() == [False, True]
    run(interpreter, given)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
def test_nan_is_seen(interpreter: ProcessPoolExecutor, activation: Activation) -> None:  # noqa: F811
    """Of the gate in a packed tile and in one that has overflowed; of x where a neuron is open."""
    given = mlp(4, 24, 300, 16, 0.1)
    given.gate[0, 7] = given.gate[1, 7] = float("nan")
    given.gate[1, 20:100] = 0.5
    given.x[2, 3] = float("nan")
    y = run(interpreter, given, activation)
    assert y[:3].isnan().all()
    assert y[3].isfinite().all()


def test_a_gate_at_the_threshold_is_closed(interpreter: ProcessPoolExecutor) -> None:  # noqa: F811
    given = mlp(1, 8, 16, 8, 0.0)
    given.gate[0, :4] = torch.tensor([0.25, 0.2490234375, 0.251953125, float("inf")])
    run(interpreter, given, Activation("fatrelu", 0.25))
    words = words_of(given.gate, Activation("fatrelu", 0.25), TwellShape(16))
    assert int(words[0, 0, 0]) == 2


def test_a_token_does_not_see_the_others(interpreter: ProcessPoolExecutor) -> None:  # noqa: F811
    """The same bits alone, in a batch, and a second time."""
    given = mlp(3, 40, 600, 24, 0.15, bias=True)
    y = run(interpreter, given)
    assert torch.equal(y, run(interpreter, given))
    for token in range(3):
        assert torch.equal(y[token : token + 1], run(interpreter, given.token(token)))


def drawn(seed: int) -> tuple[Mlp, Activation, TwellShape]:
    """A case with other sizes, density and capacity; in every fourth one a tile has overflowed."""
    draw = random.Random(seed)
    features, neurons, outputs = draw.randint(1, 80), draw.randint(1, 420), draw.randint(1, 80)
    given = mlp(
        draw.choice((1, 1, 1, 2)),
        *(features, neurons, outputs),
        density=draw.choice((0.0, 0.005, 0.02, 0.1, 0.3, 0.6, 1.0)),
        dtype=draw.choice((torch.bfloat16, torch.bfloat16, torch.float16)),
        bias=draw.random() < 0.3,
        seed=seed,
    )
    if draw.random() < 0.25:
        first = draw.randrange(neurons)
        given.gate[0, first : first + draw.randint(20, 200)] = 0.5
    return given, draw.choice(ACTIVATIONS), TwellShape(neurons, draw.choice(TILES), draw.choice(SHARES))


def all_interpreted(seeds: range) -> list[tuple[torch.Tensor, torch.Tensor]]:
    from vllm_spense.ops.mlp import sparse_mlp_triton_kernel as kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "PROGRAMS", 1)  # no tile in parts: fewer programs to interpret
        return [interpreted(*drawn(seed)) for seed in seeds]


@pytest.mark.parametrize("start", range(0, 300, 60))
def test_random_cases(interpreter: ProcessPoolExecutor, start: int) -> None:  # noqa: F811
    seeds = range(start, start + 60)
    found = interpreter.submit(all_interpreted, seeds).result()
    over = 0
    for seed, (words, y) in zip(seeds, found, strict=True):
        given, activation, shape = drawn(seed)
        if given.gate.dtype == torch.bfloat16:
            assert torch.equal(words, words_of(given.gate, activation, shape)), seed
        over += int(overflowed(words, shape).sum())
        check(y, given, activation)
    assert over > 5


def refused(given: Mlp) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        interpreted(given, RELU, TwellShape(given.gate.shape[1]))
    return str(error.value)


def test_other_dtypes_are_refused(interpreter: ProcessPoolExecutor) -> None:  # noqa: F811
    given = mlp(1, 8, 16, 8)
    for change, message in (
        ({"x": given.x.float()}, "activations torch.float32 must be one of"),
        ({"gate": given.gate.half()}, "gate must be in the activations' torch.bfloat16, not torch.float16"),
        ({"up": given.up.float()}, "up must be"),
        ({"down_t": given.down_t.double()}, "down_t must be"),
    ):
        assert message in interpreter.submit(refused, replace(given, **change)).result()


# --- inputs of a plain layer ----------------------------------------------------------------------------


def of_inputs(
    x: torch.Tensor, weight_t: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    from vllm_spense.ops.mlp.sparse_mlp_triton_kernel import multiply_inputs

    return multiply_inputs(x, weight_t, bias, threshold)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("sizes", [(1, 40, 24), (3, 300, 65), (2, 5000, 9), (0, 40, 8), (2, 0, 8)], ids=str)
def test_sparse_inputs(
    interpreter: ProcessPoolExecutor,  # noqa: F811
    sizes: tuple[int, int, int],
    threshold: float,
    dtype: torch.dtype,
) -> None:
    tokens, features, outputs = sizes
    generator = torch.Generator().manual_seed(features)
    x = torch.randn(tokens, features, generator=generator).to(dtype)
    x[:, ::3] = 0
    weight_t = torch.randn(features, outputs, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    for given in (bias, None):
        y = interpreter.submit(of_inputs, x, weight_t, given, threshold).result()
        expected = sparse_input_definition(x.float(), weight_t, given, threshold)
        size = x.float().abs() @ weight_t.float().abs() + 1
        assert y.dtype == dtype
        assert ((y.float() - expected).abs() <= CUT_OFF[dtype] * expected.abs() + 2.0**-18 * size).all()


def test_an_input_that_is_nan_is_not_small(interpreter: ProcessPoolExecutor) -> None:  # noqa: F811
    x, weight_t = torch.zeros(2, 40, dtype=torch.float16), torch.ones(40, 8, dtype=torch.float16)
    x[0, 11] = float("nan")
    y = interpreter.submit(of_inputs, x, weight_t, None, 0.5).result()
    assert y[0].isnan().all()
    assert (y[1] == 0).all()


# --- the back ends --------------------------------------------------------------------------------------


def spec_of(given: Mlp, activation: Activation = RELU, **more: Any) -> SparseMlpSpec:
    neurons, features = given.up.shape
    return SparseMlpSpec(features, neurons, given.down_t.shape[1], activation, given.x.dtype, **more)


def applied(given: Mlp, activation: Activation, density: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """In the interpreting process: eager, and as one graph."""
    backend, spec = SparseMlpTritonBackend(), spec_of(given, activation, density=density)
    tensors = {"up": given.up, "down": given.down_t.t().contiguous()}
    tensors |= {name: t for name in ("up_bias", "bias") if (t := getattr(given, name)) is not None}
    ready = backend.prepare(spec, tensors)

    def forward(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return backend.apply(spec, ready, x, gate)

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    biases = ready.get("up_bias"), ready.get("bias")
    flat = (given.x, given.gate, ready["up"], ready["down_t"], *biases)
    flat += (activation.kind, activation.threshold, density)
    torch.library.opcheck(torch.ops.spense.triton_sparse_mlp.default, flat)
    return forward(given.x, given.gate), compiled(given.x, given.gate)


@pytest.mark.parametrize(("tokens", "density"), [(3, None), (3, 0.02), (40, 0.1), (9, 0.5), (2, 1.0)])
def test_back_end(interpreter: ProcessPoolExecutor, tokens: int, density: float | None) -> None:  # noqa: F811
    """Few tokens by the row, many by the matrix, which rounds what is between."""
    given = mlp(tokens, 40, 300, 24, density or 0.1, torch.float16, bias=True)
    eager, compiled = interpreter.submit(applied, given, ACTIVATIONS[1], density).result()
    assert torch.equal(eager, compiled)
    dense = tokens > most_tokens(density)
    assert dense == ((tokens, density) not in ((3, None), (3, 0.02)))
    assert_within_rounding(eager, given, ACTIVATIONS[1], accumulation=2.0**-9 if dense else 2.0**-20)


def input_applied(density: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    backend, spec = SparseInputTritonBackend(), SparseInputSpec(80, 24, 0.1, torch.float16, density)
    generator = torch.Generator().manual_seed(1)
    weight, x, bias = (torch.randn(shape, generator=generator).half() for shape in ((24, 80), (6, 80), (24,)))
    ready = backend.prepare(spec, weight)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return backend.apply(spec, ready, x, bias)

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    flat = (x, ready["weight_packed"], bias, 0.1, density)
    torch.library.opcheck(torch.ops.spense.triton_sparse_input_linear.default, flat)
    expected = sparse_input_definition(x.float(), ready["weight_packed"], bias, 0.1)
    return forward(x), compiled(x), expected


@pytest.mark.parametrize("density", [None, 0.05, 1.0])
def test_back_end_for_inputs(interpreter: ProcessPoolExecutor, density: float | None) -> None:  # noqa: F811
    eager, compiled, expected = interpreter.submit(input_applied, density).result()
    assert torch.equal(eager, compiled)
    torch.testing.assert_close(eager.float(), expected, rtol=2.0**-10, atol=2.0**-7)


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, cuda = SparseMlpTritonBackend(), torch.device("cuda", 0)
    spec = SparseMlpSpec(64, 65_535, 64, RELU)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert backend.why_not(spec, cuda) is None
    assert backend.why_not(replace(spec, dtype=torch.float16), cuda) is None
    assert "65536 neurons are beyond the 65535" in str(backend.why_not(replace(spec, neurons=65_536), cuda))
    assert "not torch.float32" in str(backend.why_not(replace(spec, dtype=torch.float32), cuda))
    assert "not on cpu" in str(backend.why_not(spec, torch.device("cpu")))
    assert select_sparse_mlp(spec, cuda).name == "triton"
    inputs, layer = SparseInputTritonBackend(), SparseInputSpec(70_000, 64)
    assert inputs.why_not(layer, cuda) is None
    assert "not torch.float32" in str(inputs.why_not(replace(layer, dtype=torch.float32), cuda))
    assert "not on cpu" in str(inputs.why_not(layer, torch.device("cpu")))
    assert select_sparse_input(layer, cuda).name == "triton"


def test_importing_the_back_ends_does_not_import_triton() -> None:
    code = "import sys, vllm_spense.ops.mlp.select; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_operator_runs_nowhere_else() -> None:
    """Outside of the interpreter Triton has no CPU."""
    with pytest.raises(RuntimeError):
        triton_sparse_input(torch.zeros(1, 8).half(), torch.zeros(8, 8).half(), None, 0.0)


# --- compiled without a GPU -----------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((2048, 5632, 2048), torch.bfloat16),
        ((4096, 11008, 4096), torch.float16),
        ((72, 1000, 40), torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.usefixtures("triton_cache")
def test_compiles(capability: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Rows are read 16 bytes at a time where their length allows it, and nothing is spilled or atomic."""
    given = mlp(1, *sizes, dtype=dtype, bias=True)
    for name, kernel in compiled(capability, given).items():
        ptx = kernel.asm["ptx"]
        assert not re.search(r"\b(atom|red)\.global", ptx), name
        assert not re.search(r"\.local\b", ptx), name
        assert kernel.metadata.shared <= SHARED_MEMORY
        assert len(kernel.asm["cubin"]) > 0
        if sizes[0] % 16 == 0 and name in ("_neurons", "_add"):
            assert re.search(r"ld\.global\S*\.v4\.b32", ptx), name


def compiled(capability: int, given: Mlp) -> dict[str, Any]:
    from triton.runtime.driver import driver

    from vllm_spense.ops.mlp import sparse_mlp_triton_kernel as kernel

    shape, activation = TwellShape(given.gate.shape[1]), ACTIVATIONS[1]
    words = torch.empty(1, shape.tiles, shape.words, dtype=torch.int32)
    lists = kernel.Lists.empty(given.gate, words, shape.words)
    y = torch.empty(1, given.down_t.shape[1], dtype=given.x.dtype)
    inputs = kernel.Lists.empty(given.x, torch.empty(1, 1, dtype=torch.int32), 1)
    launches = {
        kernel._pack: kernel.plan_pack(given.gate, words, shape, 0.25),
        kernel._neurons: kernel.plan_neurons(
            words, given.gate, given.x, given.up, given.up_bias, lists, shape, activation
        ),
        kernel._add: kernel.plan_add(lists, given.down_t, given.bias, y),
        kernel._list: kernel.plan_list(given.x, inputs, 0.25),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", Target(capability))
        return {
            jit.fn.__name__: jit.warmup(grid=launch.grid, **launch.arguments)
            for jit, launch in launches.items()
        }
