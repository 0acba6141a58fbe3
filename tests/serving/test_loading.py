"""What every tensor-parallel rank loads: together the ranks hold and compute exactly the full layer."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.layers import packed_part
from tests.toy_codec import CUT_ANYWHERE
from vllm_spense.format import FP8_DTYPE, CheckpointError, Codecs, Layout, LinearFormat, ModuleSpec
from vllm_spense.format.layout import Axis
from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.format.validate import check_values
from vllm_spense.ops.linear.op import dense_linear
from vllm_spense.ops.linear.random import fill_random
from vllm_spense.ops.linear.reference import decoded
from vllm_spense.serving.loading import Loaded, LoadPlan, check_heads, make_loader, make_plan

SIZES = (1, 2, 4, 8)
HIDDEN, HEAD_DIM = 48, 8
TOLERANCE = {"rtol": 1e-5, "atol": 1e-4}
"""fp32 sums of at most 176 products in another order."""


@dataclass
class Fused:
    """One vLLM layer: its modules with their stored tensors, and how vLLM partitions it."""

    layouts: dict[str, Layout]
    axis: Axis
    shard_ids: tuple[object, ...]
    heads: tuple[int, ...] = ()  # of q, k and v: key/value heads are replicated where ranks outnumber them
    bias: bool = True
    codec: str = "fp8"

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(len(self.layouts))
        self.tensors = {}
        for name, layout in self.layouts.items():
            self.tensors[name] = packed_part(layout, self.codec, generator)
            if self.bias:
                self.tensors[name]["bias"] = torch.randn(layout.out_features, generator=generator).bfloat16()

    @property
    def in_features(self) -> int:
        return next(iter(self.layouts.values())).in_features

    def parts(self, index: int, size: int) -> int:
        """Into how many parts one module is cut."""
        return min(size, self.heads[index]) if self.heads else size

    def plan(self, rank: int, size: int, promised: tuple[int, ...] = SIZES) -> LoadPlan:
        names = list(self.layouts)
        outputs = [
            layout.out_features // (self.parts(i, size) if self.axis == "output" else 1)
            for i, layout in enumerate(self.layouts.values())
        ]
        return make_plan(
            "fused",
            {n: ModuleSpec.of(self.layouts[n], self.bias) for n in names},
            Codecs.of(self.codec),
            list(promised),
            axis=self.axis,
            in_features=self.in_features,
            local_outputs=outputs,
            rank=rank,
            size=size,
        )

    def indices(self, index: int, rank: int, size: int) -> list[int]:
        """Rows (column parallel) or columns (row parallel) that one rank owns, by the definition."""
        layout = list(self.layouts.values())[index]
        parts = self.parts(index, size)
        part = rank // (size // parts)
        regions = [(0, layout.out_features if self.axis == "output" else layout.in_features)]
        if layout.split == self.axis:
            regions = [(0, layout.sparse), (layout.sparse, layout.dense)]
        owned: list[int] = []
        for start, extent in regions:
            owned += range(start + part * extent // parts, start + (part + 1) * extent // parts)
        return owned


KINDS = {
    "gate_up": lambda **k: Fused(
        {"gate": Layout("output", 96, HIDDEN, 64), "up": Layout("output", 96, HIDDEN, 64)},
        "output",
        (0, 1),
        **k,
    ),
    "gate_up of unlike extents": lambda **k: Fused(
        {"gate": Layout("output", 96, HIDDEN, 64), "up": Layout("output", 96, HIDDEN, 32)},
        "output",
        (0, 1),
        **k,
    ),
    "gate_up with empty regions": lambda **k: Fused(
        {"gate": Layout("output", 96, HIDDEN, 96), "up": Layout("output", 96, HIDDEN, 0)},
        "output",
        (0, 1),
        **k,
    ),
    "down": lambda **k: Fused({"down": Layout("input", HIDDEN, 176, 128)}, "input", (None,), **k),
    "down all sparse": lambda **k: Fused({"down": Layout("input", HIDDEN, 128, 128)}, "input", (None,), **k),
    "down all dense": lambda **k: Fused({"down": Layout("input", HIDDEN, 96, 0)}, "input", (None,), **k),
    "qkv": lambda **k: Fused(
        {n: Layout("output", h * HEAD_DIM, HIDDEN, 0) for n, h in (("q", 8), ("k", 2), ("v", 2))},
        "output",
        ("q", "k", "v"),
        (8, 2, 2),
        **k,
    ),
    "qkv with 2:4 regions": lambda **k: Fused(
        {n: Layout("output", h * HEAD_DIM, HIDDEN, h * 4) for n, h in (("q", 8), ("k", 2), ("v", 2))},
        "output",
        ("q", "k", "v"),
        (8, 2, 2),
        **k,
    ),
    "o_proj": lambda **k: Fused({"o": Layout("output", HIDDEN, 64, 0)}, "input", (None,), **k),
    "row parallel with 2:4 rows": lambda **k: Fused(
        {"o": Layout("output", HIDDEN, 64, 16)}, "input", (None,), **k
    ),
    "column parallel with 2:4 columns": lambda **k: Fused(
        {"x": Layout("input", 16, HIDDEN, 32)}, "output", (None,), **k
    ),
}


@dataclass
class Rank:
    """What one rank holds after loading."""

    plan: LoadPlan
    tensors: dict[str, torch.Tensor]
    loaded: Loaded

    def matrix(self) -> torch.Tensor:
        return decoded(self.plan.spec(), {name: self.tensors[name] for name in self.plan.names})

    def apply(self, x: torch.Tensor, bias: bool) -> torch.Tensor:
        vector = self.tensors["bias"] if bias else None
        return dense_linear(x, None, self.matrix(), None, vector, torch.float32)


def load(layer: Fused, rank: int, size: int, skip: tuple[str, str] | None = None) -> Rank:
    """Load all tensors of a layer as vLLM does: shard by shard, in the file's order."""
    plan = layer.plan(rank, size)
    names = [*plan.names, "bias"] if layer.bias else [*plan.names]
    parameters = {}
    for name in names:
        dtype = torch.float32 if name == "bias" else plan.dtype(name)
        data = torch.empty(plan.shape(name), dtype=dtype)
        data.view(torch.uint8).fill_(0xFF)  # NaN where nothing is loaded
        parameters[name] = torch.nn.Parameter(data, requires_grad=False)
    loaded: Loaded = set()
    for module, shard_id in zip(layer.layouts, layer.shard_ids, strict=True):
        for name, tensor in layer.tensors[module].items():
            if (module, name) != skip:
                make_loader(plan, name, loaded)(parameters[name], tensor, shard_id)
    return Rank(plan, {n: p.data for n, p in parameters.items()}, loaded)


