"""Checkpoints and weights that real bitsandbytes has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def quantise_model(source: Path, out: Path, **settings: Any) -> Path:
    """``source`` saved again by transformers with its linear layers in 4 bits (``BitsAndBytesConfig``)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    given = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16} | settings
    model = AutoModelForCausalLM.from_pretrained(
        source,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, **given),
        dtype=torch.bfloat16,
        device_map="cpu",
    )
    model.save_pretrained(out)
    if (source / "tokenizer.json").exists():
        AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return out


def quantised(
    weight: torch.Tensor, quant_type: str = "nf4", nested: bool = True, blocksize: int = 64
) -> dict[str, torch.Tensor]:
    """A weight as files hold it: ``weight``, ``weight.absmax``, …"""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(
        weight, quant_type=quant_type, compress_statistics=nested, blocksize=blocksize
    )
    beside = state.as_dict(packed=True)
    return {"weight": codes} | {f"weight.{part}": tensor for part, tensor in beside.items()}


def dequantised(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What bitsandbytes makes of :func:`quantised`, in the dtype that the weight had.

    Its compiled CPU kernel (0.50.2) begins a block with every row; its quantisation and its other back ends
    do not: where rows have no whole blocks, this is its portable implementation.
    """
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    beside = {name.removeprefix("weight."): t.clone() for name, t in tensors.items() if name != "weight"}
    state = QuantState.from_dict(beside, device=torch.device("cpu"))
    if state.shape[-1] % state.blocksize == 0:
        return dequantize_4bit(tensors["weight"], state)
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    codes = tensors["weight"].view(-1)
    return _dequantize_4bit_compute(codes, absmax, state.code, state.blocksize, state.shape, state.dtype)
