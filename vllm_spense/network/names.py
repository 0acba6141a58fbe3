"""Tensors go by other names in the files than in the transformers network, which renames them as it loads.

A wrapper's language model is ``language_model.model`` in the files and ``model.language_model`` in the
network; embedding models are often stored without the prefix ``model.``. Spense checkpoints keep the names
of the files, because vLLM knows these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_spense.format import Checkpoint
from vllm_spense.models.fused import fused_groups


def stored_names(network: Any, stored: Iterable[str]) -> dict[str, str]:
    """The names ``stored`` in the files, each by the name that ``network`` has for the tensor.

    transformers' own rules decide, but none that joins tensors: parts of fused linears and single experts
    stay apart and keep the ends of their names. A tensor that the network lacks is there, too.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    known = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in network.named_buffers(remove_duplicate=False)}
    rules = [rule for rule in get_model_conversion_mapping(network) if isinstance(rule, WeightRenaming)]

    def renamed(name: str) -> str:
        new = name
        for rule in rules:
            new, _ = rule.rename_source_key(new)
        return name if new not in known and name in known else new

    found = {name: renamed(name) for name in sorted(stored)}
    prefix = f"{network.base_model_prefix}."
    bare = not any(name.startswith(prefix) for name in found.values())
    if bare and any(name.startswith(prefix) for name in known):
        found = {name: new if new in known else prefix + new for name, new in found.items()}
    elif not bare and not any(name.startswith(prefix) for name in known):
        found = {name: new.removeprefix(prefix) for name, new in found.items()}
    return {new: name for name, new in found.items()}


def module_names(names: Mapping[str, str]) -> dict[str, str]:
    """The files' name of every module that holds a tensor, by the network's name.

    ``names``: what :func:`stored_names` found.
    """
    modules: dict[str, str] = {}
    for inside, stored in names.items():
        while "." in inside and inside.rpartition(".")[2] == stored.rpartition(".")[2]:
            inside, stored = inside.rpartition(".")[0], stored.rpartition(".")[0]
            modules[inside] = stored
    return modules


@dataclass(frozen=True)
class SpenseNames:
    """What a network finds in a Spense checkpoint.

    ``modules``: each linear's Spense modules, more than one where the architecture fuses what the checkpoint
    keeps apart. ``plain``: the other tensors, each by the network's name (see :func:`stored_names`).
    """

    modules: dict[str, list[str]]
    plain: dict[str, str]


def spense_names(network: Any, checkpoint: Checkpoint) -> SpenseNames:
    """The names in ``checkpoint`` by those in ``network``."""
    weights = {f"{module}.weight" for module in checkpoint.require_spense().modules}
    names = stored_names(network, [*checkpoint.plain_tensors(), *weights])
    plain = {inside: stored for inside, stored in names.items() if stored not in weights}
    inside = {
        name.removesuffix(".weight"): stored.removesuffix(".weight")
        for name, stored in names.items()
        if stored in weights
    }
    groups = fused_groups(inside, network.config.get_text_config().model_type)
    return SpenseNames({name: [inside[part] for part in parts] for name, parts in groups.items()}, plain)
