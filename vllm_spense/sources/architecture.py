"""What transformers makes of config.json: its own classes only, bounded sizes, one line where it fails."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vllm_spense.format.checkpoint import CONFIG_NAME, read_json
from vllm_spense.format.errors import CheckpointError, one_line
from vllm_spense.format.schema import MAX_FEATURES
from vllm_spense.format.settings import OUTPUTS
from vllm_spense.sources.directory import check_source

BORROWED = {"llama_sparse_relu": "llama", "sparsellama": "llama", "bamboo": "mistral"}
"""Published models that transformers knows by code of theirs alone: whose class has their fields and weights.
Their activations are others."""
MAX_LAYERS = 1024
"""No language model has as many; each costs milliseconds and memory before the first weight is read."""
_MAX_LABELS = 1 << 16
_LAYERS = re.compile(r"(layers?|depths?|blocks|stages)$")
_EXTENTS = re.compile(r"(size|dim|heads|experts|features|channels|rank|groups|width)$")
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_INTACT = "get an intact config.json"
_NEWER = "install a newer transformers, or get an intact config.json"
_SEES = ("vision_config", "audio_config", "vision_tower", "mm_vision_tower", "speech_config")


def load_config(directory: Path, *, borrow: bool = False) -> Any:
    """The transformers configuration of ``directory``, with the defaults of its class filled in.

    ``borrow``: a model of :data:`BORROWED` gets that class, by whoever sees to its activation.

    No code from the directory is run, and what somebody set for runs of their own (outputs of calls,
    attention kernels) is as this machine and our calls need it. Raises :class:`CheckpointError` naming
    config.json for an unknown ``model_type``, a model that needs its own code, sizes out of bounds, and
    whatever the class refuses.
    """
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    path = directory / CONFIG_NAME
    raw = check_source(directory, as_stored=True)  # who needs dense weights has refused these
    check_sizes(raw, path)
    kind = raw["model_type"]
    borrowed = BORROWED.get(kind) if borrow else None
    kind = borrowed or kind
    if kind not in CONFIG_MAPPING:
        raise _unknown_kind(kind, raw, path)
    mappings = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not any(
        CONFIG_MAPPING[kind] in known for known in mappings
    ):  # some of these ask the hub for a backbone
        raise _no_language_model(raw, path)
    with building(directory):
        own = OUTPUTS | dict.fromkeys(("attn_implementation", "_attn_implementation"))
        own |= dict.fromkeys(("experts_implementation", "_experts_implementation"))
        if borrowed:
            fields = {key: value for key, value in raw.items() if key != "auto_map"}
            config = CONFIG_MAPPING[kind].from_dict(fields | {"model_type": kind} | own)
        else:
            config = AutoConfig.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True, **own
            )
        text = config.get_text_config()
        if not isinstance(text, PreTrainedConfig):
            raise ValueError(f"{kind!r} has no text_config")
        for part in config.sub_configs:
            for key, value in OUTPUTS.items():
                if isinstance(found := getattr(config, part, None), PreTrainedConfig):
                    setattr(found, key, value)
        sizes = vars(text)  # Gemma 4's attribute raises where layers differ
        heads, shared = (sizes.get(f"num_{which}_heads") for which in ("attention", "key_value"))
    if type(heads) is int and type(shared) is int and (shared < 1 or heads % shared):
        problem = f"num_attention_heads {heads} is no multiple of num_key_value_heads {shared}"
        raise CheckpointError(problem, file=path, fix=_INTACT)
    return config


def check_sizes(raw: Mapping[str, Any], path: Path) -> None:
    """Raises :class:`CheckpointError` for sizes and counts with which building would take memory or hours."""
    inside = raw.get("text_config")
    text = inside if isinstance(inside, dict) else raw
    for key in _SIZES:
        limit = MAX_LAYERS if _LAYERS.search(key) else MAX_FEATURES
        if key in text and (type(text[key]) is not int or not 1 <= text[key] <= limit):
            raise _out_of_range(key, text[key], 1, limit, path)
    for key, value in _numbers(raw):
        most = MAX_LAYERS if _LAYERS.search(key) else MAX_FEATURES if _EXTENTS.search(key) else None
        most = _MAX_LABELS if key == "num_labels" else most
        if most is not None and abs(value) > most:
            raise _out_of_range(key, value, 0, most, path)
    padding, vocabulary = text.get("pad_token_id"), text.get("vocab_size")
    if type(padding) is int and type(vocabulary) is int and padding >= vocabulary:
        problem = f"pad_token_id is {padding}, but vocab_size is {vocabulary}"
        raise CheckpointError(problem, file=path, fix=f"set pad_token_id below {vocabulary}, or to null")


@contextmanager
def building(directory: Path) -> Iterator[None]:
    """While open, whatever transformers raises over config.json becomes one :class:`CheckpointError`."""
    path = directory / CONFIG_NAME
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise _told(error, read_json(path), path) from None


def refusal(network: Any, directory: Path, text: str) -> str:
    """``text``, which says why the built ``network`` is refused, behind the file and what the model is."""
    what, fix = _what(read_json(directory / CONFIG_NAME), network.config)
    before, behind = f"{what}: " if what else "", f". Fix: {fix}" if fix else ""
    return one_line(f"file {directory / CONFIG_NAME}: {before}{text}{behind}")


def check_positions(config: Any, seq_len: int, directory: Path) -> None:
    """Raises :class:`CheckpointError` for windows longer than the positions that the model was made for."""
    limit = positions(config)
    if limit is not None and seq_len > limit:
        raise CheckpointError(
            f"windows of {seq_len} tokens are longer than the model's {limit} positions "
            "(max_position_embeddings)",
            file=directory / CONFIG_NAME,
            fix=f"give --seq-len {limit} or less",
        )


def check_windows(windows: torch.Tensor, directory: Path) -> None:
    """Raises :class:`CheckpointError` for token ids ``[n, seq]`` that have no embedding or no position."""
    config = load_config(directory, borrow=True)
    check_positions(config, windows.shape[-1], directory)
    vocabulary, largest = config.get_text_config().vocab_size, int(windows.max())
    if largest >= vocabulary:
        raise CheckpointError(
            f"the tokenizer gives token {largest}, but the model's vocab_size is {vocabulary}",
            file=directory,
            fix="the tokenizer belongs to another model: copy that of the model which this one was made from",
        )


def positions(config: Any) -> int | None:
    """Longest sequence by ``max_position_embeddings``, stretched as the rope's factor says; None if any."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if type(limit) is not int or limit < 1:
        return None
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type") in ("linear", "dynamic", "yarn"):
        original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
        original = original if type(original) is int else limit
        if isinstance(factor, (int, float)) and 1 <= original * factor < 1 << 40:
            limit = max(limit, int(original * factor))
    return limit


