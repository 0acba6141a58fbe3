"""GPU tests run where there is a CUDA device, and rehearse without one.

``SPENSE_GPU_REHEARSAL=1`` runs the numeric tests on the CPU with the definition in the kernel's place, so
that mistakes in the tests show without a GPU; ``=skip-column`` gives it a wrong kernel, ``=crash`` one that
kills the process in some configurations.
``SPENSE_TEST_REPORT``: a file that gets one line of JSON when a test starts and when it ends.
``SPENSE_SKIP_TESTS``: a JSON file of what to leave out, ``{"tests": [ids], "configs": [fields]}``.
``SPENSE_THIN_TESTS=1``: of each test function one case per configuration, the first.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_spense.ops import extension
from vllm_spense.ops.linear import cuda as back_end
from vllm_spense.ops.linear.arguments import LinearArguments
from vllm_spense.ops.linear.configs import KernelConfig
from vllm_spense.ops.linear.reference import reference_linear

REHEARSAL = os.environ.get("SPENSE_GPU_REHEARSAL", "")
REPORT = os.environ.get("SPENSE_TEST_REPORT")
CONTEXT_LOST = 86
"""Exit code of pytest after an error that leaves every later CUDA call failing."""


@pytest.fixture(scope="session")
def device() -> torch.device:
    if REHEARSAL:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def cuda(device: torch.device) -> torch.device:
    """A device on which the real operators run: not in rehearsal."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture(scope="session")
def kernels(device: torch.device) -> Iterator[None]:
    """The compiled kernels, or the definition in their place."""
    if REHEARSAL:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(back_end, "run", _definition)
            yield
        return
    if reason := extension.why_not_loaded():
        pytest.fail(reason)
    yield


def _definition(
    config: KernelConfig,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    layer: LinearArguments,
    y: torch.Tensor,
    overlap: bool = True,
) -> None:
    if REHEARSAL == "crash" and (config.tile_rows, config.tile_tokens, config.cluster) == (64, 16, 2):
        os.abort()
    if REHEARSAL == "skip-column":  # a kernel that never reads column 5
        x = x.clone()
        x.view(torch.uint8)[:, 5] = 0
    y.copy_(reference_linear(x, x_scale, layer, y.dtype))


@pytest.fixture(autouse=True)
def no_pending_errors() -> Iterator[None]:
    """Kernels report late: a test that broke the device must be the one that fails."""
    yield
    if REHEARSAL or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"the CUDA context is lost: {error}", returncode=CONTEXT_LOST)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    listed = Path(os.environ.get("SPENSE_SKIP_TESTS") or os.devnull)
    left_out = json.loads(listed.read_text() or "{}")

    thin, seen = os.environ.get("SPENSE_THIN_TESTS") == "1", set()

    def wanted(item: pytest.Item) -> bool:
        fields = _config_of(item)
        if thin and fields:
            key = getattr(item, "originalname", item.name), *fields.values()
            if key in seen:
                return False
            seen.add(key)
        tests, configs = left_out.get("tests", ()), left_out.get("configs", ())
        return item.nodeid not in tests and fields not in configs

    kept = [item for item in items if wanted(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _config_of(item: pytest.Item) -> dict | None:
    config = getattr(item, "callspec", None) and item.callspec.params.get("config")  # type: ignore[attr-defined]
    return dataclasses.asdict(config) if isinstance(config, KernelConfig) else None


def _write(**entry: Any) -> None:
    if REPORT:
        with open(REPORT, "a") as file:
            file.write(json.dumps(entry) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    _write(event="start", test=item.nodeid, config=_config_of(item), time=time.time())
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        _write(
            event="end",
            test=item.nodeid,
            config=_config_of(item),
            outcome=report.outcome,
            seconds=round(report.duration, 3),
            message=_message(report),
            **dict(item.user_properties),
        )
    return report


def _message(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    return str(crash.message if crash else report.longrepr or "")[:6000]