def full_reference(layer: Fused, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of each module of the whole layer."""
    results = []
    for module, layout in layer.layouts.items():
        tensors = layer.tensors[module]
        weight = LinearFormat(layout, Codecs.of(layer.codec)).decode(tensors)
        results.append(x @ weight.T + (tensors["bias"].float() if layer.bias else 0))
    return results


@pytest.mark.parametrize("codec", CUT_ANYWHERE)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_holds_its_part_of_the_matrix(kind: str, size: int, codec: str) -> None:
    layer = KINDS[kind](codec=codec)
    seen: list[list[int]] = [[] for _ in layer.layouts]
    for rank in range(size):
        mine = load(layer, rank, size)
        mine.plan.check_complete(mine.loaded)
        check_values({n: mine.tensors[n] for n in mine.plan.names}, mine.plan.codecs, module="fused")
        rows = mine.matrix().split([m.local.out_features for m in mine.plan.modules])
        start = 0
        for i, (module, layout) in enumerate(layer.layouts.items()):
            owned = layer.indices(i, rank, size)
            seen[i] += owned
            tensors = layer.tensors[module]
            full = LinearFormat(layout, Codecs.of(layer.codec)).decode(tensors)
            assert torch.equal(rows[i], full[owned] if layer.axis == "output" else full[:, owned])
            for name in ("weight_scale", "bias"):
                if name in mine.tensors:
                    local = mine.tensors[name][start : start + len(rows[i])]
                    vector = tensors[name].float()
                    assert torch.equal(local, vector[owned] if layer.axis == "output" else vector), name
            start += len(rows[i])
    for i, layout in enumerate(layer.layouts.values()):
        extent = layout.out_features if layer.axis == "output" else layout.in_features
        assert sorted(seen[i]) == sorted(list(range(extent)) * (size // layer.parts(i, size)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_all_ranks_give_the_full_layer(kind: str, size: int) -> None:
    layer = KINDS[kind]()
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(7))
    expected = full_reference(layer, x)
    results = [torch.full_like(y, float("nan")) for y in expected]
    total = torch.zeros_like(expected[0])
    for rank in range(size):
        mine = load(layer, rank, size)
        if layer.axis == "input":
            total += mine.apply(x[:, layer.indices(0, rank, size)], bias=rank == 0)  # vLLM adds it once
            continue
        pieces = mine.apply(x, bias=True).split([m.local.out_features for m in mine.plan.modules], dim=1)
        for i, piece in enumerate(pieces):
            results[i][:, layer.indices(i, rank, size)] = piece
    for ours, full in zip([total] if layer.axis == "input" else results, expected, strict=True):
        torch.testing.assert_close(ours, full, **TOLERANCE)


@pytest.mark.parametrize("size", SIZES)
def test_a_whole_mlp_needs_no_permutation(size: int) -> None:
    """The outputs of a rank's gate and up are, in this order, the inputs of its down."""
    up = Fused({n: Layout("output", 176, HIDDEN, 128) for n in ("gate", "up")}, "output", (0, 1))
    down = KINDS["down"]()
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(8))

    def activate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(gate) * up / 64

    (expected,) = full_reference(down, activate(*full_reference(up, x)))
    total = torch.zeros_like(expected)
    for rank in range(size):
        gate_up = load(up, rank, size).apply(x, bias=True)
        total += load(down, rank, size).apply(activate(*gate_up.chunk(2, dim=1)), bias=rank == 0)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_whole_attention_needs_no_permutation(size: int) -> None:
    """A rank's query heads meet their own key/value heads, and come out in the order of its part of o."""
    heads = (16, 8, 8)  # half of each in S
    layouts = {
        name: Layout("output", count * HEAD_DIM, HIDDEN, count * HEAD_DIM // 2)
        for name, count in zip("qkv", heads, strict=True)
    }
    qkv = Fused(layouts, "output", ("q", "k", "v"), heads)
    o = Fused({"o": Layout("input", HIDDEN, 16 * HEAD_DIM, 8 * HEAD_DIM)}, "input", (None,))
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(9))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.view(len(y), -1, HEAD_DIM).transpose(0, 1) for y in (q, k, v))
        weights = (q @ k.repeat_interleave(2, 0).transpose(1, 2) / 8).softmax(-1)
        return (weights @ v.repeat_interleave(2, 0)).transpose(0, 1).flatten(1)

    (expected,) = full_reference(o, attend(*full_reference(qkv, x)))
    total = torch.zeros_like(expected)
    for rank in range(size):
        mine = load(qkv, rank, size)
        check_heads(mine.plan, HEAD_DIM)
        widths = [m.local.out_features for m in mine.plan.modules]
        local = attend(*mine.apply(x, bias=True).split(widths, dim=1))
        total += load(o, rank, size).apply(local, bias=rank == 0)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-3)