def _numbers(node: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Every integer in a JSON value with the key that it, or its list, stands under."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _numbers(value, name)
    elif isinstance(node, list):
        for value in node:
            yield from _numbers(value, key)
    elif type(node) is int:
        yield key, node


def _out_of_range(key: str, value: object, low: int, high: int, path: Path) -> CheckpointError:
    problem = f"{key} is {str(value)[:80]!r}" if isinstance(value, str) else f"{key} is {str(value)[:80]}"
    return CheckpointError(f"{problem}, expected an integer from {low} to {high}", file=path, fix=_INTACT)


def _unknown_kind(kind: str, raw: Mapping[str, Any], path: Path) -> CheckpointError:
    import transformers

    problem = f"transformers {transformers.__version__} has no model_type {kind!r}"
    if raw.get("auto_map"):
        return CheckpointError(
            f"{problem}: the model needs code of its own directory (auto_map), which is never run",
            file=path,
            fix="install a newer transformers if it has this model; else the model cannot be pruned",
        )
    said = raw.get("transformers_version")
    by = f" (config.json was written by {said})" if isinstance(said, str) else ""
    return CheckpointError(problem + by, file=path, fix=_NEWER)


def _no_language_model(raw: Mapping[str, Any], path: Path) -> CheckpointError:
    what, fix = _what(raw, None)
    problem = (
        f"model_type {raw.get('model_type')!r} is {what or 'no language model that predicts the next token'}"
    )
    return CheckpointError(problem, file=path, fix=fix or "give a causal language model")


def _told(error: Exception, raw: Mapping[str, Any], path: Path) -> CheckpointError:
    """What transformers' ``error`` says of the model, as far as it can be told from ``raw``."""
    import transformers

    told = f"transformers {transformers.__version__}"
    if isinstance(error, KeyError) and error.args and (place := _place(raw, error.args[0])):
        problem = f"{place} is {error.args[0]!r}, which {told} does not know"
        return CheckpointError(problem, file=path, fix=_NEWER)
    if str(error).startswith("Unrecognized configuration class"):
        return _no_language_model(raw, path)
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return CheckpointError(f"{told} cannot build this model ({one_line(text, 400)})", file=path, fix=_NEWER)


def _place(node: Any, value: object, path: str = "") -> str | None:
    """Keys, joined by dots, that lead to ``value`` in a JSON value."""
    if isinstance(node, dict):
        inside = (_place(child, value, f"{path}.{key}".lstrip(".")) for key, child in node.items())
        return next((found for found in inside if found), None)
    return path if isinstance(value, str) and node == value and path else None


def _what(raw: Mapping[str, Any], config: Any) -> tuple[str | None, str | None]:
    """What kind of model it is, where that alone explains a refusal, and what to do instead."""
    if any(raw.get(key) for key in _SEES):
        return "a multimodal model", "save its language model alone with transformers, and prune that"
    if raw.get("is_encoder_decoder") is True or getattr(config, "is_encoder_decoder", False) is True:
        return "an encoder-decoder model", "give a model that is a decoder alone"
    return None, None
