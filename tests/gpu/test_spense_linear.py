"""``spense::linear`` on CUDA devices, every legal kernel configuration, against float64.

One function per risk, simplest first: a failure further down means little while one further up fails.
`tools/gpu/command.py` runs each as a group of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from vllm_spense.format.codecs.fp8 import FP8_DTYPE
from vllm_spense.ops import LinearArguments, LinearSpec, extension, quantize_per_token, select_backend
from vllm_spense.ops.linear import cuda as back_end
from vllm_spense.ops.linear.configs import KernelConfig, label
from vllm_spense.ops.linear.op import linear
from vllm_spense.ops.linear.reference import decompressed

from .cases import (
    NAN,
    Layer,
    configs,
    grid,
    input_layer,
    make_layer,
    one_cta,
    output_layer,
    splits_k,
)
from .diagnosis import probe_columns, relative_error, wrong

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("device")]

Check = Callable[..., None]
DECODE = (8, 16, 32, 64, 128)
FP8_CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
"""All of opcheck but test_schema, which compares by allclose: not defined for FP8."""


def probe(layer: Layer, config: KernelConfig, tokens: int) -> str:
    """Which columns of W the kernel gets wrong: all of a small layer, else both ends and the seam."""
    k, spec = layer.spec.in_features, layer.spec
    seam = spec.sparse_sizes[0] if spec.split == "input" else None
    columns = set(range(k)) if k <= 512 else {*range(160), *range(k - 48, k)}
    if seam:
        columns |= {c for c in range(seam - 40, seam + 40) if 0 <= c < k}
    ones = torch.ones(tokens, 1, device=layer.scale.device)
    return probe_columns(
        lambda x: layer.run(config, x, ones, unit_scale=True),
        layer.weight,
        sorted(columns),
        tokens,
        seam,
    )


@pytest.fixture
def check(device: torch.device, kernels: None, record_property: Callable[[str, object], None]) -> Check:
    """Run one configuration into NaNs and compare; a failure says where and which columns."""

    def run(
        spec: LinearSpec,
        tokens: int,
        config: KernelConfig,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        layer = make_layer(spec, device)
        xq, xs = layer.inputs(tokens)
        b = layer.bias(dtype) if bias else None
        y = layer.run(config, xq, xs, bias=b, dtype=dtype)
        expected = layer.expected(xq, xs, b)
        record_property("error", relative_error(y, expected))
        if problem := wrong(y, expected):
            pytest.fail(f"{problem}\n{probe(layer, config, min(tokens, 64))}", pytrace=False)

    return run


ONE_TILE = {"128x256": output_layer(256, (128, 0)), "256x512": output_layer(512, (256, 0))}


@pytest.mark.parametrize(
    ("spec", "tokens", "config"),
    grid(ONE_TILE, DECODE, one_cta) + grid({"1024x5120": output_layer(5120, (1024, 0))}, (16, 128), one_cta),
)
def test_sparse_tile(check: Check, spec: LinearSpec, tokens: int, config: KernelConfig) -> None:
    check(spec, tokens, config)


DENSE_TILE = {
    "128x128": output_layer(128, (0, 128)),
    "256x512": output_layer(512, (0, 256)),
    "8+120x256": output_layer(256, (8, 120)),
}


@pytest.mark.parametrize(
    ("spec", "tokens", "config"),
    grid(DENSE_TILE, DECODE, one_cta) + grid({"1024x5120": output_layer(5120, (0, 1024))}, (16,), one_cta),
)
def test_dense_tile(check: Check, spec: LinearSpec, tokens: int, config: KernelConfig) -> None:
    check(spec, tokens, config)


OUTPUT = {"512+512": output_layer(2048, (512, 512)), "896+128": output_layer(1024, (896, 128))}


@pytest.mark.parametrize(("spec", "tokens", "config"), grid(OUTPUT, DECODE, one_cta))
def test_output_split(check: Check, spec: LinearSpec, tokens: int, config: KernelConfig) -> None:
    check(spec, tokens, config)


INPUT = {
    "256+128": input_layer(128, 256, 128),
    "1024+1024": input_layer(512, 1024, 1024),
    "1120+928": input_layer(512, 1120, 928),
    "1920+128": input_layer(512, 1920, 128),
    "2048+0": input_layer(512, 2048, 0),
    "128+1920": input_layer(512, 128, 1920),
}


@pytest.mark.parametrize(("spec", "tokens", "config"), grid(INPUT, (16, 64), one_cta))
def test_input_split(check: Check, spec: LinearSpec, tokens: int, config: KernelConfig) -> None:
    check(spec, tokens, config)


SHARDS = {
    "gate_up": output_layer(2048, (400, 200), (400, 200)),
    "qkv": output_layer(1024, (512, 512), (64, 64), (64, 64)),
    "unlike": output_layer(512, (128, 0), (0, 64), (200, 72), (8, 8)),
}


@pytest.mark.parametrize(("spec", "tokens", "config"), grid(SHARDS, (16, 128)))
def test_fused_shards(check: Check, spec: LinearSpec, tokens: int, config: KernelConfig) -> None:
    check(spec, tokens, config)


SPLIT_K = {
    "one stage": output_layer(256, (256, 0)),
    "two stages": input_layer(256, 256, 128),
    "rows": output_layer(2048, (700, 300)),
    "columns": input_layer(512, 1120, 928),
    "long": input_layer(192, 6400, 6400),
}


@pytest.mark.parametrize(("spec", "tokens", "config"), grid(SPLIT_K, DECODE, splits_k))
def test_split_k(check: Check, spec: LinearSpec, tokens: int, config: KernelConfig) -> None:
    check(spec, tokens, config)


MULTICAST = {
    "sparse": output_layer(256, (128, 0)),
    "dense": output_layer(256, (0, 128)),
    "gate_up": output_layer(1024, (640, 320), (640, 320)),
    "columns": input_layer(640, 1120, 928),
}


@pytest.mark.parametrize(
    ("spec", "tokens", "config"), grid(MULTICAST, (128, 130, 256, 700), lambda c: c.multicast)
)
def test_multicast(check: Check, spec: LinearSpec, tokens: int, config: KernelConfig) -> None:
    check(spec, tokens, config)


RAGGED = {
    "72x400": output_layer(400, (40, 32)),
    "777x1936": output_layer(1936, (500, 277)),
    "1001x2080": output_layer(2080, (301, 200), (300, 200)),
    "130x3200": input_layer(130, 1120, 2080),
    "200x1040": input_layer(200, 8, 1032),
    "1000x16": output_layer(16, (600, 400)),
}


@pytest.mark.parametrize(("spec", "tokens", "config"), grid(RAGGED, (1, 3, 13, 17, 50, 130, 300)))
def test_ragged(check: Check, spec: LinearSpec, tokens: int, config: KernelConfig) -> None:
    check(spec, tokens, config)


PLAIN = {"rows": output_layer(2048, (700, 300)), "columns": input_layer(512, 1120, 928)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("spec", "tokens", "config"),
    grid(PLAIN, (16, 130), lambda c: c.kernel == "sm90" and c.cluster in (1, 4)),
)
def test_bias_and_output_dtypes(
    check: Check, spec: LinearSpec, tokens: int, config: KernelConfig, bias: bool, dtype: torch.dtype
) -> None:
    check(spec, tokens, config, bias=bias, dtype=dtype)


MANY = {"gate_up": output_layer(512, (8000, 4000), (8000, 4000)), "columns": input_layer(20000, 512, 256)}


@pytest.mark.parametrize(("spec", "tokens", "config"), grid(MANY, (8, 64, 520)))
def test_many_tiles(check: Check, spec: LinearSpec, tokens: int, config: KernelConfig) -> None:
    """More tiles than multiprocessors: every cluster works off a list."""
    check(spec, tokens, config)


@pytest.mark.parametrize(
    ("spec", "tokens", "config"), grid({k: RAGGED[k] for k in ("777x1936", "130x3200")}, (13, 130))
)
def test_nothing_else_is_written(
    device: torch.device, kernels: None, spec: LinearSpec, tokens: int, config: KernelConfig
) -> None:
    """Canaries in front of the output and behind it stay."""
    layer, guard = make_layer(spec, device), 64
    canary = torch.full((tokens + 2 * guard, spec.out_features), 77.0, dtype=torch.bfloat16, device=device)
    y = canary[guard : guard + tokens]
    xq, xs = layer.inputs(tokens)
    layer.run(config, xq, xs, y=y)
    assert canary[:guard].eq(77).all()
    assert canary[guard + tokens :].eq(77).all()
    assert (problem := wrong(y, layer.expected(xq, xs))) is None, problem


@pytest.mark.parametrize(("spec", "tokens", "config"), grid(PLAIN, (16, 300)) + grid(MANY, (64,)))
def test_repeated_runs_give_the_same_bits(
    device: torch.device, kernels: None, spec: LinearSpec, tokens: int, config: KernelConfig
) -> None:
    layer = make_layer(spec, device)
    xq, xs = layer.inputs(tokens)
    first = layer.run(config, xq, xs)
    others = [layer.run(config, xq, xs) for _ in range(12)]
    differ = [int((first.view(torch.int16) != other.view(torch.int16)).sum()) for other in others]
    assert not any(differ), f"elements that differ from the first run, per run: {differ}"


@pytest.mark.parametrize(("spec", "tokens", "config"), grid(PLAIN, (16, 130)))
def test_graph_replay(
    cuda: torch.device, kernels: None, spec: LinearSpec, tokens: int, config: KernelConfig
) -> None:
    """Captured once, replayed on other activations in the same buffers."""
    layer = make_layer(spec, cuda)
    xq, xs = layer.inputs(tokens)
    y = layer.run(config, xq, xs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.run(config, xq, xs, y=y)
    for seed in (1, 2):
        for static, new in zip((xq, xs), layer.inputs(tokens, seed), strict=True):
            static.copy_(new)
        y.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        assert (problem := wrong(y, layer.expected(xq, xs))) is None, problem


@pytest.mark.parametrize(("spec", "tokens", "config"), grid({"rows": PLAIN["rows"]}, (16, 130)))
def test_side_stream(
    cuda: torch.device, kernels: None, spec: LinearSpec, tokens: int, config: KernelConfig
) -> None:
    """The kernel goes to the current stream: it waits for what is queued there, and only there."""
    layer, stream = make_layer(spec, cuda), torch.cuda.Stream()
    right, xs = layer.inputs(tokens)
    xq = torch.zeros_like(right)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        xq.copy_(right)
        y = layer.run(config, xq, xs)
    stream.synchronize()
    assert (problem := wrong(y, layer.expected(xq, xs))) is None, problem


CHAIN = {"rows": output_layer(2048, (1400, 648)), "columns": input_layer(2048, 1120, 928)}


@pytest.mark.parametrize(("spec", "tokens", "config"), grid(CHAIN, (1, 16, 256)))
def test_chain_in_a_graph(
    cuda: torch.device, kernels: None, spec: LinearSpec, tokens: int, config: KernelConfig
) -> None:
    """Six layers, each behind the kernels that quantise its input: started early, they must still wait."""
    layers = [make_layer(spec, cuda, seed) for seed in range(6)]
    outputs = [torch.empty(tokens, spec.out_features, dtype=torch.bfloat16, device=cuda) for _ in layers]
    x = torch.zeros(tokens, spec.in_features, dtype=torch.bfloat16, device=cuda)

    def forward(after: Callable[[], object]) -> None:
        hidden = x
        for layer, y in zip(layers, outputs, strict=True):
            xq, xs = quantize_per_token(hidden)
            after()
            layer.run(config, xq, xs, y=y)
            after()
            hidden = y

    forward(lambda: None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward(lambda: None)
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        forward(torch.cuda.synchronize)  # no kernel overlaps another one
        expected = [y.clone() for y in outputs]
        for run in (graph.replay, partial(forward, lambda: None)):
            for y in outputs:
                y.fill_(NAN)
            run()
            torch.cuda.synchronize()
            for depth, (y, want) in enumerate(zip(outputs, expected, strict=True)):
                assert torch.equal(y, want), f"layer {depth} of the chain differs from the serial run"


@pytest.mark.parametrize(("spec", "tokens", "config"), grid(CHAIN, (16, 256)))
def test_back_to_back_calls_into_one_output(
    cuda: torch.device, kernels: None, spec: LinearSpec, tokens: int, config: KernelConfig
) -> None:
    """The second call may start early, but it may not write before the first has written."""
    first, second = (make_layer(spec, cuda, seed) for seed in range(2))
    xq, xs = first.inputs(tokens)
    want = second.run(config, xq, xs)
    torch.cuda.synchronize()
    for _ in range(20):
        y = first.run(config, xq, xs)
        second.run(config, xq, xs, y=y)
        assert torch.equal(y, want)


@pytest.mark.parametrize("tokens", [1, 7, 64, 300])
@pytest.mark.parametrize("spec", [SHARDS["gate_up"], INPUT["1120+928"], RAGGED["777x1936"]], ids=str)
def test_operator(cuda: torch.device, kernels: None, spec: LinearSpec, tokens: int) -> None:
    """``torch.ops.spense.linear`` picks a configuration itself; a bias of another dtype is converted."""
    if not configs(spec, tokens):
        pytest.skip("no kernel is compiled for this device")
    layer = make_layer(spec, cuda)
    xq, xs = layer.inputs(tokens)
    bias = layer.bias(torch.float32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        y = torch.ops.spense.linear(xq, xs, *layer.arguments(bias).flat(), dtype)
        assert y.dtype == dtype
        expected = layer.expected(xq, xs, bias if dtype == torch.float32 else bias.to(dtype))
        assert (problem := wrong(y, expected)) is None, problem


def test_no_tokens(cuda: torch.device, kernels: None) -> None:
    layer = make_layer(SHARDS["gate_up"], cuda)
    xq, xs = layer.inputs(3)
    y = linear(xq[:0], xs[:0], layer.arguments(), torch.bfloat16)
    assert y.shape == (0, layer.spec.out_features)


@pytest.mark.parametrize("spec", [SHARDS["gate_up"], INPUT["1120+928"]], ids=str)
def test_checkpoint_layout_runs_the_definition(cuda: torch.device, spec: LinearSpec) -> None:
    layer = make_layer(spec, cuda)
    xq, xs = layer.inputs(9)
    y = linear(xq, xs, layer.on(cuda), torch.float32)
    assert relative_error(y, layer.expected(xq, xs)) < 1e-5


@pytest.mark.parametrize("spec", [SHARDS["gate_up"], INPUT["1120+928"]], ids=str)
def test_back_end(cuda: torch.device, kernels: None, spec: LinearSpec) -> None:
    """What a model calls: selected, prepared once, quantising its own activations."""
    if not configs(spec, 1):
        pytest.skip("no kernel is compiled for this device")
    layer = make_layer(spec, cuda)
    backend, reference = select_backend(spec, cuda, "cuda"), select_backend(spec, cuda, "reference")
    t = {name: tensor.to(cuda) for name, tensor in layer.checkpoint.items()}
    x = torch.randn(33, spec.in_features, device=cuda, dtype=torch.bfloat16)
    y = backend.apply(spec, backend.prepare(spec, t), x, None)
    assert (problem := wrong(y, reference.apply(spec, reference.prepare(spec, t), x, None))) is None, problem


@pytest.mark.parametrize("spec", [SHARDS["gate_up"], INPUT["1120+928"]], ids=str)
def test_opcheck(cuda: torch.device, kernels: None, spec: LinearSpec) -> None:
    layer = make_layer(spec, cuda)
    xq, xs = layer.inputs(5)
    call = (xq, xs, *layer.arguments(layer.bias(torch.bfloat16)).flat(), torch.bfloat16)
    torch.library.opcheck(torch.ops.spense.linear.default, call, test_utils=FP8_CHECKS)


def test_compiled(cuda: torch.device, kernels: None) -> None:
    """Quantisation and kernel in one graph for several batch sizes.

    Inductor may divide in another way, which moves a value to the next FP8 number here and there.
    """
    layers = [make_layer(spec, cuda) for spec in (SHARDS["gate_up"], input_layer(512, 800, 400))]

    def forward(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            q, scale = quantize_per_token(x * 2)
            x = linear(q, scale, layer.arguments(), x.dtype)
        return x

    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    for tokens in (2, 7, 300):
        x = torch.randn(tokens, 2048, generator=torch.Generator().manual_seed(tokens)).bfloat16().to(cuda)
        ours, eager = compiled(x), forward(x)
        assert relative_error(ours, eager) < 2e-2


def test_calls_that_make_no_sense_are_refused(cuda: torch.device, kernels: None) -> None:
    """Each names what is wrong; none reaches the device."""
    layer = make_layer(SHARDS["gate_up"], cuda)
    config = configs(layer.spec, 16)[0]
    xq, xs = layer.inputs(16)
    good = layer.arguments()
    values, meta, dense, *_ = good
    y = torch.full((16, layer.spec.out_features), NAN, dtype=torch.bfloat16, device=cuda)
    call: dict[str, Any] = {"x": xq, "x_scale": xs, "y": y}
    wrong_calls: list[tuple[str, dict[str, Any]]] = [
        ("x must be a CUDA tensor", {"x": xq.cpu()}),
        ("x has the wrong dtype", {"x": xq.bfloat16()}),
        ("x must be contiguous", {"x": xq.view(torch.uint8).T.contiguous().T.view(FP8_DTYPE)}),
        ("multiple of 16", {"x": xq.view(torch.uint8)[:, :2040].contiguous().view(FP8_DTYPE)}),
        ("x_scale must be", {"x_scale": xs[:3]}),
        ("x_scale must be", {"x_scale": xs.double()}),
        ("y must be", {"y": y[:, :64].contiguous()}),
        ("y must be", {"y": y[:3]}),
        ("bf16, fp16 or fp32", {"y": y.double()}),
        ("sparse_meta must be contiguous with 3", {"sparse_meta": layer.checkpoint["sparse_meta"].to(cuda)}),
        ("sparse_meta must be a CUDA tensor", {"sparse_meta": meta.cpu()}),
        ("block layout", {"sparse_meta": meta[:4].contiguous()}),
        ("sparse_values must be", {"sparse_values": values[:64].contiguous()}),
        ("dense_weight must be", {"dense_weight": dense[:64].contiguous()}),
        ("region sizes sum", {"sparse_sizes": [400, 408]}),
        ("fused shards", {"sparse_sizes": [160] * 5, "dense_sizes": [80] * 5}),
        ("bias must be", {"bias": layer.bias(torch.float32)}),
        ("bias must be", {"bias": layer.bias(torch.bfloat16).cpu()}),
        ("no tensor", {"dense_weight": dense[:0]}),
    ]
    for message, change in wrong_calls:
        others = call | {name: change.pop(name) for name in call if name in change}
        with pytest.raises((RuntimeError, ValueError), match=message):
            back_end.run(config, layer=good._replace(**change), **others)
    impossible = KernelConfig("sm90", 128, 24)
    with pytest.raises(RuntimeError, match="refused the call"):
        back_end.run(impossible, layer=good, **call)
    with pytest.raises(ValueError, match="scales"):
        linear(xq, None, good, torch.bfloat16)
    torch.cuda.synchronize()
    assert y.isnan().all(), "a refused call wrote something"


ACCURACY = {"5120": output_layer(5120, (512, 512)), "25600": input_layer(512, 12800, 12800)}


@pytest.mark.parametrize(("spec", "tokens", "config"), grid(ACCURACY, (16, 256)))
def test_no_less_accurate_than_a_dense_fp8_product(
    cuda: torch.device,
    kernels: None,
    record_property: Callable[[str, object], None],
    spec: LinearSpec,
    tokens: int,
    config: KernelConfig,
) -> None:
    """torch's row-wise FP8 product with fast accumulation on the same weights, zeros written out."""
    layer = make_layer(spec, cuda)
    xq, xs = layer.inputs(tokens)
    twin = decompressed(spec, layer.checkpoint).to(FP8_DTYPE).to(cuda)
    dense = torch._scaled_mm(
        xq, twin.t(), xs, layer.scale[None], out_dtype=torch.bfloat16, use_fast_accum=True
    )
    expected = layer.expected(xq, xs)
    ours = relative_error(layer.run(config, xq, xs), expected)
    theirs = relative_error(dense, expected)
    record_property("error", ours)
    record_property("dense_error", theirs)
    assert ours <= 1.05 * theirs, f"ours {ours:.3e}, dense {theirs:.3e}"


