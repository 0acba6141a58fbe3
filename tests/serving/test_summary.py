"""The start-up log block: what it counts, when it is logged, and why a layer fell back."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import make_spense
from vllm_spense.format import Checkpoint, Codecs, Layout
from vllm_spense.format.codecs import codec_names
from vllm_spense.format.online import online_layout, prune_and_pack
from vllm_spense.format.report import inspect
from vllm_spense.ops import LinearSpec
from vllm_spense.ops.linear import cpu
from vllm_spense.ops.linear.cuda import CudaBackend
from vllm_spense.ops.linear.select import preferred_backend, select_backend
from vllm_spense.ops.linear.triton import TritonBackend
from vllm_spense.serving.layers.method import SpenseMethod
from vllm_spense.serving.runtime import choose
from vllm_spense.serving.summary import LayerFacts, LoadSummary, SparsitySummary, describe

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GATE_UP = LinearSpec("output", 2 * 96, 48, (64, 64), (32, 32))
DOWN = LinearSpec("input", 48, 96, (64,), (32,))
ATTENTION = LinearSpec("output", 32, 48, (0,), (32,))


@pytest.fixture
def blocks() -> Iterator[list[str]]:
    """What was logged at INFO; vLLM's loggers do not propagate."""
    records: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.spense")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


def facts(
    spec: LinearSpec = DOWN,
    prefix: str = "layers.0.mlp.down_proj",
    backend: str = "cpu",
    why: str | None = None,
) -> LayerFacts:
    return LayerFacts(prefix, spec, backend, why, 1 << 20)


def named(chosen: tuple[Any, str | None]) -> tuple[str, str | None]:
    """The name of what was chosen, and the reason."""
    return chosen[0].name, chosen[1]


def test_bytes_and_counts_by_hand() -> None:
    """gate_up holds 128 + 64 rows of 48, down 64 + 32 columns of 48 rows; 4 bytes of scale per row."""
    specs = {"0.mlp.gate_up_proj": GATE_UP, "0.mlp.down_proj": DOWN, "0.self_attn.o_proj": ATTENTION}
    layers = [facts(spec, name) for name, spec in specs.items()] * 40
    scales = 4 * (192 + 48 + 32)
    stored = 128 * 48 * 5 // 8 + 64 * 48 + 64 * 48 * 5 // 8 + 32 * 48 + 32 * 48 + scales
    dense = 192 * 48 + 48 * 96 + 32 * 48 + scales
    assert describe(layers, 3).splitlines() == [
        "Spense: 120 linear layers: 80 hybrid (2:4 + dense), 40 all-dense FP8; 3 more left unquantized",
        "  mean dense ratio of the hybrid MLP layers: 0.333",
        f"  weights on this rank: {40 * stored / 2**20:.2f} MiB, as dense FP8 {40 * dense / 2**20:.2f} MiB "
        f"({1 - stored / dense:.1%} saved); 120.00 MiB in memory",
        "  back ends: cpu 120",
        f"  CPU kernels: {cpu.describe_cpu()}",
    ]


def test_the_mean_dense_ratio_is_that_of_mlp_weights() -> None:
    """gate_up has twice the weights of down; attention and all-dense layers do not count."""
    half = LinearSpec("input", 48, 96, (48,), (48,))
    attention = LinearSpec("output", 32, 48, (32,), (0,))
    layers = [facts(GATE_UP), facts(half), facts(attention, "layers.0.self_attn.o_proj"), facts(ATTENTION)]
    assert f"MLP layers: {(2 / 3 + 1 / 2) / 3:.3f}\n" in describe(layers, 0)
    assert "dense ratio" not in describe([facts(ATTENTION)], 0)


@pytest.mark.parametrize("codec", codec_names())
def test_bytes_are_those_of_inspect(codec: str, tiny_llama: Path, tmp_path: Path) -> None:
    directory = make_spense(tiny_llama, tmp_path / "spense", codec=codec)
    modules, codecs = Checkpoint(directory).require_spense().modules, Codecs.of(codec)
    layers = [facts(LinearSpec.of([s.layout()], codecs), f"{name}.") for name, s in modules.items()]
    report = inspect(directory)
    assert f"{report.stored_bytes / 2**20:.2f} MiB, as dense" in describe(layers, 0)
    assert f"{codecs.single.title} {report.dense_bytes / 2**20:.2f} MiB" in describe(layers, 0)
    assert f"layers: {report.dense_ratio:.3f}\n" in describe(layers, 0)