def required(kind: str) -> list[tuple[str, str, str]]:
    layer = KINDS[kind]()
    return [(kind, module, name) for module in layer.layouts for name in layer.tensors[module]]


@pytest.mark.parametrize(
    ("kind", "module", "name"), [c for k in ("gate_up", "down", "qkv") for c in required(k)]
)
def test_a_tensor_that_never_came_is_named(kind: str, module: str, name: str) -> None:
    mine = load(KINDS[kind](), 1, 2, skip=(module, name))
    message = (
        rf"module {module}, tensor {name}: the tensor was never loaded.*\(1 tensors of fused are missing\)"
    )
    with pytest.raises(CheckpointError, match=message) as caught:
        mine.plan.check_complete(mine.loaded)
    assert "Fix: " in str(caught.value)


def test_nothing_loaded_at_all() -> None:
    plan = KINDS["qkv"](bias=False).plan(0, 1)
    with pytest.raises(CheckpointError, match=r"module q, tensor dense_weight: .*\(6 tensors of fused"):
        plan.check_complete(set())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("sparse_values", torch.zeros(64, 20, dtype=FP8_DTYPE), r"shape \[64, 20\], expected \[64, 24\]"),
        ("sparse_values", torch.zeros(64, 24), "dtype torch.float32, expected torch.float8_e4m3fn"),
        ("sparse_meta", torch.zeros(64, 6, dtype=torch.int8), "dtype torch.int8, expected torch.uint8"),
        ("sparse_meta", torch.zeros(384, dtype=torch.uint8), r"shape \[384\], expected \[64, 6\]"),
        ("dense_weight", torch.zeros(33, 48, dtype=FP8_DTYPE), r"shape \[33, 48\], expected \[32, 48\]"),
        (
            "dense_weight",
            torch.zeros(32, 48).bfloat16(),
            "dtype torch.bfloat16, expected torch.float8_e4m3fn",
        ),
        ("weight_scale", torch.ones(96, 1), r"shape \[96, 1\], expected \[96\]"),
        ("weight_scale", torch.ones(96).bfloat16(), "dtype torch.bfloat16, expected torch.float32"),
        ("bias", torch.ones(1), r"shape \[1\], expected \[96\]"),
        ("bias", torch.ones(96, dtype=torch.int32), "dtype torch.int32, expected torch.bfloat16"),
    ],
)
def test_a_wrong_tensor_is_refused_before_it_is_copied(name: str, tensor: torch.Tensor, message: str) -> None:
    plan = KINDS["gate_up"]().plan(0, 2)
    target = torch.nn.Parameter(torch.zeros(plan.shape(name)), requires_grad=False)
    loaded: Loaded = set()
    with pytest.raises(CheckpointError, match=rf"module up, tensor {name}: {message}\. Fix: "):
        make_loader(plan, name, loaded)(target, tensor, 1)
    assert not target.any()
    assert not loaded


