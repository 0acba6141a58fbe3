"""Valid random layer contents: for `--load-format dummy`, tuning and benchmarks, where only speed counts."""

from __future__ import annotations

import torch

from vllm_spense.format.sparse24 import LEGAL_NIBBLES
from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear.spec import LinearSpec


def fill_random(tensors: dict[str, torch.Tensor], bias: torch.Tensor | None, seed: int = 0) -> None:
    """Fill a layer's tensors in place with legal metadata, finite values and a small scale.

    All-zero data would make kernels look faster than they are.
    """
    for name, tensor in tensors.items():
        generator = torch.Generator(device=tensor.device).manual_seed(seed)
        if tensor.dtype == torch.uint8:
            nibbles = torch.tensor(LEGAL_NIBBLES, dtype=torch.uint8, device=tensor.device)
            picks = [
                nibbles[torch.randint(6, tuple(tensor.shape), generator=generator, device=tensor.device)]
                for _ in range(2)
            ]
            tensor.copy_(picks[0] | picks[1] << 4)
        elif tensor.ndim == 1 or name.endswith("_absmax"):
            tensor.fill_(1e-4 if tensor.ndim == 1 else 100)
        else:
            noise = torch.empty(tuple(tensor.shape), dtype=torch.bfloat16, device=tensor.device)
            noise.normal_(0.0, 64.0 if tensor.element_size() == 1 else 0.02, generator=generator)
            largest = 448 if tensor.is_floating_point() else 127
            tensor.copy_(noise.clamp_(-largest, largest))
    if bias is not None:
        bias.data.zero_()


def random_layer(spec: LinearSpec, device: torch.device, seed: int = 0) -> Tensors:
    """Checkpoint tensors of a layer with valid random contents."""
    stored = spec.stored.tensors().items()
    tensors = {name: torch.empty(s.shape, dtype=s.dtypes[0], device=device) for name, s in stored}
    fill_random(tensors, None, seed)
    return tensors
