"""spense::linear against float64 loops written from the codec's definition."""

from __future__ import annotations

import pytest
import torch

from tests.layers import ROUNDING, Layer, assert_within_rounding, make_layer
from vllm_spense.format import FP8_DTYPE, Codecs, Layout, LinearFormat
from vllm_spense.format.layout import Split
from vllm_spense.ops import LinearArguments, dense_linear, quantize_per_token
from vllm_spense.ops.linear.op import linear
from vllm_spense.ops.linear.reference import decoded, full_weight
from vllm_spense.ops.linear.spec import LinearSpec

FULL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FP8_CHECKS = FULL[1:]
"""test_schema compares inputs by allclose, whose multiplication does not exist for fp8 on CPUs."""


def slow_matrix(layer: Layer) -> torch.Tensor:
    """Stored values as float64 ``[N, K]`` in output order: shard after shard, S then D, group by group."""
    rows: list[list[float]] = []
    for layout, tensors in zip(layer.layouts, layer.parts, strict=True):
        sparse: list[list[float]] = []
        if layout.sparse:
            values, meta = tensors["sparse_values"].double().tolist(), tensors["sparse_meta"].tolist()
            for row, row_meta in zip(values, meta, strict=True):
                full = [0.0] * (2 * len(row))
                for group in range(len(row) // 2):
                    nibble = row_meta[group // 2] >> 4 if group % 2 else row_meta[group // 2] & 15
                    full[4 * group + nibble % 4] = row[2 * group]
                    full[4 * group + nibble // 4] = row[2 * group + 1]
                sparse.append(full)
        dense: list[list[float]] = tensors["dense_weight"].double().tolist() if layout.dense else []
        if layout.split == "output":
            rows += sparse + dense
        else:
            count = layout.out_features
            left, right = sparse or [[]] * count, dense or [[]] * count
            rows += [a + b for a, b in zip(left, right, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def activations(
    tokens: int, features: int, weight_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(9)).bfloat16()
    return (x, None) if weight_dtype == torch.bfloat16 else quantize_per_token(x, weight_dtype)


SINGLE = [
    Layout("output", 24, 144, 8),
    Layout("output", 24, 144, 0),
    Layout("output", 24, 144, 24),
    Layout("output", 192, 576, 128),
    Layout("input", 24, 144, 56),
    Layout("input", 24, 144, 0),
    Layout("input", 24, 144, 144),
    Layout("input", 192, 576, 320),
]
FUSED = [
    [Layout("output", 24, 144, 8)] * 2,
    [Layout("output", 24, 144, 16), Layout("output", 40, 144, 8)],
    [Layout("output", 24, 144, 0), Layout("output", 24, 144, 24), Layout("output", 8, 144, 3)],
    [Layout("output", 192, 576, 128)] * 2,
    [Layout("input", 24, 144, 56), Layout("input", 8, 144, 56)],
]
CASES = [[x] for x in SINGLE] + FUSED
SMALL = [x for x in CASES if x[0].in_features < 576]
WEIGHTS = (FP8_DTYPE, torch.int8, torch.bfloat16)
LINEAR = torch.ops.spense.linear.default


def name(layouts: list[Layout]) -> str:
    return "+".join(f"{x.split}{x.out_features}x{x.in_features}s{x.sparse}" for x in layouts)


@pytest.mark.parametrize("weight_dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("layouts", CASES, ids=name)
def test_against_float64(layouts: list[Layout], weight_dtype: torch.dtype) -> None:
    """M 0, 1, 7 (large layers: 7) × bias × output dtype for every layout; both operators."""
    layer = make_layer(layouts, weight_dtype, bias=True)
    weight, given = slow_matrix(layer), layer.arguments()
    matrix = full_weight(given).float()
    assert torch.equal(matrix.double(), weight)
    for arguments in (given._replace(bias=None), given):
        for tokens in (0, 1, 7) if layouts in SMALL else (7,):
            x, x_scale = activations(tokens, layouts[0].in_features, weight_dtype)
            for out in ROUNDING:
                y = linear(x, x_scale, arguments, out)
                assert_within_rounding(y, x, x_scale, arguments, out, weight=weight)
                dense = dense_linear(x, x_scale, matrix, arguments.weight_scale, arguments.bias, out)
                assert torch.equal(dense, y)


@pytest.mark.parametrize("columns", [8, 1024, 1032, 5000])
@pytest.mark.parametrize("largest", [False, True])
def test_int8_sums_are_exact(columns: int, largest: bool) -> None:
    """Against a loop over Python's integers: the sum is rounded to fp32 once, then come scales and bias."""
    layer = make_layer([Layout("output", 6, columns, 4)], torch.int8, bias=True)
    given, generator = layer.arguments(), torch.Generator().manual_seed(5)
    x = torch.randint(-127, 128, (3, columns), generator=generator, dtype=torch.int8)
    if largest:  # all products of a dense row are 127², and next to it an even sum becomes an odd one
        given.dense_weight[0], x[0] = 127, 127
        given.dense_weight[0, 0] = 126
    x_scale = torch.rand(3, 1, generator=generator)
    y = linear(x, x_scale, given, torch.float32)
    rows, scales, bias = full_weight(given).tolist(), given.weight_scale, given.bias
    assert scales is not None
    assert bias is not None
    for token, values in enumerate(x.tolist()):
        for row, weights in enumerate(rows):
            total = sum(a * b for a, b in zip(values, weights, strict=True))
            expected = torch.tensor(total, dtype=torch.int32).float() * x_scale[token, 0] * scales[row]
            assert y[token, row] == expected + bias[row].float()
    dense = dense_linear(x, x_scale, full_weight(given).float(), scales, bias, torch.float32)
    assert torch.equal(dense, y)


def test_the_bound_notices_one_wrong_weight() -> None:
    layer = make_layer([Layout("output", 24, 144, 8)], FP8_DTYPE)
    x, x_scale = activations(7, 144, FP8_DTYPE)
    given = layer.arguments()
    y = linear(x, x_scale, given, torch.bfloat16)
    assert_within_rounding(y, x, x_scale, given, torch.bfloat16, weight=slow_matrix(layer))
    layer.parts[0]["sparse_meta"][3, 5] = 0xE4 if layer.parts[0]["sparse_meta"][3, 5] != 0xE4 else 0x4E
    with pytest.raises(AssertionError, match="times the bound"):
        assert_within_rounding(y, x, x_scale, given, torch.bfloat16, weight=slow_matrix(layer))


def test_gate_comes_before_up() -> None:
    """Fused order is S D of gate, then S D of up, although storage is S S then D D."""
    gate, up = Layout("output", 16, 8, 8), Layout("output", 16, 8, 8)
    layer = make_layer([gate, up], torch.bfloat16)
    x = torch.randn(3, 8).bfloat16()
    fused = linear(x, None, layer.arguments(), torch.float32)
    for i, rows in enumerate((slice(0, 16), slice(16, 32))):
        alone = Layer([layer.layouts[i]], [layer.parts[i]], torch.bfloat16, None)
        torch.testing.assert_close(fused[:, rows], linear(x, None, alone.arguments(), torch.float32))


@pytest.mark.parametrize("out", [torch.float64, torch.float8_e4m3fn, torch.int32], ids=str)
def test_other_output_dtypes_are_refused(out: torch.dtype) -> None:
    layer = make_layer([Layout("output", 24, 144, 8)], torch.bfloat16)
    with pytest.raises(ValueError, match="must be one of"):
        linear(torch.zeros(1, 144).bfloat16(), None, layer.arguments(), out)


def test_a_token_does_not_see_the_others() -> None:
    layer = make_layer([Layout("input", 24, 144, 56)], FP8_DTYPE)
    x, scale = activations(7, 144, FP8_DTYPE)
    assert scale is not None
    poisoned = x.clone()
    poisoned[1:] = 0x7F if poisoned.dtype == torch.uint8 else float("nan")
    y = linear(poisoned, scale, layer.arguments(), torch.float32)
    assert torch.isfinite(y[0]).all()
    assert not torch.isfinite(y[1:]).any()


OPCHECK = [[Layout("output", 24, 16, 8)] * 2, [Layout("input", 24, 16, 8)], [Layout("output", 24, 16, 0)]]


@pytest.mark.parametrize("layouts", OPCHECK, ids=name)
def test_opcheck(layouts: list[Layout]) -> None:
    layer = make_layer(layouts, torch.bfloat16, bias=True)
    x, _ = activations(5, 16, torch.bfloat16)
    given = layer.arguments()
    torch.library.opcheck(LINEAR, (x, None, *given.flat(), torch.bfloat16), test_utils=FULL)
    matrix = full_weight(given).float()
    scale, x_scale = torch.ones(matrix.shape[0]), torch.ones(5, 1)
    torch.library.opcheck(
        dense_linear, (x, x_scale, matrix, scale, layer.bias, torch.float16), test_utils=FULL
    )
    torch.library.opcheck(dense_linear, (x.float(), None, matrix, None, None, torch.float32), test_utils=FULL)


@pytest.mark.parametrize("layouts", OPCHECK, ids=name)
def test_opcheck_fp8(layouts: list[Layout]) -> None:
    layer = make_layer(layouts, FP8_DTYPE, bias=True)
    x, x_scale = activations(5, 16, FP8_DTYPE)
    given = layer.arguments()
    torch.library.opcheck(LINEAR, (x, x_scale, *given.flat(), torch.bfloat16), test_utils=FP8_CHECKS)
    matrix = full_weight(given).float()
    dense = (x, x_scale, matrix, given.weight_scale, given.bias, torch.float32)
    torch.library.opcheck(dense_linear, dense, test_utils=FP8_CHECKS)


@pytest.mark.parametrize("weight_dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("layouts", SMALL, ids=name)
def test_fake_implementations(layouts: list[Layout], weight_dtype: torch.dtype) -> None:
    """Shapes and dtypes on meta tensors equal the real ones."""
    layer = make_layer(layouts, weight_dtype, bias=True)
    for tokens in (0, 7):
        for out in ROUNDING:
            x, x_scale = activations(tokens, layouts[0].in_features, weight_dtype)
            real = layer.arguments()
            meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in (x, x_scale, *real)]
            y = linear(meta[0], meta[1], LinearArguments(*meta[2:]), out)
            assert y.device.type == "meta"
            assert (y.shape, y.dtype) == (linear(x, x_scale, real, out).shape, out)
            weight = torch.empty(sum(n.out_features for n in layouts), x.shape[1], device="meta")
            fake = dense_linear(meta[0], meta[1], weight, None, None, out)
            assert (fake.shape, fake.dtype) == (y.shape, out)


@pytest.mark.parametrize("split", ["output", "input"])
def test_compiled_equals_eager(split: Split) -> None:
    """Quantisation and both operators in one graph, without a break, for several batch sizes."""
    layer = make_layer([Layout(split, 24, 144, 16)], FP8_DTYPE, bias=True)
    given = layer.arguments()
    matrix, scale, bias = full_weight(given).float(), given.weight_scale, given.bias

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, x_scale = quantize_per_token(x * 2)
        y = linear(q, x_scale, given, x.dtype)
        return y, dense_linear(q, x_scale, matrix, scale, bias, x.dtype)

    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    for tokens in (2, 7, 19):
        x = torch.randn(tokens, 144, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        for ours, eager in zip(compiled(x), forward(x), strict=True):
            assert torch.equal(ours, eager)


def test_shards_that_lack_a_region_are_decoded_too() -> None:
    """Fused, in two codecs: each shard has the tensors of its own regions alone."""
    codecs = Codecs.of({"sparse": "nf4", "dense": "fp8"})
    layouts = [Layout("output", 64, 128, 0), Layout("output", 64, 128, 32), Layout("output", 64, 128, 64)]
    shards = [LinearFormat(layout, codecs) for layout in layouts]
    weights = [torch.randn(64, 128, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    for weight, layout in zip(weights, layouts, strict=True):
        weight[: layout.sparse].view(-1, 4)[:, 2:] = 0
    parts = [shard.encode(weight) for shard, weight in zip(shards, weights, strict=True)]
    names = dict.fromkeys(name for part in parts for name in part)
    fused = {name: torch.cat([part[name] for part in parts if name in part]) for name in names}
    expected = torch.cat([shard.decode(part) for shard, part in zip(shards, parts, strict=True)])
    assert torch.equal(decoded(LinearSpec.of(layouts, codecs), fused), expected)