SMALL = {
    "sparse": output_layer(512, (128, 0)),
    "dense": output_layer(256, (0, 128)),
    "rows": output_layer(512, (72, 64)),
    "columns": input_layer(72, 256, 144),
}


@pytest.mark.parametrize(
    ("spec", "tokens", "config"),
    grid(SMALL, (13,), lambda c: c.cluster <= 2)
    + grid({"rows": SMALL["rows"]}, (130,), lambda c: c.cluster <= 2),
)
def test_small_cases_for_the_sanitizer(
    device: torch.device, kernels: None, spec: LinearSpec, tokens: int, config: KernelConfig
) -> None:
    """Small enough for compute-sanitizer: one launch each, compared on the CPU."""
    layer = make_layer(spec, torch.device("cpu"))
    xq, xs = layer.inputs(tokens)
    y = torch.full((tokens, spec.out_features), NAN, dtype=torch.bfloat16).to(device)
    given = (t.to(device) if isinstance(t, torch.Tensor) else t for t in layer.arguments())
    there = LinearArguments(*given)
    x_there, scale_there = xq.to(device), xs.to(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    back_end.run(config, x_there, scale_there, there, y)
    assert (problem := wrong(y.cpu(), layer.expected(xq, xs))) is None, problem


def test_the_library_matches_this_checkout(cuda: torch.device) -> None:
    """The operators that the package calls exist in the compiled extension."""
    assert extension.why_not_loaded() is None
    assert hasattr(torch.ops.spense, "linear_sm90")
    for config in configs(SMALL["rows"], 16):
        if config.kernel == "sm90":
            shape = (config.tile_rows, config.tile_tokens, config.cluster, config.multicast)
            assert torch.ops.spense.sm90_clusters(*shape) >= 1, label(config)
