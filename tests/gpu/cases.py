"""Layers, configurations and the float64 reference that the GPU tests share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch

from tests import layers
from vllm_spense.ops import LinearArguments, LinearSpec, extension, quantize_per_token
from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear import cuda
from vllm_spense.ops.linear.configs import KernelConfig, candidates, label
from vllm_spense.ops.linear.cuda import CudaBackend
from vllm_spense.ops.linear.reference import decompressed

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
NAN = float("nan")


def output_layer(features: int, *shards: tuple[int, int]) -> LinearSpec:
    """Output split over ``features`` inputs; (sparse rows, dense rows) of each fused shard."""
    sparse, dense = (tuple(shard[i] for shard in shards) for i in range(2))
    return LinearSpec("output", sum(sparse) + sum(dense), features, sparse, dense)


def input_layer(rows: int, sparse: int, dense: int) -> LinearSpec:
    """Input split: the first ``sparse`` columns are 2:4."""
    return LinearSpec("input", rows, sparse + dense, (sparse,), (dense,))


def configs(spec: LinearSpec, tokens: int) -> list[KernelConfig]:
    """Every configuration that is legal for the layer on this device (an H200's where there is none)."""
    return candidates(spec, tokens, CAPABILITY, CAPABILITY in extension.cutlass_capabilities())


def grid(
    layers: dict[str, LinearSpec],
    tokens: Iterable[int],
    keep: Callable[[KernelConfig], bool] = lambda config: True,
) -> list:
    """pytest parameters ``spec, tokens, config`` of all legal configurations that ``keep`` wants."""
    return [
        pytest.param(spec, count, config, id=f"{name}-t{count}-{label(config)}")
        for name, spec in layers.items()
        for count in tokens
        for config in configs(spec, count)
        if keep(config)
    ]


def one_cta(config: KernelConfig) -> bool:
    return config.cluster == 1 and not config.multicast


def splits_k(config: KernelConfig) -> bool:
    return config.cluster > 1 and not config.multicast


@dataclass(frozen=True)
class Layer:
    """One random layer: its checkpoint tensors, what the kernels read, and the exact weights."""

    spec: LinearSpec
    checkpoint: Tensors
    prepared: Tensors
    weight: torch.Tensor
    """Stored values, float64 ``[N, K]``, without the scale."""

    @property
    def scale(self) -> torch.Tensor:
        return self.prepared["weight_scale"]

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        """Of the size of the outputs, so that a wrong one shows."""
        generator = torch.Generator().manual_seed(5)
        spread = self.spec.in_features**0.5
        return (torch.randn(self.spec.out_features, generator=generator) * spread).to(
            self.scale.device, dtype
        )

    def inputs(self, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantised activations; tokens differ in scale by up to a factor of 16."""
        generator = torch.Generator().manual_seed(100 + seed)
        x = torch.randn(tokens, self.spec.in_features, generator=generator)
        xq, xs = quantize_per_token(
            (x * torch.exp2(4 * torch.rand(tokens, 1, generator=generator))).bfloat16()
        )
        return xq.to(self.scale.device), xs.to(self.scale.device)

    def expected(
        self, xq: torch.Tensor, xs: torch.Tensor, bias: torch.Tensor | None = None, scaled: bool = True
    ) -> torch.Tensor:
        y = xq.double() @ self.weight.T
        if scaled:
            y = y * xs.double() * self.scale.double()
        return y if bias is None else y + bias.double()

    def arguments(self, bias: torch.Tensor | None = None, *, unit_scale: bool = False) -> LinearArguments:
        """The layer as the kernels take it."""
        layer = LinearArguments.of(self.spec, self.prepared, bias, "blocked")
        return layer._replace(weight_scale=torch.ones_like(self.scale)) if unit_scale else layer

    def on(self, device: torch.device) -> LinearArguments:
        """The layer in the checkpoint's layout."""
        tensors = {name: tensor.to(device) for name, tensor in self.checkpoint.items()}
        return LinearArguments.of(self.spec, tensors)

    def run(
        self,
        config: KernelConfig,
        xq: torch.Tensor,
        xs: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        y: torch.Tensor | None = None,
        unit_scale: bool = False,
    ) -> torch.Tensor:
        """One configuration into an output of NaNs (or into ``y`` as it is)."""
        if y is None:
            y = torch.full((xq.shape[0], self.spec.out_features), NAN, dtype=dtype, device=xq.device)
        cuda.run(config, xq, xs, self.arguments(bias, unit_scale=unit_scale), y)
        return y


@functools.lru_cache(maxsize=64)
def make_layer(spec: LinearSpec, device: torch.device, seed: int = 0) -> Layer:
    checkpoint = layers.make_layer(layers.layouts_of(spec), seed=seed).tensors()
    on_device = {name: tensor.to(device) for name, tensor in checkpoint.items()}
    prepared = CudaBackend().prepare(spec, on_device)
    layer = Layer(spec, checkpoint, prepared, decompressed(spec, checkpoint).to(device).double())
    if device.type == "cuda":
        torch.cuda.synchronize()  # a kernel may read weights before the kernel in front has ended
    return layer