def test_tensors_that_the_config_denies_are_refused() -> None:
    plan = KINDS["qkv"](bias=False).plan(0, 1)
    target = torch.zeros(96)
    with pytest.raises(CheckpointError, match=r"module k, tensor bias: unexpected tensor: .* has no bias"):
        plan.copy("bias", target, torch.ones(16), "k")
    with pytest.raises(
        CheckpointError, match=r"tensor sparse_meta: unexpected tensor: .* this region is empty"
    ):
        plan.copy("sparse_meta", target, torch.zeros(0, 6, dtype=torch.uint8), "q")


@pytest.mark.parametrize(
    ("kind", "shard_id"),
    [("gate_up", x) for x in (None, 2, -1, "x", True, (0, 1), "v")]
    + [("qkv", None), ("down", 1), ("down", "k")],
)
def test_shard_ids(kind: str, shard_id: object) -> None:
    layer = KINDS[kind]()
    plan = layer.plan(0, 1)
    name = next(iter(layer.layouts))
    target = torch.zeros(plan.shape("weight_scale"))
    with pytest.raises(CheckpointError, match=r"module fused: shard id .* does not fit a layer of . parts"):
        plan.copy("weight_scale", target, layer.tensors[name]["weight_scale"], shard_id)
    assert not target.any()


