"""What the linears of a decoder layer are called, and what becomes of each.

The MLPs' are pruned; those of attention are rounded to FP8, or stay as they are where that cannot be.
"""

from __future__ import annotations

import re

from vllm_spense.format.layout import Split

MLP_FORMS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
)
"""Inner linears, gate first where there is one, and down."""

MLP_SPLITS: dict[str, Split] = {
    **{name: "output" for inner, _ in MLP_FORMS for name in inner},
    **{down: "input" for _, down in MLP_FORMS},
}
"""What each linear of an MLP is split by into a 2:4 region and a dense one."""

_SMALL = re.compile(r"\.(linear_attn\.in_proj_(a|b|ba)|per_layer_(input_gate|projection|model_projection))$")
"""Gates with an output per head of linear attention, and what mixes Gemma 4's inputs per layer."""
_TOWERS = re.compile(r"(model\.)?(visual|vision|audio|multi_modal|mm_|embed_(vision|audio))")
"""How the names of what a multimodal wrapper has beside its text model begin."""
_ROUTER = re.compile(r"\.router\.")
_UNNAMED_BLOCKS = frozenset({"falcon_h1"})
"""Models whose attention vLLM builds under names of no checkpoint (``layers.0.qkv_proj``)."""


def stays_as_stored(name: str, model_type: str) -> bool:
    """Whether a linear outside the experts is never rounded to FP8, neither by pruning nor in load-time mode.

    These are routers, small gates, all of Falcon-H1's attention and state space, and whatever sees or hears.
    ``name`` is that of a module in a checkpoint or of a layer in vLLM.
    """
    if _SMALL.search(name) or _ROUTER.search(name) or _TOWERS.match(name):
        return True
    last = name.rpartition(".")[2]
    return model_type in _UNNAMED_BLOCKS and last not in MLP_SPLITS and last != "gate_up_proj"
