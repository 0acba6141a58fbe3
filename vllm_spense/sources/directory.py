"""The first look at a dense model's directory: from names, first bytes and config.json, without transformers.

Every command that takes a model calls :func:`check_source` before anything else. What it lets through may
still be refused by the model's class (:mod:`vllm_spense.sources.architecture`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_spense.format.bitsandbytes import check_settings, is_bitsandbytes
from vllm_spense.format.broken_files import DOWNLOAD, EMPTY, Diagnosis, diagnose
from vllm_spense.format.checkpoint import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, Checkpoint, read_json
from vllm_spense.format.errors import CheckpointError
from vllm_spense.format.twell_config import is_twell, parse_twell_config
from vllm_spense.sources.quantised import quantisation_of, quantised_tensor
from vllm_spense.sources.tokenizer import TOKENIZER_FILES

ORIGINAL = "prune the original, unquantised model (its linears become FP8 while it is pruned)"
_CONVERT = "convert it with transformers' `save_pretrained`, which writes safetensors"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_OTHER_WEIGHTS = {
    ".gguf": Diagnosis(
        "GGUF files are for llama.cpp", "give the original model's directory (safetensors), not its GGUF form"
    ),
    ".bin": Diagnosis("its weights are pickled (.bin), and pickles are never read", _CONVERT),
    ".pt": Diagnosis("its weights are pickled (.pt), and pickles are never read", _CONVERT),
    ".pth": Diagnosis("its weights are pickled (.pth), and pickles are never read", _CONVERT),
    ".h5": Diagnosis("its weights are those of TensorFlow (.h5)", _CONVERT),
    ".msgpack": Diagnosis("its weights are those of Flax (.msgpack)", _CONVERT),
    ".onnx": Diagnosis("its weights are those of ONNX", "give the original model's directory (safetensors)"),
}
_TEXTS = (
    *TOKENIZER_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
_JSON = (".json", ".model")
_PARTIAL = (".incomplete", ".part", ".partial", ".aria2", ".crdownload", ".download", ".tmp")


def check_source(path: str | Path, *, as_stored: bool = False) -> dict[str, Any]:
    """config.json of the model directory ``path``, once nothing in it is known to be unusable.

    Weights may be missing altogether: a plan needs none. A Spense directory passes; with ``as_stored`` so do
    those of bitsandbytes and those with thresholds, as
    :func:`~vllm_spense.format.bitsandbytes.open_checkpoint` reads them. Raises :class:`CheckpointError`, one
    line with the cure, for files and empty directories, other formats (GGUF, pickles, adapters, pipelines),
    quantised models, pointers and unfinished downloads.
    """
    directory = Path(path)
    names = _names(directory)
    if CONFIG_NAME not in names:
        raise _error(_without_config(directory, names), directory)
    config = read_json(directory / CONFIG_NAME)
    _refuse_other_kinds(directory, names, config)
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        state = f"is {str(kind)[:80]!r}" if "model_type" in config else "is missing"
        raise CheckpointError(
            f"model_type {state}", file=directory / CONFIG_NAME, fix="get an intact config.json"
        )
    if as_stored and is_bitsandbytes(config):
        check_settings(config["quantization_config"], directory / CONFIG_NAME)
    elif as_stored and is_twell(config):
        parse_twell_config(config["quantization_config"], directory / CONFIG_NAME)
    elif method := quantisation_of(config, directory):
        problem = f"the model is already quantised ({method})"
        raise CheckpointError(problem, file=directory / CONFIG_NAME, fix=ORIGINAL)
    for name in _TEXTS:
        found = diagnose(directory / name) if name in names else None
        if found and (found != EMPTY or name.endswith(_JSON)):  # an empty template or list of merges is one
            raise _error(found, directory / name)
    _check_weights(directory, names)
    return config


def check_tensors(checkpoint: Checkpoint) -> None:
    """Raises :class:`CheckpointError` for tensors that only quantised models have."""
    if checkpoint.quantization is None and (found := quantised_tensor(checkpoint.tensors)):
        name, method = found
        raise CheckpointError(
            f"the model is already quantised ({method} leaves such a tensor)",
            file=checkpoint.tensors[name].file,
            tensor=name,
            fix=ORIGINAL,
        )


def _names(directory: Path) -> set[str]:
    if directory.is_file():
        other = _OTHER_WEIGHTS.get(directory.suffix)
        fix = f"give the directory that it lies in, {directory.absolute().parent}"
        raise _error(other or Diagnosis("this is a file, not a model directory", fix), directory)
    try:
        names = set(os.listdir(directory))
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        problem = "no such directory" if missing else f"the directory cannot be read ({error.strerror})"
        raise CheckpointError(problem, file=directory, fix="give a Hugging Face model directory") from None
    if not names:
        raise CheckpointError("the directory is empty", file=directory, fix=DOWNLOAD)
    return names


def _without_config(directory: Path, names: set[str]) -> Diagnosis:
    """What a directory without config.json is."""
    if "adapter_config.json" in names:
        return _adapter(directory)
    if "model_index.json" in names:
        return Diagnosis(
            "this is a diffusion pipeline, no language model", "give the directory of a language model"
        )
    if "params.json" in names:
        return Diagnosis(
            "config.json is missing: this is the original format of Meta or Mistral (params.json)",
            "give the model in transformers' format (published beside it, or made by its convert script)",
        )
    if (directory / "snapshots").is_dir():
        commits = sorted(p.name for p in (directory / "snapshots").iterdir() if (p / CONFIG_NAME).exists())
        inside = f"{directory}/snapshots/{commits[-1]}" if commits else "a folder inside snapshots/"
        return Diagnosis("this is a model's folder in the hub's cache, one level too high", f"give {inside}")
    if other := _other_weights(names):
        return other
    below = sorted(name for name in names if os.path.isfile(directory / name / CONFIG_NAME))
    if below:
        return Diagnosis(f"config.json is missing here; {below[0]}/ has one", f"give {directory / below[0]}")
    return Diagnosis("config.json is missing", "give a Hugging Face model directory")


def _refuse_other_kinds(directory: Path, names: set[str], config: dict[str, Any]) -> None:
    if "adapter_config.json" in names:
        raise _error(_adapter(directory), directory)
    if "_diffusers_version" in config:
        problem = "this is a part of a diffusion pipeline, no language model"
        raise CheckpointError(
            problem, file=directory / CONFIG_NAME, fix="give the directory of a language model"
        )
    if not any(name.endswith((".safetensors", INDEX_NAME)) for name in names):
        unfinished = next((name for name in sorted(names) if name.endswith(_PARTIAL)), None)
        if unfinished:
            raise CheckpointError("the download did not finish", file=directory / unfinished, fix=DOWNLOAD)
        if other := _other_weights(names):
            raise _error(other, directory)


def _check_weights(directory: Path, names: set[str]) -> None:
    """Files of weights that are there must be whole, and all of their like must be there."""
    wanted = [SINGLE_NAME] if SINGLE_NAME in names else []
    if INDEX_NAME in names:
        entries = read_json(directory / INDEX_NAME).get("weight_map")
        found = entries.values() if isinstance(entries, dict) else ()
        wanted = sorted({name for name in found if isinstance(name, str) and Path(name).name == name})
        _refuse_missing(directory, wanted, names, f"that {INDEX_NAME} names")
    elif not wanted and (shards := [match for name in names if (match := _SHARD.fullmatch(name))]):
        count = int(shards[0][2])
        of = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, min(count, 99_999) + 1)]
        _refuse_missing(directory, of, names, f"of {count}")
        raise CheckpointError(f"{INDEX_NAME} is missing", file=directory, fix=DOWNLOAD)
    elif not wanted and (others := sorted(name for name in names if name.endswith(".safetensors"))):
        problem = f"neither {SINGLE_NAME} nor {INDEX_NAME} is there, only {others[0]}"
        raise CheckpointError(problem, file=directory, fix=_CONVERT)
    for name in wanted:
        if name in names and (broken := diagnose(directory / name)):
            raise _error(broken, directory / name)


def _refuse_missing(directory: Path, wanted: list[str], names: set[str], which: str) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of the {len(wanted)} weight files {which} are missing, this one first: "
            "the download did not finish",
            file=directory / missing[0],
            fix=DOWNLOAD,
        )


def _other_weights(names: Iterable[str]) -> Diagnosis | None:
    """Weights of another format that lie there, GGUF before pickles."""
    endings = {os.path.splitext(name)[1] for name in names if not name.startswith("training_args")}
    return next((found for ending, found in _OTHER_WEIGHTS.items() if ending in endings), None)


def _adapter(directory: Path) -> Diagnosis:
    try:
        base = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
    except CheckpointError:
        base = None
    of = f" of {base}" if isinstance(base, str) and base else ""
    both = CONFIG_NAME in os.listdir(directory)
    return Diagnosis(
        f"a PEFT adapter{of} lies beside the model" if both else f"this is a PEFT adapter{of}, no model",
        "merge it into its model first (peft: merge_and_unload, then save_pretrained), or prune that model",
    )


def _error(found: Diagnosis, file: Path) -> CheckpointError:
    return CheckpointError(found.problem, file=file, fix=found.fix)
