"""spense::linear_cpu, every instruction set that this CPU has, against the definition."""

from __future__ import annotations

import mmap
import os
import platform
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from _pytest.mark import ParameterSet

from tests.layers import assert_within_rounding, make_layer
from vllm_spense.format import FP8_DTYPE, Codecs, Layout
from vllm_spense.ops import LinearArguments, quantize_per_token, select_backend
from vllm_spense.ops.linear import cpu
from vllm_spense.ops.linear.cpu import ISAS, interleave
from vllm_spense.ops.linear.reference import OUT_DTYPES, full_weight, reference_linear

CPU = torch.device("cpu")
BUILT = (
    (platform.system(), platform.machine()) == ("Linux", "x86_64")
    and shutil.which("g++") is not None
    and os.environ.get("SPENSE_CPU") != "0"
)
REASON = cpu.why_not_here()
needs_kernels = pytest.mark.skipif(REASON is not None, reason=str(REASON))


class Kernel(NamedTuple):
    """Of which weights, and by which instructions."""

    dtype: torch.dtype
    isa: int


def kernels(codec: str, dtype: torch.dtype) -> list[ParameterSet]:
    return [
        pytest.param(Kernel(dtype, i), id=f"{codec}-{name}", marks=needs_kernels)
        for i, name in enumerate(ISAS, 1)
        if REASON or name in cpu.isas(codec)
    ]


FP8, INT8 = kernels("fp8", FP8_DTYPE), kernels("int8", torch.int8)
every_fp8_kernel = pytest.mark.parametrize("kernel", FP8)
every_int8_kernel = pytest.mark.parametrize("kernel", INT8)
every_kernel = pytest.mark.parametrize("kernel", [*FP8, *INT8])
TOKENS = (0, 1, 2, 3, 7, 8, 17, 30, 47)
"""Each size of a block of tokens, on either side of where weights are widened first."""
SHAPES = [
    [Layout("output", 24, 144, 8)],
    [Layout("output", 48, 50, 0)],
    [Layout("output", 16, 40, 16)],
    [Layout("input", 24, 144, 56)],
    [Layout("input", 40, 61, 24)],
    [Layout("input", 17, 64, 64)],
    [Layout("input", 24, 144, 0)],
    [Layout("output", 24, 144, 16), Layout("output", 40, 144, 8)],
    [Layout("output", 24, 144, 0), Layout("output", 24, 144, 24), Layout("output", 8, 144, 3)],
    [Layout("output", 96, 1104, 64)] * 2,
    [Layout("input", 64, 2080, 1032)],
]


def name(layouts: list[Layout]) -> str:
    return "+".join(f"{x.split}{x.out_features}x{x.in_features}s{x.sparse}" for x in layouts)


