"""Tiny random multimodal wrappers around a text model, and models of text without a language-model head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import VOCAB
from tests.tiny_text import add_tokenizer

INTER, HIDDEN = 208, 128
_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    **_TOKENS,
}
_SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": HIDDEN,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN_TOKENS = {
    "image_token_id": VOCAB - 1,
    "video_token_id": VOCAB - 2,
    "vision_start_token_id": VOCAB - 3,
    "vision_end_token_id": VOCAB - 4,
}
_MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
_LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,  # what vLLM has on CPUs
    "linear_value_head_dim": 128,
}

WRAPPERS: dict[str, dict[str, Any]] = {
    "paligemma": {
        "text_config": TEXT | {"model_type": "gemma"},
        "vision_config": _SIGLIP | {"projection_dim": HIDDEN},
        "projection_dim": HIDDEN,
        "hidden_size": HIDDEN,
        "image_token_index": VOCAB - 1,
        **_TOKENS,
    },
    "gemma3": {
        "text_config": TEXT | {"sliding_window": 16, "query_pre_attn_scalar": 32},
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": VOCAB - 1,
        "boi_token_index": VOCAB - 2,
        "eoi_token_index": VOCAB - 3,
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 32,
            "image_size": 56,
            "patch_size": 14,
        },
        "image_token_index": VOCAB - 1,
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    },
    "qwen2_5_vl": {
        "text_config": TEXT | {"rope_parameters": _MROPE},
        "vision_config": _QWEN_VISION | {"fullatt_block_indexes": [1], "window_size": 56},
        **_QWEN_TOKENS,
        "tie_word_embeddings": False,
    },
    "qwen3_vl": {
        "text_config": TEXT | {"rope_parameters": _MROPE | {"mrope_interleaved": True}},
        "vision_config": _QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **_QWEN_TOKENS,
        "tie_word_embeddings": True,
    },
    "qwen3_5": {
        "text_config": TEXT
        | _LINEAR_ATTENTION
        | {
            "rope_parameters": _MROPE
            | {"mrope_interleaved": True, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
        },
        "vision_config": _QWEN_VISION | {"num_position_embeddings": 16},
        **_QWEN_TOKENS,
        "tie_word_embeddings": False,
    },
    "gemma4": {
        "text_config": TEXT
        | {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 32,
            "num_kv_shared_layers": 0,
            "global_head_dim": 32,
        },
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "patch_size": 14,
            "position_embedding_size": 64,
            "default_output_length": 70,
        },
        "audio_config": None,
        "image_token_id": VOCAB - 1,
        "boi_token_id": VOCAB - 2,
        "eoi_token_id": VOCAB - 3,
        "video_token_id": VOCAB - 4,
        "audio_token_id": VOCAB - 5,
    },
}
"""Options of each ``model_type``; :data:`PREFIX` says where the files keep its layers."""

_QWEN_IMAGES: dict[str, Any] = {"patch_size": 14, "size": {"longest_edge": 3136, "shortest_edge": 784}}
_QWEN_SPECIAL = {
    "image_token": f"w{VOCAB - 1}",
    "video_token": f"w{VOCAB - 2}",
    "vision_start_token": f"w{VOCAB - 3}",
    "vision_end_token": f"w{VOCAB - 4}",
}
_GEMMA_SPECIAL = {
    "image_token": f"w{VOCAB - 1}",
    "boi_token": f"w{VOCAB - 2}",
    "eoi_token": f"w{VOCAB - 3}",
}
SPECIAL = {
    "paligemma": {"image_token": f"w{VOCAB - 1}"},
    "gemma3": _GEMMA_SPECIAL,
    "mistral3": {
        "image_token": f"w{VOCAB - 1}",
        "image_break_token": f"w{VOCAB - 2}",
        "image_end_token": f"w{VOCAB - 3}",
    },
    "qwen2_5_vl": _QWEN_SPECIAL,
    "qwen3_vl": _QWEN_SPECIAL,
    "qwen3_5": _QWEN_SPECIAL,
    "gemma4": _GEMMA_SPECIAL
    | {
        "video_token": f"w{VOCAB - 4}",
        "audio_token": f"w{VOCAB - 5}",
        "boa_token": f"w{VOCAB - 6}",
        "eoa_token": f"w{VOCAB - 7}",
    },
}
"""Words of the tokenizer that stand for images."""

PROCESSORS: dict[str, dict[str, Any]] = {
    "paligemma": {
        "processor_class": "PaliGemmaProcessor",
        "image_processor": {
            "image_processor_type": "SiglipImageProcessor",
            "image_seq_length": 4,
            "size": {"height": 28, "width": 28},
        },
    },
    "gemma3": {
        "processor_class": "Gemma3Processor",
        "image_seq_length": 4,
        "image_processor": {
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": 28, "width": 28},
        },
    },
    "mistral3": {
        "processor_class": "PixtralProcessor",
        "patch_size": 14,
        "spatial_merge_size": 2,
        **SPECIAL["mistral3"],
        "image_processor": {
            "image_processor_type": "PixtralImageProcessor",
            "patch_size": {"height": 14, "width": 14},
            "size": {"longest_edge": 56},
        },
    },
    "qwen2_5_vl": {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor": _QWEN_IMAGES | {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_processor": _QWEN_IMAGES | {"video_processor_type": "Qwen2VLVideoProcessor"},
    },
    "qwen3_vl": {
        "processor_class": "Qwen3VLProcessor",
        "image_processor": _QWEN_IMAGES | {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_processor": _QWEN_IMAGES | {"video_processor_type": "Qwen3VLVideoProcessor"},
    },
    "qwen3_5": {
        "processor_class": "Qwen3VLProcessor",
        "image_processor": _QWEN_IMAGES | {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_processor": _QWEN_IMAGES | {"video_processor_type": "Qwen3VLVideoProcessor"},
    },
    "gemma4": {
        "processor_class": "Gemma4Processor",
        "image_seq_length": 70,
        "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
        "image_processor": {
            "image_processor_type": "Gemma4ImageProcessor",
            "max_soft_tokens": 70,
            "patch_size": 14,
        },
        "video_processor": {"video_processor_type": "Gemma4VideoProcessor", "patch_size": 14},
    },
}
"""processor_config.json: how images of 56 by 56 pixels become patches and tokens."""

IMAGE = {
    "paligemma": "w5 w6 w7",
    "gemma3": f"w5 w{VOCAB - 2} w6 w7",
    "qwen2_5_vl": f"w5 w{VOCAB - 3} w{VOCAB - 1} w{VOCAB - 4} w6 w7",
    "qwen3_vl": f"w5 w{VOCAB - 3} w{VOCAB - 1} w{VOCAB - 4} w6 w7",
    "qwen3_5": f"w5 w{VOCAB - 3} w{VOCAB - 1} w{VOCAB - 4} w6 w7",
}
"""A prompt with one image; where this has no entry, with the token of the image itself."""

PREFIX = {
    "paligemma": "language_model.model.",
    "gemma3": "language_model.model.",
    "mistral3": "language_model.model.",
    "qwen2_5_vl": "model.",
}
"""Of the text model's tensors as published; ``model.language_model.`` where this has no entry."""


