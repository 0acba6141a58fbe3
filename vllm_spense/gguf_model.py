"""A model in one GGUF file, read to be written out as a Hugging Face directory with bf16 weights.

Quantised tensors are dequantised. What differs between architectures (names, reordered or shifted tensors,
configuration) is the caller's. Needs the packages gguf and transformers (``pip install vllm-spense[demo]``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


class GgufModel:
    """An open GGUF file. Raises ``RuntimeError`` when the package gguf or transformers is missing."""

    def __init__(self, path: Path) -> None:
        try:
            import transformers  # noqa: F401
            from gguf import GGUFReader
        except ImportError as error:
            raise RuntimeError(
                f"{error.name} is missing; install it with `pip install vllm-spense[demo]`"
            ) from None
        self.path = path
        self._reader = GGUFReader(path)

    def field(self, name: str) -> Any:
        """A value of the file's header by its full name."""
        return self._reader.fields[name].contents()

    def tensors(
        self,
        names: Mapping[str, str],
        convert: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, weight: weight,
    ) -> dict[str, torch.Tensor]:
        """All tensors in bf16 under their Hugging Face names, sorted.

        ``names``: GGUF name to Hugging Face name; those of a layer without ``blk.N.`` and
        ``model.layers.N.``. ``convert``: gets that short GGUF name and the fp32 tensor.
        """
        from gguf import dequantize

        found: dict[str, torch.Tensor] = {}
        for entry in self._reader.tensors:
            name, prefix = entry.name, ""
            if name.startswith("blk."):
                _, layer, name = name.split(".", 2)
                prefix = f"model.layers.{layer}."
            weight = convert(name, torch.tensor(dequantize(entry.data, entry.tensor_type)))
            found[prefix + names[name]] = weight.to(torch.bfloat16).contiguous()
        return dict(sorted(found.items()))

    def tokenizer(self) -> Any:
        """As transformers reads it from the file."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)

    def special_tokens(self) -> dict[str, int]:
        """Ids of BOS, EOS and padding, as configurations name them."""
        return {
            "bos_token_id": self.field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.field("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.field("tokenizer.ggml.padding_token_id"),
        }

    def write(
        self, out: Path, tensors: dict[str, torch.Tensor], tokenizer: Any, config: dict[str, Any]
    ) -> None:
        """Fill the directory ``out``: one safetensors file, tokenizer, config and generation config.

        ``config`` is completed by the special tokens.
        """
        from safetensors.torch import save_file

        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        (out / "model.safetensors").chmod(0o644)
        tokenizer.model_max_length = config["max_position_embeddings"]
        tokenizer.save_pretrained(out)
        path = out / "tokenizer_config.json"
        aside = ("is_local", "local_files_only", "backend")
        saved = {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k not in aside}
        _write_json(path, saved | {"tokenizer_class": "PreTrainedTokenizerFast"})
        _write_json(out / "config.json", config | self.special_tokens())
        _write_json(out / "generation_config.json", self.special_tokens())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