def test_one_line_per_reason() -> None:
    layers = [facts(backend="cuda")] * 5 + [facts(backend="vllm-fp8", why="in_features 72")] * 2
    layers += [facts(backend="vllm-fp8", why="no 2:4 region")] * 3
    assert describe(layers, 0).splitlines()[3:] == [
        "  back ends: cuda 5, vllm-fp8 5",
        "  fell back to vllm-fp8: 3, no 2:4 region",
        "  fell back to vllm-fp8: 2, in_features 72",
    ]


def test_one_block_when_the_last_layer_is_loaded(blocks: list[str]) -> None:
    summary, layers = LoadSummary(), [torch.nn.Module() for _ in range(3)]
    for layer in layers:
        summary.expect(layer)
    summary.skip(plain := torch.nn.Module())
    for layer in layers:
        assert blocks == []
        summary.add(layer, facts())
    assert len(blocks) == 1
    assert "3 linear layers" in blocks[0]
    assert "1 more left unquantized" in blocks[0]
    assert isinstance(plain, torch.nn.Module)


def test_a_reload_logs_nothing_and_counts_nothing_twice(blocks: list[str]) -> None:
    summary, layers = LoadSummary(), [torch.nn.Module() for _ in range(2)]
    for layer in layers:
        summary.expect(layer)
    for layer in layers * 3:
        summary.add(layer, facts())
    assert len(blocks) == 1
    summary.expect(draft := torch.nn.Module())  # a draft model that shares the config
    summary.add(draft, facts())
    assert ["2 linear layers" in blocks[0], "3 linear layers" in blocks[1]] == [True, True]


def test_layers_that_are_thrown_away_are_not_waited_for(blocks: list[str]) -> None:
    """A model may build layers and drop them: other stages of a pipeline, unused towers."""
    summary, kept = LoadSummary(), torch.nn.Module()
    dropped = [torch.nn.Module() for _ in range(2)]
    for layer in (kept, *dropped):
        summary.expect(layer)
    summary.skip(dropped[0])
    del dropped, layer
    gc.collect()
    summary.add(kept, facts())
    assert [block.splitlines()[0] for block in blocks] == [
        "Spense: 1 linear layers: 1 hybrid (2:4 + dense), 0 all-dense FP8; 0 more left unquantized"
    ]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_another_process_and_a_copy_start_empty(duplicate: Any, blocks: list[str]) -> None:
    """Two configs, as those of a model and of its draft model, never count each other's layers."""
    from vllm_spense.serving.config import SpenseConfig

    config = SpenseConfig()
    config.summary.expect(waiting := torch.nn.Module())
    other = duplicate(config)
    other.summary.expect(layer := torch.nn.Module())
    other.summary.add(layer, facts())
    assert "1 linear layers" in blocks[-1]
    blocks.clear()
    config.summary.add(waiting, facts())
    assert "1 linear layers" in blocks[-1]


class PackedMethod(SpenseMethod):
    """Both linear methods without vLLM's model: a layer whose tensors are there already."""

    def create_weights(self, layer: Any, *arguments: Any, **more: Any) -> None:
        layer.weight = torch.nn.Parameter(torch.randn(48, 96), requires_grad=False)
        self.created(layer, ("weight",))

    def collect(self, layer: Any) -> tuple[LinearSpec, dict[str, torch.Tensor]]:
        return DOWN, prune_and_pack(layer.weight.data, Layout("input", 48, 96, 64))


def test_a_linear_method_reports_what_runs_the_layer(blocks: list[str], monkeypatch) -> None:
    """In memory: 48 × 64 weights in 2:4 at 0.625 bytes, 48 × 32 dense ones and 48 scales, on a CPU."""
    monkeypatch.delenv("SPENSE_BACKEND", raising=False)
    summary, layers = LoadSummary(), [torch.nn.Module() for _ in range(60)]
    methods = [PackedMethod(f"layers.{i}.mlp.down_proj", summary) for i in range(60)]
    for method, layer in zip(methods, layers, strict=True):
        method.create_weights(layer)
    for method, layer in zip(methods, layers, strict=True):
        method.process_weights_after_loading(layer)
        method.process_weights_after_loading(layer)  # vLLM may call twice
    assert len(blocks) == 1
    assert blocks[0].endswith(f"  back ends: cpu 60\n  CPU kernels: {cpu.describe_cpu()}")
    assert f"; {60 * 48 * (64 * 0.625 + 32 + 4) / 2**20:.2f} MiB in memory" in blocks[0]


