"""Checkpoints and weights that real bitsandbytes has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


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
    weight: torch.Tensor,
    quant_type: str = "nf4",
    nested: bool = True,
    blocksize: int = 64,
    storage: torch.dtype = torch.uint8,
) -> dict[str, torch.Tensor]:
    """A weight as files hold it: ``weight``, ``weight.absmax``, …"""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(
        weight, quant_type=quant_type, compress_statistics=nested, blocksize=blocksize, quant_storage=storage
    )
    beside = state.as_dict(packed=True)
    return {"weight": codes} | {f"weight.{part}": tensor for part, tensor in beside.items()}


def dequantised(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What bitsandbytes makes of :func:`quantised`, in the dtype that the weight had.

    Its compiled CPU kernel (0.50.2) begins a block with every row; its quantisation and its other back ends
    do not: it gets the weight as one row.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    beside = {name.removeprefix("weight."): t.clone() for name, t in tensors.items() if name != "weight"}
    state = QuantState.from_dict(beside, device=torch.device("cpu"))
    shape = state.shape
    state.shape = torch.Size([1, shape.numel()])
    return dequantize_4bit(tensors["weight"].view(-1, 1), state).view(shape)


def write_layer(out: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A directory with the one module ``layer``, as :func:`quantised` gives it."""
    out.mkdir(parents=True)
    named = {f"layer.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, out / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = {"model_type": "llama", "num_hidden_layers": 1, "quantization_config": quantization}
    (out / "config.json").write_text(json.dumps(config))
    return out


def dequantised_model(directory: Path) -> dict[str, torch.Tensor]:
    """:func:`dequantised` of every 4-bit weight in ``model.safetensors``, by its module."""
    tensors = load_file(directory / "model.safetensors")
    modules = sorted({name.partition(".weight.")[0] for name in tensors if ".weight." in name})
    return {
        module: dequantised(
            {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.startswith(f"{module}.weight")}
        )
        for module in modules
    }


def run_by_bitsandbytes(directory: Path) -> Any:
    """The model as transformers and bitsandbytes run it, in fp32 but for the weights."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", dtype=torch.float32).eval()
