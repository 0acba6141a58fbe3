"""The one table of how model families differ, and of what the linears of a decoder layer are called.

A new family is an entry in :data:`FAMILIES`, unless it is built like Llama; a new name is one in a tuple of
names. Pruning, export, serving, planning and tuning read both here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vllm_spense.format.layout import Split

MLP_FORMS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
)
"""Inner linears of an MLP, gate first where there is one, and down."""

MLP_SPLITS: dict[str, Split] = {
    **{name: "output" for inner, _ in MLP_FORMS for name in inner},
    **{down: "input" for _, down in MLP_FORMS},
}
"""What each linear of an MLP is split by into a 2:4 region and a dense one."""

ATTENTION_INNER = ("q_proj", "k_proj", "v_proj")
ATTENTION_OUT = ("o_proj", "out_proj", "dense")
"""Linears of attention: those that read the layer's input, and what the one behind them is called."""

FUSED: dict[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ATTENTION_INNER,
}
"""Linears that vLLM fuses, and some families on disk too: their parts in the order of the fused rows."""

ROW_PARALLEL = frozenset({*(down for _, down in MLP_FORMS), *ATTENTION_OUT})
"""Linears whose inputs tensor parallelism splits; of all others it splits the outputs."""

MLP_HOLDERS = ("mlp", "feed_forward")
MIXERS = ("self_attn", "linear_attn")
"""What a decoder layer calls its MLP (or experts), and what mixes its tokens."""


ACTIVATION_SPARSE = ("SparseLlamaForCausalLM", "BambooForCausalLM")
"""Architectures that vLLM lacks and the plugin serves: Llamas whose gate leaves most neurons at zero."""


@dataclass(frozen=True)
class Family:
    """How the models of one ``model_type`` differ from a Llama.

    ``gated``: their MLP has a gate. ``fused``: keys of :data:`FUSED` that are one linear in transformers and
    on disk; a Spense checkpoint holds the parts. ``routed``: beside routed experts, which stay as they are,
    they have shared experts or ordinary MLPs that are pruned. ``bare_mlp``: the MLP's linears are the decoder
    layer's own. ``unnamed_blocks``: vLLM builds their attention under names of no checkpoint
    (``layers.0.qkv_proj``), so it stays as stored.
    """

    gated: bool = True
    fused: tuple[str, ...] = ()
    routed: bool = False
    bare_mlp: bool = False
    unnamed_blocks: bool = False


FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        ("phi", "starcoder2", "nemotron", "arcee", "apertus", "jais2", "nanochat"), Family(gated=False)
    ),
    "opt": Family(gated=False, bare_mlp=True),
    "phi3": Family(fused=("gate_up_proj", "qkv_proj")),
    "glm4": Family(fused=("gate_up_proj",)),
    "qwen2_moe": Family(routed=True),
    "qwen3_moe": Family(routed=True),
    "falcon_h1": Family(unnamed_blocks=True),
}
"""By ``model_type``; a family that is not here is as a Llama is."""

_LLAMA_LIKE = Family()
_SMALL = re.compile(r"\.(linear_attn\.in_proj_(a|b|ba)|per_layer_(input_gate|projection|model_projection))$")
"""Gates with an output per head of linear attention, and what mixes Gemma 4's inputs per layer."""
_TOWERS = re.compile(r"(model\.)?(visual|vision|audio|multi_modal|mm_|embed_(vision|audio))")
"""How the names of what a multimodal wrapper has beside its text model begin."""
_ROUTER = re.compile(r"\.router\.")


def family_of(model_type: str | None) -> Family:
    """The family that config.json's ``model_type`` names; a Llama for all that are not listed."""
    return FAMILIES.get(model_type or "", _LLAMA_LIKE)


def fused_with(linear: str) -> tuple[str, ...]:
    """The linears that vLLM makes one layer of together with ``linear``, in the order of the fused rows."""
    return next((parts for parts in FUSED.values() if linear in parts), (linear,))


def in_attention(name: str) -> bool:
    """Whether a module, by its name in a checkpoint or in vLLM, lies in what mixes the tokens."""
    return any(step in MIXERS for step in name.split("."))


def stays_as_stored(name: str, model_type: str) -> bool:
    """Whether a linear outside the experts is never rounded to FP8, neither by pruning nor in load-time mode.

    These are routers, small gates, all of Falcon-H1's attention and state space, and whatever sees or hears.
    ``name`` is that of a module in a checkpoint or of a layer in vLLM.
    """
    if _SMALL.search(name) or _ROUTER.search(name) or _TOWERS.match(name):
        return True
    last = name.rpartition(".")[2]
    return family_of(model_type).unnamed_blocks and last not in MLP_SPLITS and last != "gate_up_proj"
