"""What a CUDA device says of our compiled kernels: asked once, before anything is timed or captured."""

from __future__ import annotations

import functools

import torch

from vllm_spense.ops import extension
from vllm_spense.ops.linear.configs import KernelConfig, pairs, sm90_configs


@functools.cache
def clusters(config: KernelConfig, index: int, paired: bool = False) -> int | None:
    """How many of a configuration's clusters CUDA device ``index`` runs at once, 0 where not even one fits.

    None for CUTLASS, which plans by itself. ``RuntimeError`` with what CUDA says where it fails.
    """
    if config.kernel != "sm90":
        return None
    with torch.cuda.device(index):
        return extension.sm90_clusters(
            config.tile_rows, config.tile_tokens, config.cluster, config.multicast, paired
        )


@functools.cache
def why_not(index: int) -> str | None:
    """None when the Hopper kernel's instances are ready on this device, else the driver's reason in one line.

    The question loads them, so that a first launch under graph capture has nothing left to load; and a driver
    that is too old for them answers here, where a layer can still run on something else.
    """
    if torch.cuda.get_device_capability(index) != (9, 0):
        return None
    try:
        for config in sm90_configs():
            clusters(config, index)
            if pairs(config):
                clusters(config, index, paired=True)
    except RuntimeError as error:
        told = str(error).splitlines()[0]
        return f"the CUDA kernels do not run under this driver, build them for its CUDA version: {told}"
    return None
