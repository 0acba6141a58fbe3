"""Attention as a target of pruning: which groups of heads stay dense, and where they are stored.

A group is one key/value head with the query heads that read it. Attention does not depend on the order of
its groups, for rotary embeddings are the same in all heads; inside a head no feature can move. So the rows
of q, k and v and the columns of o move by whole groups, those of the dense groups to the end.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import nn

from vllm_spense.format import Layout
from vllm_spense.models.families import ATTENTION_INNER, ATTENTION_OUT
from vllm_spense.models.parts import DecoderLayer, UnsupportedModelError
from vllm_spense.pruning.activations import LayerInputs, Stop, watching
from vllm_spense.pruning.choice.selection import index_scores, permutation, permute_columns, permute_rows
from vllm_spense.pruning.config import PruneConfig
from vllm_spense.pruning.solvers.hessian import Hessian, squares

_SHARED_NORM = re.compile(r"[qk]_(layer)?norm\.(weight|bias)")
"""Norms of queries and keys that all heads share (Qwen3, Gemma 3, Phi), if they are as long as one head."""


@dataclass(frozen=True)
class Attention:
    """The projections of one attention block: ``inner`` (q, k, v by full checkpoint name) and ``out``.

    ``groups`` of heads, of which ``dense`` stay dense. Nothing but these linears holds parameters along
    the heads, and nothing else tells one head from another.
    """

    name: str
    inner: dict[str, nn.Linear]
    out_name: str
    out: nn.Linear
    groups: int
    dense: int

    @property
    def reader(self) -> nn.Linear:
        """q; k and v read the same input."""
        return next(iter(self.inner.values()))

    @property
    def linears(self) -> dict[str, nn.Linear]:
        return {**self.inner, self.out_name: self.out}

    def layouts(self) -> dict[str, Layout]:
        """By full name; ``ValueError`` for sizes that no layout fits."""
        sparse = self.groups - self.dense
        found = {}
        try:
            for name, linear in self.inner.items():
                n, k = linear.weight.shape
                found[name] = Layout("output", n, k, n // self.groups * sparse)
            n, k = self.out.weight.shape
            found[self.out_name] = Layout("input", n, k, k // self.groups * sparse)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        return found


def target(layer: DecoderLayer, config: PruneConfig) -> Attention | None:
    """The attention of ``layer`` if ``config`` prunes it, else None.

    Raises :class:`UnsupportedModelError` for attention in which the order of heads matters or that has
    another form, ``ValueError`` for a dense ratio that leaves nothing to prune.
    """
    if config.attention_ratio == 1:
        return None
    name = next(found for found, block in layer.module.named_children() if block is layer.attention_block)
    name = f"{layer.name}.{name}"
    if name.endswith("linear_attn"):
        raise _unsupported(name, "linear attention keeps a state per head")
    if any(full.startswith(f"{name}.") for full in layer.plain):
        raise _unsupported(name, "vLLM serves this model's attention as it is stored only")
    linears = {short: layer.dense.get(f"{name}.{short}") for short in (*ATTENTION_INNER, *ATTENTION_OUT)}
    inner = {f"{name}.{short}": linear for short in ATTENTION_INNER if (linear := linears[short]) is not None}
    outs = [(f"{name}.{short}", linear) for short in ATTENTION_OUT if (linear := linears[short]) is not None]
    if len(inner) < len(ATTENTION_INNER) or len(outs) != 1:
        raise _unsupported(name, f"it has no plain linears {', '.join(ATTENTION_INNER)} and o_proj")
    out_name, out = outs[0]
    q, k, v = (linear.out_features for linear in inner.values())
    head = getattr(layer.attention_block, "head_dim", 0)
    if not head or k % head or q % k or v != k or out.in_features != q:
        sizes = f"q has {q}, k {k} and v {v} outputs, o {out.in_features} inputs, a head {head} features"
        raise _unsupported(name, f"its sizes are not those of plain heads: {sizes}")
    own = {id(p) for linear in (*inner.values(), out) for p in linear.parameters()}
    for child, parameter in layer.attention_block.named_parameters():
        shared = _SHARED_NORM.fullmatch(child) and parameter.shape == (head,)
        if id(parameter) not in own and not shared:
            raise _unsupported(name, f"{child} {list(parameter.shape)} may tell heads apart")
    for child, _ in layer.attention_block.named_buffers():
        raise _unsupported(name, f"the buffer {child} may tell heads apart")
    groups = k // head
    return Attention(name, inner, out_name, out, groups, _dense_groups(name, groups, config.attention_ratio))


def _dense_groups(name: str, groups: int, ratio: float) -> int:
    """The whole number nearest to ``ratio`` · groups (half: up)."""
    dense = math.floor(ratio * groups + 0.5)
    if dense == groups:
        raise ValueError(
            f"{name}: of {groups} key/value heads, a dense ratio of {ratio:g} leaves none to prune; choose a "
            "lower --attention-dense-ratio"
        )
    return dense


def _unsupported(name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name} cannot be pruned: {reason}; --targets mlp leaves attention dense")


# -- statistics ----------------------------------------------------------------------------------


def observe(
    attention: Attention, index: int, layer: DecoderLayer, inputs: LayerInputs, scored: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hessian in front of q, k and v and, if ``scored``, sums of squares in front of o, of all samples."""
    device = attention.out.weight.device
    h_in = Hessian(attention.reader.in_features, device)
    sums = torch.zeros(attention.out.in_features, device=device)

    def see_inner(x: torch.Tensor) -> None:
        h_in.add(x)
        if not scored:
            raise Stop

    def see_out(x: torch.Tensor) -> None:
        sums.add_(squares(x))
        raise Stop

    with watching(attention.reader, see_inner), watching(attention.out, see_out):
        inputs.feed(index, layer.module)
    return h_in.matrix(next(iter(attention.inner))), sums if scored else None


def observe_out(attention: Attention, index: int, layer: DecoderLayer, inputs: LayerInputs) -> torch.Tensor:
    """Hessian in front of o, behind q, k and v as they are now."""
    h = Hessian(attention.out.in_features, attention.out.weight.device)

    def see(x: torch.Tensor) -> None:
        h.add(x)
        raise Stop

    with watching(attention.out, see):
        inputs.feed(index, layer.module)
    return h.matrix(attention.out_name)


# -- changes -------------------------------------------------------------------------------------


def group_order(
    attention: Attention, h_in: torch.Tensor | None, squares: torch.Tensor | None
) -> torch.Tensor:
    """Order [groups] with the dense groups, the highest scored ones, at the end; on the CPU."""
    scores = None
    if h_in is not None and squares is not None:
        inner = [linear.weight.float() for linear in attention.inner.values()]
        scores = index_scores(inner, attention.out.weight.float(), h_in, squares, attention.groups)
    return permutation(scores, attention.groups, attention.dense)


def move_groups(attention: Attention, order: torch.Tensor) -> dict[str, torch.Tensor]:
    """Put the groups into ``order [groups]``, in place; returns the order of the rows of q, k and v."""
    rows = {name: _of_features(order, linear.out_features) for name, linear in attention.inner.items()}
    for name, linear in attention.inner.items():
        permute_rows(linear, rows[name])
    permute_columns(attention.out, _of_features(order, attention.out.in_features))
    return rows


def _of_features(order: torch.Tensor, features: int) -> torch.Tensor:
    """The order of all ``features`` of which each group holds an equal run."""
    return torch.arange(features).view(len(order), -1)[order].flatten()
