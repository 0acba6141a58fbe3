"""Read a checkpoint directory: config, index and tensor headers, every name checked before use."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_spense.format.broken_files import Diagnosis, diagnose
from vllm_spense.format.codecs import tensor_names
from vllm_spense.format.errors import REPRUNE, CheckpointError
from vllm_spense.format.layout import Layout
from vllm_spense.format.linear import LinearFormat
from vllm_spense.format.manifest import read_text_file
from vllm_spense.format.schema import AnyCheckpointConfig, parse_config

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_JSON_BYTES = 1 << 26
"""Ten times the index of the largest models; parsed, JSON can take twenty times its size in memory."""


@dataclass(frozen=True)
class TensorInfo:
    """Header entry of one stored tensor; ``dtype`` in safetensors' spelling (``F8_E4M3``, ``U8``…)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> Any:
    """Parse a JSON object file; :class:`CheckpointError` names the file when it cannot be read."""
    try:
        raw = json.loads(read_text_file(path, _MAX_JSON_BYTES))
    except (ValueError, OSError, RecursionError) as error:
        found = diagnose(path) or Diagnosis(f"not valid JSON ({error})", REPRUNE)
        raise CheckpointError(found.problem, file=path, fix=found.fix) from None
    if not isinstance(raw, dict):
        raise CheckpointError("the top level must be an object", file=path, fix=REPRUNE)
    return raw


class Checkpoint:
    """A local Hugging Face directory, dense or Spense, opened for reading.

    Opening reads JSON and safetensors headers only. ``quantization`` is None for a directory without
    ``quantization_config``. Raises :class:`CheckpointError` for unreadable or contradictory files.
    """

    foreign = False
    """Whether another program wrote it: it has no manifest, and opening has compared its modules' headers."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(
                "no such directory", file=self.directory, fix="give a Hugging Face model directory"
            )
        self.config: dict[str, Any] = read_json(self.directory / CONFIG_NAME)
        raw = self.config.get("quantization_config")
        self.quantization: AnyCheckpointConfig | None = None if raw is None else self._parse(raw)
        self.tensors: dict[str, TensorInfo] = self._read_headers()

    def _parse(self, raw: object) -> AnyCheckpointConfig | None:
        return parse_config(raw, self.directory / CONFIG_NAME)

    def require_spense(self) -> AnyCheckpointConfig:
        """The Spense configuration, or an error that says how to get one."""
        if self.quantization is None:
            raise CheckpointError(
                "config.json has no quantization_config, so this is no Spense checkpoint",
                file=self.directory,
                fix="make one with `spense prune MODEL -o OUT`",
            )
        return self.quantization

    # -- tensors ---------------------------------------------------------------------------------

    def load(self, name: str) -> torch.Tensor:
        """One tensor on the CPU."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError("the tensor is missing", file=self.directory, tensor=name, fix=REPRUNE)
        with _open(info.file) as stream:
            return stream.get_tensor(name)

    def linear(self, module: str) -> LinearFormat:
        """What is stored of one module."""
        return self.require_spense().linear(module)

    def layout(self, module: str) -> Layout:
        return self.linear(module).layout

    def module_tensors(self, module: str) -> dict[str, torch.Tensor]:
        """The Spense tensors of one module, by short name."""
        return {name: self.load(f"{module}.{name}") for name in self.linear(module).held()}

    def stored_bytes(self, module: str) -> int:
        """What files hold of one module, without the bias."""
        return self.linear(module).nbytes()

    def module_weight(self, module: str) -> torch.Tensor:
        """``[N, K]`` fp32: the values that kernels compute with, zeros written out."""
        return self.linear(module).decode(self.module_tensors(module))

    def plain_tensors(self) -> Iterator[str]:
        """Names of all tensors that belong to no Spense module (norms, embeddings, heads)."""
        modules = self.quantization.modules if self.quantization else {}
        ours = tensor_names() | {"bias"}
        for name in self.tensors:
            module, _, short = name.rpartition(".")
            if not (module in modules and short in ours):
                yield name

    # -- headers ---------------------------------------------------------------------------------

    def _files(self) -> dict[Path, set[str] | None]:
        """Weight files, each with the tensor names that the index promises in it (None: no index)."""
        index_path = self.directory / INDEX_NAME
        if not index_path.exists():
            single = self.directory / SINGLE_NAME
            if not single.is_file():
                raise CheckpointError(
                    f"neither {SINGLE_NAME} nor {INDEX_NAME} is there",
                    file=self.directory,
                    fix="only safetensors checkpoints are read; convert with `save_pretrained`",
                )
            return {single: None}
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError("weight_map is missing or empty", file=index_path, fix=REPRUNE)
        files: dict[Path, set[str] | None] = {}
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"weight_map names the file {name!r}, which is no plain *.safetensors name",
                    file=index_path,
                    tensor=tensor,
                    fix=REPRUNE,
                )
            names = files.setdefault(self.directory / name, set())
            assert names is not None
            names.add(tensor)
        return files

    def _read_headers(self) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        files = self._files()
        for file, promised in files.items():
            if not os.path.isfile(file):  # Path.is_file raises on a name that is too long
                raise CheckpointError("the weight file is missing", file=file, fix=REPRUNE)
            with _open(file) as stream:
                stored = set(stream.keys())
                if promised is not None and stored != promised:
                    tensor = sorted(stored ^ promised)[0]
                    state = "not in the file" if tensor in promised else "not in the index"
                    raise CheckpointError(
                        f"the index and the file disagree: the tensor is {state}",
                        file=file,
                        tensor=tensor,
                        fix=REPRUNE,
                    )
                for name in sorted(stored):
                    view = stream.get_slice(name)
                    found[name] = TensorInfo(file, view.get_dtype(), tuple(view.get_shape()))
        if stray := self._stray(files):
            raise CheckpointError(
                f"weight file that {INDEX_NAME} does not name"
                if (self.directory / INDEX_NAME).exists()
                else f"second weight file beside {SINGLE_NAME} without an index",
                file=stray[0],
                fix="remove the file; vLLM would load tensors from it",
            )
        return found

    def _stray(self, files: Iterable[Path]) -> list[Path]:
        """Weight files from which this checkpoint could be read otherwise than from ``files``.

        Of a dense one everybody reads what its index names, and the same weights once more in Mistral's own
        format (consolidated*) by that name alone. We write no such file, and vLLM would prefer it.
        """
        stray = set(self.directory.glob("*.safetensors")) - set(files)
        if self.quantization is None:
            indexed = (self.directory / INDEX_NAME).exists()
            stray = {f for f in stray if not indexed and not f.name.startswith("consolidated")}
        return sorted(stray)


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as stream:
            yield stream
    except (SafetensorError, OSError, RuntimeError, MemoryError) as error:  # the last: address space
        found = diagnose(file) or Diagnosis(f"the safetensors file cannot be read ({error})", REPRUNE)
        raise CheckpointError(found.problem, file=file, fix=found.fix) from None
