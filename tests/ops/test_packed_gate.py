"""A gate whose kernel packs: its definition, and the layers that the kernel takes."""

from __future__ import annotations

import pytest
import torch

from tests.layers import make_layer
from tests.mlps import ACTIVATIONS, words_of
from vllm_spense.format import Layout
from vllm_spense.ops import LinearArguments, extension, quantize_per_token
from vllm_spense.ops.linear.op import linear
from vllm_spense.ops.linear.repack import block
from vllm_spense.ops.mlp import packed_gate
from vllm_spense.ops.mlp.activation import Activation
from vllm_spense.ops.mlp.packed_gate import TILE, linear_twell
from vllm_spense.ops.mlp.twell import TwellShape

K = 64
CUDA = torch.device("cuda", 0)


def layer_of(sparse: int, dense: int, split: str = "output", bias: bool = False) -> LinearArguments:
    sizes = (sparse + dense, K) if split == "output" else (160, sparse + dense)
    return make_layer([Layout(split, *sizes, sparse)], bias=bias, seed=dense).arguments()  # type: ignore[arg-type]


def given(layer: LinearArguments, tokens: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    features = K if layer.output_split else layer.sparse_sizes[0] + layer.dense_sizes[0]
    return quantize_per_token(torch.randn(tokens, features, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("share", [8, 4, 2])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, Activation("fatrelu", 9.0)], ids=str)
def test_words_of_the_layer(activation: Activation, share: int, blocked: bool) -> None:
    layer = layer_of(128, 72, bias=True)
    x, x_scale = given(layer)
    gate = linear(x, x_scale, layer, torch.bfloat16)
    words, values = linear_twell(x, x_scale, block(layer) if blocked else layer, activation, share)
    assert torch.equal(words, words_of(gate, activation, TwellShape(200, TILE, share)))
    assert torch.equal(values, gate)


def test_opcheck() -> None:
    # test_schema hashes its inputs with a multiplication that torch does not have for e4m3.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    layer = layer_of(128, 72)
    operator = torch.ops.spense.linear_twell.default
    torch.library.opcheck(operator, (*given(layer), *layer.flat(), 0.5, 4), test_utils=checks)


def test_layers_that_the_kernel_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(extension, "why_not_loaded", lambda: None)
    monkeypatch.setattr(packed_gate, "_why_not_on", lambda index: None)
    for sparse, dense, split in (
        (128, 72, "output"),
        (0, 200, "output"),
        (200, 0, "output"),
        (40, 24, "input"),
    ):
        assert packed_gate.why_not(block(layer_of(sparse, dense, split)), CUDA) is None
    layer = layer_of(64, 64)
    assert "64 rows in 2:4 end within a tile of 128" in str(packed_gate.why_not(block(layer), CUDA))
    assert "not checkpoint" in str(packed_gate.why_not(layer, CUDA))
    two = block(make_layer([Layout("output", 128, K, 64)] * 2).arguments())
    assert "one shard, not 2" in str(packed_gate.why_not(two, CUDA))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "capability 9.0" in str(packed_gate.why_not(block(layer_of(0, 64)), CUDA))