@pytest.mark.parametrize("kind", ["gate_up", "down", "qkv with 2:4 regions"])
def test_a_size_that_was_not_promised_is_refused_by_name(kind: str) -> None:
    layer = KINDS[kind]()
    first = next(iter(layer.layouts))
    with pytest.raises(
        CheckpointError, match=rf"module {first}: tensor parallel size 2 is not .* \[1, 4\]"
    ) as caught:
        layer.plan(0, 2, promised=(1, 4))
    assert "--max-tp" in str(caught.value)


def test_dense_layers_need_no_promise() -> None:
    for kind in ("qkv", "o_proj"):
        assert KINDS[kind]().plan(0, 2, promised=(1,)).modules


@pytest.mark.parametrize(
    ("sparse", "sizes"),
    [
        ((4, 2, 2), {1, 2}),
        ((6, 3, 3), {1}),
        ((2, 2, 2), {1}),
        ((4, 2, 4), {1}),
        ((8, 4, 4), set(SIZES)),
        ((0, 0, 0), set(SIZES)),
    ],
)
def test_ranks_hold_whole_heads_that_belong_together(sparse: tuple[int, ...], sizes: set[int]) -> None:
    """Of 8 query and 4 key/value heads, so many in S; rows alone could be cut by every size."""
    heads = (8, 4, 4)
    layouts = {
        name: Layout("output", all_heads * HEAD_DIM, HIDDEN, some * HEAD_DIM)
        for name, all_heads, some in zip("qkv", heads, sparse, strict=True)
    }
    layer = Fused(layouts, "output", ("q", "k", "v"), heads)
    for size in SIZES:
        for rank in range(size):
            plan = layer.plan(rank, size)
            if size in sizes:
                check_heads(plan, HEAD_DIM)
                continue
            with pytest.raises(CheckpointError, match="inside a group of heads"):
                check_heads(plan, HEAD_DIM)


def spec_of(layout: Layout) -> ModuleSpec:
    return ModuleSpec.of(layout, False)


