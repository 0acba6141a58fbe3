"""Model directories that people bring and that are refused: each an edit of a good one, and what is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ORIGINAL = "Fix: prune the original, unquantised model"
DOWNLOAD = "Fix: download or copy the model again"
Edit = Callable[[Path], object]


@dataclass(frozen=True)
class Refused:
    """``edit`` makes a good directory bad; ``message``: a regular expression for what is said of it.

    ``evaluated``: the same where evaluation, which reads more, says something else.
    """

    edit: Edit
    message: str
    evaluated: str | None = None


def write(name: str, text: str) -> Edit:
    return lambda d: (d / name).write_text(text)


def config(**changes: Any) -> Edit:
    """Change keys of config.json; a value of ``...`` removes the key."""

    def edit(directory: Path) -> None:
        path = directory / "config.json"
        raw = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))

    return edit


def quantised(**entries: Any) -> Edit:
    return config(quantization_config=entries)


def only(*keep: str, **new: str) -> Edit:
    """Keep the files ``keep`` and write ``new`` ones (``__`` stands for a dot)."""

    def edit(directory: Path) -> None:
        for path in directory.iterdir():
            if path.name not in keep:
                path.unlink()
        for name, text in new.items():
            (directory / name.replace("__", ".")).write_text(text)

    return edit


def moved(old: str, new: str) -> Edit:
    return lambda d: (d / old).rename(d / new)


def both(*edits: Edit) -> Edit:
    return lambda d: [edit(d) for edit in edits]


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def edit(directory: Path) -> None:
        state = load_file(directory / WEIGHTS)
        change(state)
        save_file(state, directory / WEIGHTS, metadata={"format": "pt"})

    return edit


def sharded(directory: Path) -> None:
    """Two weight files with an index."""
    state = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = sorted(state)
    where: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def cut(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[: len(data) // 2])


def cached(directory: Path) -> None:
    """The folder above ``snapshots``, as in the hub's cache."""
    below = directory / "snapshots" / "0123abcd"
    below.mkdir(parents=True)
    for path in [p for p in directory.iterdir() if p.is_file()]:
        path.rename(below / path.name)


def inside(directory: Path) -> None:
    (directory / "checkpoint-500").mkdir()
    for path in [p for p in directory.iterdir() if p.is_file()]:
        path.rename(directory / "checkpoint-500" / path.name)