def test_why_a_layer_falls_back_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPENSE_BACKEND", raising=False)
    narrow = LinearSpec("input", 48, 72, (40,), (32,))
    # No GPU is needed to ask: what follows cuda in the list is stood in for.
    monkeypatch.setattr(
        "vllm_spense.serving.runtime.select_backend", lambda *_: SimpleNamespace(name="triton")
    )
    assert named(choose(narrow, GPU)) == (
        "vllm-fp8",
        "in_features 72 must be a multiple of 16 (TMA row pitch)",
    )
    name, why = named(choose(ATTENTION, GPU))
    assert (name, why) == ("vllm-fp8", "there is no 2:4 region: a dense kernel is the right one")
    assert preferred_backend(GPU).name == "cuda"


@pytest.mark.parametrize(
    ("wanted", "device", "name", "why"),
    [
        ("", CPU, "cpu", None),
        ("cpu", CPU, "cpu", None),
        ("cpu-fp32", CPU, "cpu-fp32", "SPENSE_BACKEND=cpu-fp32 asks for it"),
        ("cuda", GPU, "cuda", None),
        ("vllm-fp8", CPU, "vllm-fp8", "SPENSE_BACKEND=vllm-fp8 asks for it"),
        ("triton", GPU, "triton", "SPENSE_BACKEND=triton asks for it"),
    ],
)
def test_the_environment_is_a_reason(monkeypatch, wanted: str, device, name: str, why: str | None) -> None:
    monkeypatch.setenv("SPENSE_BACKEND", wanted)
    if device == GPU:  # as if there were one
        for kind in (CudaBackend, TritonBackend):
            monkeypatch.setattr(kind, "why_not", lambda self, spec, device: None)
    assert named(choose(DOWN, device)) == (name, why)


def test_a_cpu_without_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPENSE_BACKEND", raising=False)
    monkeypatch.setattr(cpu, "why_not_here", lambda: "the CPU kernels need AVX2 and FMA")
    assert named(choose(DOWN, CPU)) == ("cpu-fp32", "the CPU kernels need AVX2 and FMA")


@pytest.mark.parametrize("spec", [GATE_UP, DOWN, ATTENTION], ids=["gate_up", "down", "attention"])
def test_int8_layers_run_on_what_takes_them(spec: LinearSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never on a kernel for FP8, vLLM's own included."""
    monkeypatch.delenv("SPENSE_BACKEND", raising=False)
    int8 = replace(spec, codecs=Codecs.of("int8"))
    assert choose(int8, CPU)[0].name == choose(spec, CPU)[0].name
    assert named(choose(int8, GPU)) == ("reference", "the kernels take FP8 weights, not INT8")
    with pytest.raises(
        ValueError, match="'triton' cannot run this layer: the kernel takes FP8 weights, not INT8"
    ):
        select_backend(int8, GPU, "triton")
    if spec.hybrid:
        monkeypatch.setenv("SPENSE_BACKEND", "vllm-fp8")
        with pytest.raises(ValueError, match="'vllm-fp8' cannot run this layer: it takes FP8 weights"):
            choose(int8, CPU)


def test_bf16_weights_are_a_reason() -> None:
    layout = online_layout("input", 48, 96, 0.5)
    name, why = named(choose(LinearSpec.of([layout], Codecs.of("bf16")), CPU))
    assert name == "vllm-unquantized"
    assert why == "bf16 weights run as vLLM's unquantized layers"


def test_one_line_for_layers_that_skip_zeros() -> None:
    """Logged with the last layer; a copy starts empty, and says the same of the checkpoint."""
    summary = pickle.loads(pickle.dumps(SparsitySummary("MLPs with relu", [0.3, 0.004, 0.02, 0.1])))
    layers = [torch.nn.Module() for _ in range(3)]
    for layer in layers:
        summary.expect(layer)
    for layer, backend in zip(layers, ("cpu", "cpu", "reference"), strict=True):
        summary.add(layer, "mlp", backend)
    line = "TwELL: 3 activation-sparse MLPs with relu; back ends: cpu 2, reference 1; "
    assert summary.describe() == line + "density by the checkpoint: min 0.4%, median 6.0%, max 30.0%"
    assert SparsitySummary("down layers").describe().endswith("; density: not in the checkpoint")
