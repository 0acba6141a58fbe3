"""What is pruned and packed of each decoder layer: found once, before anything is pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from vllm_spense.format import Codecs, Layout
from vllm_spense.format.codecs import codec
from vllm_spense.models.parts import DecoderLayer, Mlp
from vllm_spense.pruning.choice.attention import Attention, target
from vllm_spense.pruning.choice.selection import dense_count
from vllm_spense.pruning.config import PruneConfig


@dataclass(frozen=True)
class LayerTargets:
    """One decoder ``layer``: the ``layouts`` of its packed linears by module name, and its ``attention`` if
    that is pruned."""

    layer: DecoderLayer
    attention: Attention | None
    layouts: dict[str, Layout]

    @property
    def pruned(self) -> frozenset[str]:
        """Names of the linears with a region to choose; the others are only stored."""
        mlp = self.layer.mlp
        names = set() if mlp is None else {*mlp.inner, mlp.down_name}
        return frozenset(names if self.attention is None else names | set(self.attention.linears))

    def codecs(self, name: str, config: PruneConfig) -> Codecs:
        """How one of the linears is stored."""
        return config.codecs if name in self.pruned else Codecs.of(config.weight_dtype)

    def with_dense(self, dense: int) -> LayerTargets:
        """The same with ``dense`` dense indices in the MLP; ``ValueError`` where no layout fits."""
        mlp = self.layer.mlp
        return self if mlp is None else replace(self, layouts=self.layouts | _mlp_layouts(mlp, dense))


def find_targets(layers: Sequence[DecoderLayer], config: PruneConfig) -> list[LayerTargets]:
    """What ``config`` prunes of ``layers``, with the same dense ratio in every layer.

    Raises ``ValueError`` for sizes that no layout fits, and what :func:`~.choice.attention.target` raises.
    """
    return [layer_targets(layer, config) for layer in layers]


def layer_targets(layer: DecoderLayer, config: PruneConfig) -> LayerTargets:
    """What ``config`` prunes of one layer."""
    layouts: dict[str, Layout] = {}
    if layer.mlp is not None:
        dense = dense_count(layer.mlp.intermediate, config.dense_ratio, config.alignment)
        layouts = _mlp_layouts(layer.mlp, dense)
    if codec(config.weight_dtype).everywhere:
        layouts |= {
            name: Layout("output", linear.out_features, linear.in_features, 0)
            for name, linear in layer.dense.items()
        }
    attention = target(layer, config)
    return LayerTargets(layer, attention, layouts if attention is None else layouts | attention.layouts())


def linears_of(layer: DecoderLayer) -> dict[str, nn.Linear]:
    """The linears that pruning or rounding changes, by their names in the checkpoint."""
    mlp = {} if layer.mlp is None else {**layer.mlp.inner, layer.mlp.down_name: layer.mlp.down}
    return {**mlp, **layer.dense}


def _mlp_layouts(mlp: Mlp, dense: int) -> dict[str, Layout]:
    try:
        rows, cols = mlp.shape.layouts(dense)
    except ValueError as error:
        raise ValueError(f"{mlp.name}: {error}") from None
    return dict.fromkeys(mlp.inner, rows) | {mlp.down_name: cols}
