"""What a model is called in the card and the record of a checkpoint made from it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from vllm_spense.format.checkpoint import CONFIG_NAME, read_json
from vllm_spense.format.files import storable

_CACHED = re.compile(r"models--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)$")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")


@dataclass(frozen=True)
class BaseModel:
    """``name``: ``org/name`` where the hub's is known, else the folder's; ``revision``: a known commit."""

    name: str
    revision: str | None = None

    def record(self) -> dict[str, str]:
        """Entries of the provenance; a revision that is not known has none."""
        revision = {} if self.revision is None else {"base_revision": self.revision}
        return {"base_model": self.name, **revision}


def base_model(directory: Path) -> BaseModel:
    """The name of the model in ``directory``, however the path is written (``.``, relative, with a slash).

    A folder of the hub's cache (``models--ORG--NAME/snapshots/COMMIT``) tells name and commit. Another one is
    called by its own name; if config.json's ``_name_or_path`` is a hub name that ends in it, by that.
    """
    path = Path(os.path.abspath(directory))  # a link keeps its name: people name models by links
    for found in (path, path.resolve()):
        if cached := _CACHED.search(found.as_posix()):
            return BaseModel(cached["name"].replace("--", "/", 1), cached["revision"])
    said = read_json(path / CONFIG_NAME).get("_name_or_path")
    if isinstance(said, str) and _HUB_NAME.fullmatch(said) and said.lower().endswith(f"/{path.name.lower()}"):
        return BaseModel(said)
    return BaseModel(storable(path.name or path.resolve().name or "model"))