class Layer:
    """A layer in the checkpoint's layout whose tensors a test may change."""

    def __init__(self, layouts: list[Layout], dtype: torch.dtype = FP8_DTYPE) -> None:
        layer = make_layer(layouts, dtype)
        self.spec, self.given = layer.spec, layer.arguments()

    def twin(self) -> Layer:
        """The same weights without a 2:4 region."""
        twin = object.__new__(Layer)
        n, k = self.spec.out_features, self.spec.in_features
        twin.spec = replace(self.spec, split="output", sparse_sizes=(0,), dense_sizes=(n,))
        tensors = {
            "sparse_values": torch.empty(0, k // 2, dtype=self.given.sparse_values.dtype),
            "sparse_meta": torch.empty(0, k // 8, dtype=torch.uint8),
            "dense_weight": full_weight(self.given),
        }
        scale = self.given.weight_scale
        assert scale is not None
        twin.given = LinearArguments.of(twin.spec, tensors | {"weight_scale": scale})
        return twin

    def strips(self) -> LinearArguments:
        """What the kernels take; the layer itself stays as it is."""
        values, meta, dense = (tensor.clone() for tensor in self.given[:3])
        copied = self.given._replace(sparse_values=values, sparse_meta=meta, dense_weight=dense)
        return interleave(self.spec, copied)

    def run(self, x: torch.Tensor, bias: torch.Tensor | None = None, isa: int = 0) -> torch.Tensor:
        layer = self.strips()._replace(bias=bias)
        return torch.ops.spense.linear_cpu(x, *layer.compiled(), isa)

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        return reference_linear(*self.quantized(x), self.given, x.dtype)

    def quantized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_per_token(x, self.given.dense_weight.dtype)


def tokens(m: int, k: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_extension_is_there() -> None:
    """Its tests are not skipped where it can be built; where it cannot, its absence is no error."""
    if BUILT:
        assert "not built" not in str(REASON)
        assert "does not load" not in str(REASON)
    assert FP8
    assert INT8


@every_kernel
@pytest.mark.parametrize("layouts", SHAPES, ids=name)
def test_against_float64(layouts: list[Layout], kernel: Kernel) -> None:
    layer = Layer(layouts, kernel.dtype)
    n, k = layer.spec.out_features, layer.spec.in_features
    for out in OUT_DTYPES:
        for m in TOKENS:
            x = tokens(m, k, out)
            bias = tokens(1, n, out, seed=2)[0] if m % 2 else None
            y = layer.run(x, bias, kernel.isa)
            assert_within_rounding(y, *layer.quantized(x), layer.given._replace(bias=bias), out)


@every_kernel
@pytest.mark.parametrize("layouts", [x for x in SHAPES if any(y.sparse for y in x)], ids=name)
def test_zeros_written_out_change_no_bit(layouts: list[Layout], kernel: Kernel) -> None:
    """Why a Spense model and its dense twin say the same tokens."""
    layer = Layer(layouts, kernel.dtype)
    for m in TOKENS:
        x = tokens(m, layer.spec.in_features, torch.float32)
        assert torch.equal(layer.run(x, None, kernel.isa), layer.twin().run(x, None, kernel.isa))


@every_kernel
@pytest.mark.parametrize("layouts", SHAPES, ids=name)
def test_a_tokens_bits_do_not_depend_on_its_company(layouts: list[Layout], kernel: Kernel) -> None:
    """Batch invariance: whatever else is in the step, and how many tokens are quantised at a time."""
    layer = Layer(layouts, kernel.dtype)
    x = tokens(400, layer.spec.in_features, torch.float32)
    together = layer.run(x, None, kernel.isa)
    assert torch.allclose(together, layer.reference(x), rtol=1e-4, atol=1e-4)
    for m in (*TOKENS, 97):
        for first in (0, 384, 5):
            assert torch.equal(layer.run(x[first : first + m], None, kernel.isa), together[first : first + m])


def set_every_nibble(meta: torch.Tensor) -> None:
    nibbles = torch.tensor([0x4, 0x8, 0xC, 0x9, 0xD, 0xE])
    pick = torch.arange(meta.numel()).reshape(meta.shape)
    meta.copy_((nibbles[pick % 6] | nibbles[pick // 6 % 6] << 4).to(torch.uint8))


@every_int8_kernel
@pytest.mark.parametrize("layouts", SHAPES, ids=name)
def test_int8_sums_are_exact(layouts: list[Layout], kernel: Kernel) -> None:
    """The definition's bits, in every instruction set."""
    layer = Layer(layouts, kernel.dtype)
    for m in TOKENS:
        x = tokens(m, layer.spec.in_features, torch.float32)
        assert torch.equal(layer.run(x, None, kernel.isa), layer.reference(x))


@every_int8_kernel
@pytest.mark.parametrize("split", ["output", "input"])
@pytest.mark.parametrize("m", [1, 48])
def test_every_int8_weight_and_position(split: str, m: int, kernel: Kernel) -> None:
    layout = Layout(split, 512, 32, 256 if split == "output" else 16)
    layer = Layer([layout], kernel.dtype)
    legal = torch.arange(-127, 128).to(torch.int8)
    for region in (layer.given.sparse_values, layer.given.dense_weight):
        region.copy_(legal[torch.arange(region.numel()).reshape(region.shape[::-1]).T % 255])
    set_every_nibble(layer.given.sparse_meta)
    for column in range(32):
        x = torch.zeros(m, 32)
        x[:, column] = 127.0 if column % 2 else -127.0
        assert torch.equal(layer.run(x, None, kernel.isa), layer.reference(x))


@every_fp8_kernel
@pytest.mark.parametrize("split", ["output", "input"])
@pytest.mark.parametrize("m", [1, 48])
def test_every_weight_and_position(split: str, m: int, kernel: Kernel) -> None:
    """Each of the 254 finite bytes at each position of a group, in either region; one product is exact."""
    finite = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
    layout = Layout(split, 512, 32, 256 if split == "output" else 16)
    layer = Layer([layout])
    for region in (layer.given.sparse_values, layer.given.dense_weight):
        region.view(torch.uint8).copy_(
            finite[torch.arange(region.numel()).reshape(region.shape[::-1]).T % 254]
        )
    set_every_nibble(layer.given.sparse_meta)
    for column in range(32):
        x = torch.zeros(m, 32)
        x[:, column] = 448.0
        assert torch.equal(layer.run(x, None, kernel.isa), layer.reference(x))


@every_fp8_kernel
@pytest.mark.parametrize("m", [1, 48])
def test_subnormals_where_the_thread_flushes_them(m: int, kernel: Kernel) -> None:
    """e4m3's subnormals are ordinary numbers; the CPU must never see them as fp32's."""
    layer = Layer([Layout("output", 32, 64, 16)])
    for region in (layer.given.sparse_values, layer.given.dense_weight):
        region.view(torch.uint8).bitwise_and_(0x87).bitwise_or_(1)
    x = tokens(m, 64, torch.float32)
    wanted = layer.reference(x)
    assert wanted.count_nonzero() == wanted.numel()
    torch.set_flush_denormal(True)
    try:
        assert torch.allclose(layer.run(x, None, kernel.isa), wanted, rtol=1e-5, atol=1e-7)
    finally:
        torch.set_flush_denormal(False)


def identity(k: int) -> Layer:
    """A layer whose sums are the quantised activations."""
    layer = Layer([Layout("output", k, k, 0)])
    layer.given.dense_weight.copy_(torch.eye(k).to(FP8_DTYPE))
    layer.given = layer.given._replace(weight_scale=torch.ones(k))
    return layer


@every_fp8_kernel
@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_activations_are_quantised_as_everywhere(dtype: torch.dtype, kernel: Kernel) -> None:
    """Random numbers over the whole range, ties, subnormals of e4m3, tiny, huge and empty tokens."""
    x = tokens(64, 160, torch.float32)
    x[:16] *= 2.0 ** torch.linspace(-12, 6, 160)
    grid = torch.arange(0, 256).to(torch.uint8).view(FP8_DTYPE).float().nan_to_num(0)
    x[16, 0], x[16, 1:129] = 448, (grid[:128] + grid[1:129]) / 2  # halfway between neighbours, scale 1
    x[17, 0], x[17, 1:129] = -448, grid[128:]
    x[18] *= 1e-7
    x[19] *= 1e4
    x[20] = 0
    x = x.to(dtype)
    q, scale = quantize_per_token(x)
    assert torch.equal(identity(160).run(x, None, kernel.isa), (q.float() * scale).to(dtype))
    assert torch.equal(identity(160).run(x[16:21], None, kernel.isa), (q.float() * scale).to(dtype)[16:21])


@every_fp8_kernel
def test_quotients_are_rounded_as_a_division_rounds_them(kernel: Kernel) -> None:
    """Next to ties between e4m3 values, where the last bit of activation / scale decides, of many scales."""
    significands = torch.randint(0, 1 << 23, (480,), generator=torch.Generator().manual_seed(2))
    significands[:16] = (1 << 23) - 1 - torch.arange(16)  # all ones, and next to it
    scales = (significands.int() + (127 << 23)).view(torch.float32)
    grid = torch.arange(0, 127).to(torch.uint8).view(FP8_DTYPE).float()
    ties = torch.cat([torch.tensor([448.0, 0.0]), (grid[:-1] + grid[1:]) / 2])
    x = ties * scales[:, None]
    q, scale = quantize_per_token(x)
    assert (x / scale != ties).sum() > 1000  # not only ties
    assert torch.equal(identity(128).run(x, None, kernel.isa), q.float() * scale)


@every_int8_kernel
@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_activations_become_int8_as_everywhere(dtype: torch.dtype, kernel: Kernel) -> None:
    """Ties, tiny, huge and empty tokens, of columns that no vector divides."""
    x = tokens(40, 161, torch.float32)
    x[:16] *= 2.0 ** torch.linspace(-12, 6, 161)
    x[16] = torch.arange(161) / 2 - 40
    x[16, 0] = 127
    x[17], x[18], x[19] = x[17] * 1e-7, x[18] * 1e4, 0
    x = x.to(dtype)
    layer = Layer([Layout("output", 161, 161, 0)], torch.int8)
    layer.given.dense_weight.copy_(torch.eye(161))
    layer.given = layer.given._replace(weight_scale=torch.ones(161))
    q, scale = quantize_per_token(x, torch.int8)
    assert torch.equal(layer.run(x, None, kernel.isa), (q.float() * scale).to(dtype))


@every_kernel
@pytest.mark.parametrize("m", [1, 40])
def test_what_is_not_finite_is_seen_in_its_token_only(m: int, kernel: Kernel) -> None:
    x = tokens(m + 2, 64)
    x[0, 3], x[1, 3] = float("nan"), float("inf")
    layer = Layer([Layout("output", 32, 64, 16)], kernel.dtype)
    y = layer.run(x, None, kernel.isa)
    assert y[:2].isnan().all()
    assert torch.equal(y[2:], layer.run(torch.cat([x[-1:], x[-1:], x[2:]]), None, kernel.isa)[2:])


@needs_kernels
def test_weights_are_rearranged_in_place_where_they_fit() -> None:
    for layout, moved in ((Layout("output", 64, 64, 32), 0), (Layout("output", 40, 64, 8), 2)):
        layer = Layer([layout])
        places = [region.data_ptr() for region in layer.given[:3]]
        packed = interleave(layer.spec, layer.given)
        assert sum(p.data_ptr() not in places for p in packed[:3]) in (moved, 3 * bool(moved))
        assert packed.dense_weight.numel() == -(-layout.dense // 16) * 16 * 64


@needs_kernels
def test_huge_pages_change_nothing_but_where_bytes_lie() -> None:
    """Views into the middle of memory, and too little of it for a page, too."""
    for size, start in ((9 << 20, 0), ((5 << 20) + 3, 12345), (1000, 0), (0, 0)):
        memory = torch.randint(0, 256, (start + size,), dtype=torch.uint8)
        copy = memory.clone()
        for touched in (False, True):
            torch.ops.spense.huge_pages_cpu(memory[start:], touched)
            assert torch.equal(memory, copy)


def huge_bytes(address: int) -> int:
    """Bytes of huge pages in the mapping that holds an address."""
    mappings = re.findall(
        r"^([0-9a-f]+)-([0-9a-f]+) .*?^AnonHugePages: +(\d+) kB",
        Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace"),
        re.MULTILINE | re.DOTALL,
    )
    return next(int(kb) << 10 for low, high, kb in mappings if int(low, 16) <= address < int(high, 16))


def gives_huge_pages() -> bool:
    """Whether Linux moves memory to huge pages when it is asked: 6.1 and later, where there are free ones."""
    collapse = 25  # MADV_COLLAPSE
    with mmap.mmap(-1, 8 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(bytes(8 << 20))
        try:
            memory.madvise(collapse)
        except OSError:
            return False
    return cpu._huge_pages_wanted()


@needs_kernels
@pytest.mark.skipif(not gives_huge_pages(), reason="this machine gives no huge pages")
def test_large_layers_lie_in_huge_pages() -> None:
    packed = Layer([Layout("output", 16384, 4096, 64)]).strips()
    assert huge_bytes(packed.dense_weight.data_ptr() + (4 << 20)) > 0  # as many as there are


@needs_kernels
@pytest.mark.skipif(not gives_huge_pages(), reason="this machine gives no huge pages")
def test_new_memory_comes_as_huge_pages() -> None:
    memory = torch.empty(64 << 20, dtype=torch.uint8)
    cpu.ask_for_huge_pages(memory)
    memory.fill_(1)
    assert huge_bytes(memory.data_ptr() + (4 << 20)) > 0


@needs_kernels
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(2, 64).half().double()}, "x must be bf16, fp16 or fp32"),
        ({"x": torch.zeros(64, 2).T}, "x must be a contiguous CPU tensor"),
        ({"x": torch.zeros(2, 80)}, "sparse_values must be .* interleaved"),
        ({"sparse_meta": torch.zeros(16, 4, dtype=torch.uint8)}, "sparse_meta must be .* interleaved"),
        ({"dense_weight": torch.zeros(16, 48, dtype=torch.uint8)}, "dense_weight must be .* interleaved"),
        ({"bias": torch.zeros(32).bfloat16()}, "bias must be .* in the dtype of x"),
        ({"weight_scale": torch.ones(32).double()}, "weight_scale must be .* fp32"),
        ({"sparse_sizes": [16, 0]}, "one size of each region per fused shard"),
        ({"dense_sizes": [8]}, "region sizes sum to 24, not to 32"),
        ({"sparse_sizes": [-16], "dense_sizes": [48]}, "a region of -16 and 48 is not within 0 to 32"),
        ({"sparse_sizes": [2**62, 16], "dense_sizes": [2**62, 16]}, "is not within 0 to 32"),
        ({"isa": 9}, "instruction set 9 is none that this CPU has kernels in"),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, dict) else "",
)
def test_wrong_arguments_are_refused(change: dict[str, object], said: str) -> None:
    layer = Layer([Layout("output", 32, 64, 16)])
    arguments = {"x": torch.zeros(2, 64), **layer.strips()._asdict(), "isa": 0}
    del arguments["layout"]
    assert arguments.keys() > change.keys()
    with pytest.raises(RuntimeError, match=said):
        torch.ops.spense.linear_cpu(*(arguments | change).values())


@needs_kernels
def test_as_a_torch_operator() -> None:
    layer = Layer([Layout("output", 32, 64, 16)])
    strips = layer.strips()._replace(bias=tokens(1, 32)[0])
    torch.library.opcheck(torch.ops.spense.linear_cpu.default, (tokens(5, 64), *strips.compiled()))


@needs_kernels
def test_the_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer([Layout("input", 32, 64, 16)])
    backend = select_backend(layer.spec, CPU)
    assert backend.name == "cpu"
    x = tokens(64, 5).T  # not contiguous
    expected = reference_linear(*quantize_per_token(x), layer.arguments(), x.dtype)
    y = backend.apply(layer.spec, backend.prepare(layer.spec, layer.tensors()), x, None)
    assert torch.allclose(y, expected)
    bf16 = replace(layer.spec, codecs=Codecs.of("bf16"))
    assert "take FP8 or INT8 weights, not bf16" in str(backend.why_not(bf16, CPU))
    monkeypatch.setattr(cpu, "why_not_here", lambda: "the CPU extension is not built")
    assert select_backend(layer.spec, CPU).name == "cpu-fp32"
