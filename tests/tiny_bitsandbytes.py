"""4-bit checkpoints as transformers and bitsandbytes write them, and single layers of such ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

STATE = "weight.quant_state.bitsandbytes__"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def make_bitsandbytes(
    source: Path,
    out: Path,
    kind: str = "nf4",
    *,
    nested: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    storage: torch.dtype = torch.uint8,
    skip: list[str] | None = None,
) -> Path:
    """``source`` in 4 bits, with its tokenizer; ``skip``: modules that stay as they are."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=skip,
    )
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map="cpu", dtype=dtype
    )
    model.save_pretrained(out)
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copy(source / name, out / name)
    return out


def run_by_bitsandbytes(directory: Path) -> Any:
    """The model as transformers and bitsandbytes run it, in fp32 but for the weights."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", dtype=torch.float32).eval()


def write_layer(
    out: Path,
    weight: torch.Tensor,
    kind: str,
    *,
    nested: bool,
    block: int = 64,
    storage: torch.dtype = torch.uint8,
    module: str = "layer",
) -> torch.Tensor:
    """A directory with ``weight [N, K]`` as bitsandbytes packs it; returns what it decodes that to."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight, blocksize=block, quant_type=kind, compress_statistics=nested, quant_storage=storage
    )
    out.mkdir(parents=True)
    beside = {f"{module}.weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    save_file({f"{module}.weight": packed, **beside}, out / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = {"model_type": "llama", "num_hidden_layers": 1, "quantization_config": quantization}
    (out / "config.json").write_text(json.dumps(config))
    return decoded(packed, state)


def decoded_by_bitsandbytes(directory: Path) -> dict[str, torch.Tensor]:
    """Every 4-bit weight, by its module, as bitsandbytes decodes the files."""
    from bitsandbytes import functional

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    modules = {name.partition(".weight.")[0] for name in tensors if ".weight." in name}
    found = {}
    for module in modules:
        beside = {name: part for name, part in tensors.items() if name.startswith(f"{module}.weight.")}
        state = functional.QuantState.from_dict(beside, torch.device("cpu"))
        found[module] = decoded(tensors[f"{module}.weight"], state)
    return found


def decoded(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """``dequantize_4bit`` of the weight as one row, for blocks run over row ends.

    Given several rows, bitsandbytes 0.50.2 begins a block in each of them on CPUs with AVX-512: wrong values
    where rows are no multiple of a block. Its other back ends, and :func:`quantize_4bit`, do not.
    """
    from bitsandbytes import functional

    shape = state.shape
    state.shape = torch.Size([1, shape.numel()])
    found = functional.dequantize_4bit(packed.view(-1, 1), state).view(shape)
    state.shape = shape
    return found
