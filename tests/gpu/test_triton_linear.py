"""The Triton kernel on a CUDA device, on checkpoint tensors as they are, against float64."""

from __future__ import annotations

import pytest
import torch

from vllm_spense.ops import LinearArguments, LinearSpec

from .cases import input_layer, make_layer, output_layer
from .diagnosis import probe_columns, relative_error, wrong

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("device")]

LAYERS = {
    "sparse": output_layer(256, (128, 0)),
    "dense": output_layer(256, (0, 128)),
    "rows": output_layer(2048, (700, 300)),
    "gate_up": output_layer(1024, (400, 200), (400, 200)),
    "ragged": output_layer(400, (40, 33)),
    "columns": input_layer(512, 1120, 928),
    "narrow": input_layer(130, 8, 136),
}
EXACT = {torch.bfloat16: 2e-3, torch.float16: 1e-3, torch.float32: 1e-5}
"""Float activations: sums in fp32, so little but the rounding of inputs and outputs is left."""


def multiply(
    layer: LinearArguments, x: torch.Tensor, x_scale: torch.Tensor | None, out: torch.dtype
) -> torch.Tensor:
    from vllm_spense.ops.linear import triton_kernel  # imports Triton, which a CPU may lack

    return triton_kernel.multiply(x, x_scale, layer, out)


@pytest.mark.parametrize("tokens", [1, 13, 16, 50, 64, 130])
@pytest.mark.parametrize("spec", LAYERS.values(), ids=LAYERS)
def test_fp8_activations(cuda: torch.device, spec: LinearSpec, tokens: int) -> None:
    if torch.cuda.get_device_capability(cuda) < (8, 9):
        pytest.skip("FP8 activations need compute capability 8.9")
    layer = make_layer(spec, cuda)
    xq, xs = layer.inputs(tokens)
    y = multiply(layer.on(cuda), xq, xs, torch.bfloat16)
    if problem := wrong(y, layer.expected(xq, xs)):
        ones = torch.ones(16, 1, device=cuda)
        unit = layer.on(cuda)._replace(weight_scale=torch.ones_like(layer.scale))
        columns = range(min(512, spec.in_features))
        text = probe_columns(lambda x: multiply(unit, x, ones, torch.bfloat16), layer.weight, columns, 16)
        pytest.fail(f"{problem}\n{text}", pytrace=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 33, 130])
@pytest.mark.parametrize("spec", LAYERS.values(), ids=LAYERS)
def test_float_activations(cuda: torch.device, spec: LinearSpec, tokens: int, dtype: torch.dtype) -> None:
    layer = make_layer(spec, cuda)
    x = torch.randn(tokens, spec.in_features, generator=torch.Generator().manual_seed(3)).to(cuda, dtype)
    bias = layer.bias(dtype)
    y = multiply(layer.on(cuda)._replace(bias=bias), x, None, torch.float32)
    expected = x.double() @ layer.weight.T * layer.scale.double() + bias.double()
    assert relative_error(y, expected) < EXACT[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", [LAYERS["gate_up"], LAYERS["columns"]], ids=["gate_up", "columns"])
def test_bias_and_output_dtypes(cuda: torch.device, spec: LinearSpec, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability(cuda) < (8, 9):
        pytest.skip("FP8 activations need compute capability 8.9")
    layer = make_layer(spec, cuda)
    xq, xs = layer.inputs(17)
    bias = layer.bias(dtype)
    y = multiply(layer.on(cuda)._replace(bias=bias), xq, xs, dtype)
    assert y.dtype == dtype
    assert (problem := wrong(y, layer.expected(xq, xs, bias))) is None, problem
