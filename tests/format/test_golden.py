"""Checkpoints of version 1 that an earlier release wrote: they load, and are written the same byte for byte.

``golden/`` was made at commit 66673bf by ``python tests/format/test_golden.py`` from the model below, whose
numbers are exact in every arithmetic, so that no CPU, random generator or library moves them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_spense.format import Checkpoint
from vllm_spense.format.manifest import check_manifest
from vllm_spense.format.validate import check_checkpoint
from vllm_spense.pruning import PruneConfig, prune

GOLDEN = Path(__file__).parent / "golden"
WEIGHT_DTYPES = ("fp8", "bf16")
REMOVED_OPTIONS = ("search_damping", "asymmetric", "rounding")
"""Options of the pruner that are gone since the files were made; their provenance still names them."""
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": True,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "mlp_bias": True,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "vocab_size": 32,
}
LAYER = "model.layers.0"
SHAPES = {
    "model.embed_tokens.weight": (32, 48),
    "model.norm.weight": (48,),
    "lm_head.weight": (32, 48),
    f"{LAYER}.input_layernorm.weight": (48,),
    f"{LAYER}.post_attention_layernorm.weight": (48,),
    f"{LAYER}.self_attn.q_proj.weight": (64, 48),
    f"{LAYER}.self_attn.q_proj.bias": (64,),
    f"{LAYER}.self_attn.k_proj.weight": (32, 48),
    f"{LAYER}.self_attn.k_proj.bias": (32,),
    f"{LAYER}.self_attn.v_proj.weight": (32, 48),
    f"{LAYER}.self_attn.v_proj.bias": (32,),
    f"{LAYER}.self_attn.o_proj.weight": (48, 64),
    f"{LAYER}.self_attn.o_proj.bias": (48,),
    f"{LAYER}.mlp.gate_proj.weight": (96, 48),
    f"{LAYER}.mlp.gate_proj.bias": (96,),
    f"{LAYER}.mlp.up_proj.weight": (96, 48),
    f"{LAYER}.mlp.up_proj.bias": (96,),
    f"{LAYER}.mlp.down_proj.weight": (48, 96),
    f"{LAYER}.mlp.down_proj.bias": (48,),
}


def make_source(directory: Path) -> Path:
    """A Llama of small multiples of a power of two, mixed by multiplication modulo a prime."""
    directory.mkdir()
    tensors = {}
    for place, (name, shape) in enumerate(SHAPES.items()):
        index = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
        mixed = (index * 40503 + place * 977 + 1) * 2654435 % 65521 % 509 - 254
        tensors[name] = (mixed.double() / 2048).to(torch.bfloat16).reshape(shape)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    return directory


def make(source: Path, out: Path, weight_dtype: str) -> Path:
    config = PruneConfig(preset="magnitude", weight_dtype=weight_dtype)
    prune(source, out, config)
    return out


def config_of(directory: Path) -> dict[str, Any]:
    """config.json without what names this environment."""
    config = json.loads((directory / "config.json").read_text())
    provenance = config["quantization_config"]["provenance"]
    del provenance["versions"]
    for name in REMOVED_OPTIONS:
        provenance["options"].pop(name, None)
    return config


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
def test_it_loads(weight_dtype: str) -> None:
    check_manifest(GOLDEN / weight_dtype)
    checkpoint = Checkpoint(GOLDEN / weight_dtype)
    check_checkpoint(checkpoint)
    assert checkpoint.require_spense().version == 1
    raw = json.loads((GOLDEN / weight_dtype / "config.json").read_text())["quantization_config"]
    assert json.dumps(checkpoint.require_spense().model_dump(mode="json")) == json.dumps(raw)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
def test_it_is_written_byte_for_byte(weight_dtype: str, tmp_path: Path) -> None:
    out = make(make_source(tmp_path / "source"), tmp_path / "out", weight_dtype)
    golden = GOLDEN / weight_dtype
    for path in (*golden.glob("*.safetensors"), golden / "model.safetensors.index.json"):
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    # As text, so that the order of keys counts, too.
    assert json.dumps(config_of(out)) == json.dumps(config_of(GOLDEN / weight_dtype))


def test_one_weight_more_would_be_seen(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[f"{LAYER}.mlp.up_proj.weight"][3, 5] += 0.125
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    out = make(source, tmp_path / "out", "fp8")
    name = "model-00001-of-00002.safetensors"
    assert (out / name).read_bytes() != (GOLDEN / "fp8" / name).read_bytes()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        dense = make_source(Path(scratch) / "source")
        for name in WEIGHT_DTYPES:
            shutil.rmtree(GOLDEN / name, ignore_errors=True)
            make(dense, GOLDEN / name, name)
