"""What decides, per device, whether our CUDA kernels run a layer; the driver is asked first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from vllm_spense.ops import LinearSpec, cuda_device, extension
from vllm_spense.ops.linear import table
from vllm_spense.ops.linear.configs import illegal, pairs, sm90_configs
from vllm_spense.ops.linear.cuda import CudaBackend
from vllm_spense.ops.linear.table import TuningEntry

SPEC = LinearSpec("input", 5120, 25600, (12800,), (12800,))
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """Makes torch say that device 0 has this compute capability; what was asked before is forgotten."""

    def become(major: int, minor: int) -> None:
        properties = SimpleNamespace(name="A GPU", major=major, minor=minor, multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, minor))
        monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        monkeypatch.setattr(extension, "why_not_loaded", lambda: None)
        monkeypatch.setattr(extension, "cutlass_capabilities", lambda: {(9, 0), (10, 0), (10, 3)})

    asked = (cuda_device.clusters, cuda_device.why_not, table.measured)
    for function in asked:
        function.cache_clear()
    yield become
    for function in asked:
        function.cache_clear()


def test_every_compiled_instance_is_loaded_before_a_layer_runs(
    device: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def clusters(*shape: int) -> int:
        asked.append(shape)
        return 16

    device(9, 0)
    monkeypatch.setattr(extension, "sm90_clusters", clusters)
    assert CudaBackend().why_not(SPEC, DEVICE) is None
    tiles = {(rows, tokens, multicast, paired) for rows, tokens, _, multicast, paired in asked}
    decode = {(rows, tokens, False, False) for rows in (64, 128) for tokens in (8, 16, 32, 64, 128)}
    paired = {(128, tokens, False, True) for tokens in (8, 16, 32, 64)} | {(128, 128, True, True)}
    assert tiles == decode | paired | {(128, 128, True, False), (128, 256, True, False)}
    assert {cluster for _, _, cluster, multicast, _ in asked if not multicast} == {1, 2, 4, 8}
    before = len(asked)
    CudaBackend().why_not(SPEC, DEVICE)
    assert len(asked) == before, "a device is asked once"


def test_the_configurations_are_those_that_are_legal() -> None:
    assert all(illegal(SPEC, 16, config, (9, 0)) is None for config in sm90_configs())
    assert any(pairs(config) for config in sm90_configs())


def test_a_driver_that_cannot_run_the_kernels_leaves_the_layer_to_another_back_end(
    device: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_old(*shape: int) -> int:
        raise RuntimeError(
            "spense: linear_sm90 failed with CUDA error 35: CUDA driver version is insufficient\n…"
        )

    device(9, 0)
    monkeypatch.setattr(extension, "sm90_clusters", too_old)
    reason = CudaBackend().why_not(SPEC, DEVICE)
    assert reason is not None
    assert "CUDA driver version is insufficient" in reason
    assert "\n" not in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_the_library_itself_says_that_there_is_no_driver(device: Callable[[int, int], None]) -> None:
    if reason := extension.why_not_loaded():
        pytest.skip(reason)
    device(9, 0)
    reason = CudaBackend().why_not(SPEC, DEVICE)
    assert reason is not None
    assert "failed with CUDA error" in reason


def entry(us: float, dense_us: float) -> TuningEntry:
    shape = {name: getattr(SPEC, name) for name in ("split", "out_features", "in_features")}
    sizes = {"sparse_sizes": SPEC.sparse_sizes, "dense_sizes": SPEC.dense_sizes}
    tile = {"kernel": "cutlass", "tile_rows": 128, "tile_tokens": 64, "cluster": 1, "multicast": False}
    return TuningEntry(**shape, **sizes, **tile, tokens=16, us=us, dense_us=dense_us)  # type: ignore[arg-type]


@pytest.mark.parametrize("minor", [0, 3])
@pytest.mark.parametrize(("us", "runs"), [(None, False), (9.0, True), (11.0, False)])
def test_blackwell_runs_dense_until_a_measurement_says_otherwise(
    device: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
    minor: int,
    us: float | None,
    runs: bool,
) -> None:
    device(10, minor)
    entries = {} if us is None else {entry(us, 10.0).shape: {16: entry(us, 10.0)}}
    monkeypatch.setattr(table, "measured", lambda name: entries)
    reason = CudaBackend().why_not(SPEC, DEVICE)
    assert (reason is None) == runs, reason
    if us is None:
        assert "spense tune" in str(reason)


def test_a_family_that_was_not_compiled_is_named(
    device: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    device(10, 3)
    monkeypatch.setattr(extension, "cutlass_capabilities", lambda: {(9, 0), (10, 0)})
    assert CudaBackend().why_not(SPEC, DEVICE) == "no kernel is compiled for compute capability 10.3"
