"""The kernels' host code runs without a GPU; it has to be built, which needs nvcc."""

from __future__ import annotations

import pytest

from vllm_spense.ops import extension


@pytest.fixture(scope="session", autouse=True)
def built_extension() -> None:
    reason = extension.why_not_loaded()
    if reason:
        pytest.skip(reason)