def dangling(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to(directory / "blobs" / "1234")


def as_file(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_text("x")


FILES: dict[str, Refused] = {
    "gptq": Refused(
        quantised(quant_method="gptq", bits=4), rf"already quantised \(gptq, 4 bits\)\. {ORIGINAL}"
    ),
    "awq": Refused(quantised(quant_method="awq", bits=4), rf"already quantised \(awq, 4 bits\)\. {ORIGINAL}"),
    "fp8 in blocks": Refused(
        quantised(quant_method="fp8", weight_block_size=[128, 128]),
        rf"already quantised \(fp8\)\. {ORIGINAL}",
    ),
    "bitsandbytes": Refused(
        quantised(quant_method="bitsandbytes", load_in_4bit=True),
        r"quantised \(bitsandbytes\)",
        "config.json says bitsandbytes, and no weight is stored in 4 bits",
    ),
    "bitsandbytes, 8 bits": Refused(
        quantised(quant_method="bitsandbytes", load_in_8bit=True),
        r"quantised \(bitsandbytes\)",
        r"8-bit bitsandbytes \(LLM.int8\) is not supported",
    ),
    "bitsandbytes, old": Refused(
        quantised(load_in_8bit=True, llm_int8_threshold=6.0), r"quantised \(bitsandbytes\)"
    ),
    "compressed-tensors": Refused(
        quantised(quant_method="compressed-tensors", format="float-quantized"),
        r"quantised \(compressed-tensors\)",
    ),
    "compressed-tensors, old": Refused(
        config(compression_config={"format": "pack-quantized"}), r"quantised \(pack-quantized\)"
    ),
    "modelopt": Refused(quantised(quant_algo="NVFP4", producer={"name": "modelopt"}), r"quantised \(NVFP4\)"),
    "modelopt, a file": Refused(write("hf_quant_config.json", "{}"), r"quantised \(ModelOpt\)"),
    "autogptq, a file": Refused(write("quantize_config.json", '{"bits": 4}'), r"quantised \(GPTQ\)"),
    "mxfp4": Refused(quantised(quant_method="mxfp4"), r"quantised \(mxfp4\)"),
    "mlx": Refused(config(quantization={"group_size": 64, "bits": 4}), r"quantised \(MLX, 4 bits\)"),
    "quantised text model": Refused(
        config(text_config={"quantization_config": {"quant_method": "fp8"}}), r"quantised \(fp8\)"
    ),
    "quantised without a word": Refused(
        tensors(lambda s: s.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(2, 2)})),
        r"up_proj\.qweight: the model is already quantised \(GPTQ or AWQ leaves such a tensor\)",
    ),
    "pointer for weights": Refused(
        write(WEIGHTS, LFS),
        rf"{WEIGHTS}: this is a Git LFS pointer, not the.*git lfs pull",
    ),
    "pointer for config.json": Refused(write("config.json", LFS), r"config\.json: this is a Git LFS pointer"),
    "pointer for the tokenizer": Refused(
        write("tokenizer.json", LFS), r"tokenizer\.json: this is a Git LFS pointer"
    ),
    "pointer for a shard": Refused(
        both(sharded, write("model-00002-of-00002.safetensors", LFS)),
        r"model-00002-of-00002\.safetensors: this is a Git LFS pointer",
    ),
    "pointer for the index": Refused(both(sharded, write(INDEX, LFS)), rf"{INDEX}: this is a Git LFS"),
    "web page for config.json": Refused(
        write("config.json", "<!DOCTYPE html>\n<html>Sign in</html>"), r"config\.json: this is a web page"
    ),
    "weights cut": Refused(cut, rf"{WEIGHTS}: the file ends after \d+ of \d+ bytes.*{DOWNLOAD}"),
    "empty weights": Refused(write(WEIGHTS, ""), rf"{WEIGHTS}: the file is empty\. {DOWNLOAD}"),
    "empty tokenizer": Refused(write("tokenizer.json", ""), r"tokenizer\.json: the file is empty"),
    "shard missing": Refused(
        both(sharded, lambda d: (d / "model-00001-of-00002.safetensors").unlink()),
        r"model-00001-of-00002\.safetensors: 1 of the 2 weight files that \S+ names are missing.*"
        rf"did not finish\. {DOWNLOAD}",
    ),
    "index missing": Refused(
        both(sharded, lambda d: (d / INDEX).unlink()), rf"{INDEX} is missing\. {DOWNLOAD}"
    ),
    "index and shard missing": Refused(
        both(sharded, lambda d: [(d / n).unlink() for n in (INDEX, "model-00001-of-00002.safetensors")]),
        r"1 of the 2 weight files of 2 are missing",
    ),
    "unfinished": Refused(
        moved(WEIGHTS, f"{WEIGHTS}.incomplete"), rf"{WEIGHTS}\.incomplete: the download did not finish"
    ),
    "link into a cleared cache": Refused(dangling, rf"{WEIGHTS}: the link leads to nothing"),
    "adapter": Refused(
        only(adapter_config__json='{"base_model_name_or_path": "org/base"}'),
        r"this is a PEFT adapter of org/base, no model\. Fix: merge it",
    ),
    "adapter beside the model": Refused(
        write("adapter_config.json", "{}"), "a PEFT adapter lies beside the model"
    ),
    "gguf alone": Refused(only(model_Q4__gguf="GGUF"), r"GGUF files are for llama\.cpp\. Fix: give the orig"),
    "gguf beside config.json": Refused(
        both(only("config.json"), write("m.gguf", "GGUF")), r"GGUF files are for llama\.cpp"
    ),
    "gguf under another name": Refused(write(WEIGHTS, "GGUF" + "\0" * 600), "this is a GGUF file"),
    "pickled": Refused(moved(WEIGHTS, "pytorch_model.bin"), r"pickled \(\.bin\), and pickles are never read"),
    "pickle under another name": Refused(
        write(WEIGHTS, "PK\x03\x04" + "\0" * 600), r"a zip archive, as torch\.save writes it"
    ),
    "tensorflow": Refused(moved(WEIGHTS, "tf_model.h5"), r"TensorFlow \(\.h5\)"),
    "safetensors under another name": Refused(
        moved(WEIGHTS, "weights.safetensors"), rf"neither {WEIGHTS} nor {INDEX} is there, only weights"
    ),
    "diffusion pipeline": Refused(only(model_index__json="{}"), r"a diffusion pipeline, no language model"),
    "diffusion part": Refused(config(_diffusers_version="0.30"), r"part of a diffusion pipeline"),
    "original format": Refused(only(params__json="{}"), r"original format of Meta or Mistral"),
    "folder of the cache": Refused(cached, r"one level too high\. Fix: give \S+/snapshots/0123abcd"),
    "folder of a training run": Refused(inside, r"checkpoint-500/ has one\. Fix: give \S+/checkpoint-500"),
    "empty folder": Refused(only(), r"the directory is empty"),
    "no config.json": Refused(lambda d: (d / "config.json").unlink(), r"config\.json is missing\. Fix"),
    "a file": Refused(as_file, r"this is a file, not a model directory\. Fix: give the directory"),
    "config.json is no object": Refused(write("config.json", "[]"), r"the top level must be an object"),
}
"""What :func:`vllm_spense.sources.check_source` and :func:`check_tensors` refuse, without transformers."""


def make(case: Refused, good: Path, out: Path) -> Path:
    """A copy of ``good`` that is refused as ``case``; returns ``out``."""
    shutil.copytree(good, out)
    case.edit(out)
    return out
