"""What tests of vLLM's own layers need of the process that they run in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def vllm_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process as the only rank of a tensor-parallel group, which vLLM's layers ask for."""
    from vllm import distributed
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    store = tmp_path_factory.mktemp("group") / "store"
    with set_current_vllm_config(VllmConfig()):
        distributed.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        distributed.initialize_model_parallel(1)
        yield
    cleanup_dist_env_and_memory()