@pytest.mark.parametrize(
    ("specs", "arguments", "message"),
    [
        (
            {"down": Layout("input", 48, 208, 112)},
            {"axis": "input", "in_features": 208, "local_outputs": [48], "size": 4},
            "module down: cannot be cut into 4 .*28 input features, which is no multiple of 8",
        ),
        (
            {"gate": Layout("output", 90, 48, 62)},
            {"axis": "output", "in_features": 48, "local_outputs": [22], "size": 4},
            r"module gate: quantization_config says \[90, 48\], the model in config.json has \[88, 48\]",
        ),
        (
            {"gate": Layout("output", 96, 48, 62)},
            {"axis": "output", "in_features": 48, "local_outputs": [24], "size": 4},
            "module gate: cannot be cut into 4 .*62 2:4 output features cannot be cut into 4",
        ),
        (
            {"o": Layout("output", 48, 60, 0)},
            {"axis": "input", "in_features": 60, "local_outputs": [48], "size": 8},
            "module o: cannot be cut into 8 .*60 input features cannot be cut into 8",
        ),
        (
            {"gate": Layout("output", 96, 48, 64)},
            {"axis": "output", "in_features": 48, "local_outputs": [48, 48], "size": 2},
            "module fused: vLLM builds the layer from 2 parts, the checkpoint lists 1",
        ),
        (
            {"gate": Layout("output", 48, 48, 32), "up": Layout("input", 48, 48, 32)},
            {"axis": "output", "in_features": 48, "local_outputs": [48, 48], "size": 1},
            "module fused: the parts of a fused layer must have the same split",
        ),
        (
            {"gate": Layout("input", 48, 48, 16), "up": Layout("input", 48, 48, 32)},
            {"axis": "output", "in_features": 48, "local_outputs": [48, 48], "size": 1},
            "module fused: the parts of a fused layer must have the same split",
        ),
        (
            {"gate": Layout("output", 96, 48, 64)},
            {"axis": "output", "in_features": 64, "local_outputs": [96], "size": 1},
            r"module gate: quantization_config says \[96, 48\], the model in config.json has \[96, 64\]",
        ),
        (
            {"k": Layout("output", 48, 48, 0)},
            {"axis": "output", "in_features": 48, "local_outputs": [16], "size": 4},
            "module k: quantization_config says",  # 3 heads on 4 ranks
        ),
        (
            {"k": Layout("output", 8, 48, 0)},
            {"axis": "output", "in_features": 48, "local_outputs": [16], "size": 1},
            "module k: quantization_config says",
        ),
    ],
)  # fmt: skip
def test_extents_that_do_not_fit_the_model(specs: dict, arguments: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        make_plan(
            "fused", {n: spec_of(x) for n, x in specs.items()}, UNIFORM_FP8, [1, 2, 4, 8], rank=0, **arguments
        )
    assert "Fix: " in str(caught.value)


@pytest.mark.parametrize("codec", CUT_ANYWHERE)
@pytest.mark.parametrize("kind", KINDS)
def test_random_contents_are_valid(kind: str, codec: str) -> None:
    plan = KINDS[kind](codec=codec).plan(1, 2)
    tensors = {n: torch.full(plan.shape(n), 255).to(plan.dtype(n)) for n in plan.names}
    bias = torch.nn.Parameter(torch.full(plan.shape("bias"), float("nan")), requires_grad=False)
    fill_random(tensors, bias)
    check_values({**tensors, "bias": bias.data}, plan.codecs, module="fused")
    again = {n: torch.zeros_like(t) for n, t in tensors.items()}
    fill_random(again, None)
    for name, tensor in tensors.items():
        assert torch.equal(tensor.view(torch.uint8), again[name].view(torch.uint8)), "the same in every run"
        assert tensor.numel() == 0 or name == "weight_scale" or len(tensor.float().unique()) > 4, name


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_module_that_fills_several_parts(size: int) -> None:
    """Qwen3.5's linear attention: q, k and v are one tensor on disk, three parts of vLLM's layer beside z."""
    rows = {"q": 16, "k": 16, "v": 32, "z": 32}
    layouts = {name: Layout("output", count, HIDDEN, 0) for name, count in rows.items()}
    parts = Fused(layouts, "output", (0, 1, 2, 3), bias=False)
    joined = {name: torch.cat([parts.tensors[p][name] for p in "qkv"]) for name in parts.tensors["q"]}
    specs = {
        "qkv": ModuleSpec.of(Layout("output", 64, HIDDEN, 0), False),
        "z": ModuleSpec.of(layouts["z"], False),
    }

    def plan(rank: int, specs: dict[str, ModuleSpec] = specs) -> LoadPlan:
        outputs = [count // size for count in rows.values()]
        return make_plan(
            "fused",
            specs,
            UNIFORM_FP8,
            [1],
            axis="output",
            in_features=HIDDEN,
            local_outputs=outputs,
            rank=rank,
            size=size,
        )

    for rank in range(size):
        expected, mine = load(parts, rank, size), plan(rank)
        loaded: Loaded = set()
        for name, expected_values in expected.tensors.items():
            found = torch.nn.Parameter(torch.zeros(mine.shape(name), dtype=mine.dtype(name)), False)
            if name in joined:
                make_loader(mine, name, loaded)(found, joined[name], (0, 1, 2))
                make_loader(mine, name, loaded)(found, parts.tensors["z"][name], 3)
            assert torch.equal(found.float(), expected_values.float())
        mine.check_complete(loaded)
        with pytest.raises(CheckpointError, match="module qkv, tensor weight_scale: shape"):
            mine.copy("weight_scale", torch.zeros(96 // size), torch.zeros(63), (0, 1, 2))
    sparse = specs | {"qkv": ModuleSpec.of(Layout("output", 64, HIDDEN, 32), False)}
    for wrong in (sparse, {"qkv": specs["qkv"]}, specs | {"a": specs["z"]}):
        with pytest.raises(CheckpointError, match="builds the layer from 4 parts, the checkpoint lists"):
            plan(0, wrong)