def make_wrapper(kind: str, out: Path) -> Path:
    """A random bf16 ``…ForConditionalGeneration``, its tensors named as such models are published."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(kind, **WRAPPERS[kind])
    torch.manual_seed(0)
    _save(AutoModelForImageTextToText.from_config(config), out)
    if (
        config.vision_config.model_type == "siglip_vision_model"
    ):  # published so; today's class has no such part
        _rename(out, "vision_tower.", "vision_tower.vision_model.")
    (out / "processor_config.json").write_text(json.dumps(PROCESSORS[kind]))
    return add_tokenizer(out, **SPECIAL[kind])


TEXT_TYPES = {
    "paligemma": "gemma",
    "gemma3": "gemma3_text",
    "mistral3": "mistral",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_5": "qwen3_5_text",
    "gemma4": "gemma4_text",
}
"""``model_type`` of a causal language model that computes what the wrapper does with text alone."""


def text_name(kind: str, name: str) -> str | None:
    """What :func:`make_text_twin`'s model calls a tensor or module of the wrapper; None if it lacks it."""
    prefix = PREFIX.get(kind, "model.language_model.")
    if name.startswith(prefix):
        return f"model.{name.removeprefix(prefix)}"
    head = "language_model.lm_head." if kind == "mistral3" else "lm_head."
    return name.replace(head, "lm_head.") if name.startswith(head) else None


def make_text_twin(kind: str, wrapper: Path, out: Path) -> Path:
    """The text model of ``wrapper`` (made by :func:`make_wrapper`) as a directory of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(wrapper)
    options = config.get_text_config().to_dict()
    for key in ("model_type", "architectures", "dtype"):
        options.pop(key, None)
    if "mrope_section" in (options.get("rope_parameters") or {}) and kind != "qwen3_5":
        options["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    options["tie_word_embeddings"] = config.tie_word_embeddings
    twin = AutoConfig.for_model(TEXT_TYPES[kind], **options)
    AutoModelForCausalLM.from_config(twin, dtype=torch.bfloat16).save_pretrained(out)
    state = load_file(wrapper / "model.safetensors")
    named = {new: tensor for name, tensor in state.items() if (new := text_name(kind, name)) is not None}
    assert named.keys() == load_file(out / "model.safetensors").keys()
    save_file(named, out / "model.safetensors", metadata={"format": "pt"})
    return add_tokenizer(out, **SPECIAL[kind])


def make_headless(kind: str, out: Path, *, prefix: str | None = None, **changes: Any) -> Path:
    """A random bf16 model that is served for pooling.

    ``kind``: ``classifier`` (a sequence classifier), ``base`` (an architecture without a head) or
    ``embedding`` (a causal language model's, as Qwen3-Embedding). ``prefix`` is what the files put before the
    names of the decoder's tensors instead of what transformers does.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = {"classifier": AutoModelForSequenceClassification, "base": AutoModel}.get(
        kind, AutoModelForCausalLM
    )
    options = TEXT | {"tie_word_embeddings": kind == "embedding"} | changes
    if kind == "classifier":
        options |= {"num_labels": 3}
    torch.manual_seed(0)
    _save(auto.from_config(AutoConfig.for_model("qwen3", **options)), out)
    if prefix is not None:
        state = load_file(out / "model.safetensors")
        heads = ("lm_head.", "score.")
        named = {n if n.startswith(heads) else prefix + n.removeprefix("model."): t for n, t in state.items()}
        save_file(named, out / "model.safetensors", metadata={"format": "pt"})
    return add_tokenizer(out)


def _rename(directory: Path, old: str, new: str) -> None:
    """Put ``new`` where the names of tensors begin with ``old``."""
    path = directory / "model.safetensors"
    named = {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor
        for name, tensor in load_file(path).items()
    }
    save_file(named, path, metadata={"format": "pt"})


def _save(model: Any, out: Path) -> None:
    """Weights are large enough that every layer moves the tokens."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 2 * parameter[0].numel() ** -0.5)
    model.to(torch.bfloat16).save_pretrained(out)
