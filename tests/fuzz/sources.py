"""Fuzzing of source models: edits of a real config.json, taken down the road of `prune --dry-run` and `plan`.

Either the model is planned, or one ``ValueError`` says in one line which file is at fault.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.edits import Case, Edit, make
from tests.fuzz.limits import LONGEST, OvertimeError, StopError, ViolationError, fault_of, limits
from tests.fuzz.mutations import CONFIG, Draw, json_edit, path_in, pick
from tests.fuzz.values import AT, HEX, JSON, NUMBERS, SCALARS, STRINGS
from tests.published_configs import PUBLISHED
from tests.tiny_families import _COMMON, FAMILIES, make_family
from vllm_spense.planning import read_model
from vllm_spense.pruning import PruneConfig
from vllm_spense.pruning.plan import plan

OUTCOMES = ("planned", "planned, no prediction", "refused")
SECONDS = 50.0
"""Per step: importing a model class for the first time may take seconds on a busy machine."""
KINDS_OF_MODEL = (
    *("llama", "mistral", "qwen2", "qwen3", "seed_oss", "gemma2", "gemma3_text", "phi3", "phi", "starcoder2"),
    *("nemotron", "opt", "qwen2_moe", "qwen3_moe"),
)
WITH_WEIGHTS = ("llama", "gemma3_text", "phi3", "qwen2_moe")
_OPTIONS = PruneConfig(calibration="x", num_samples=2, seq_len=16)


@dataclass(frozen=True)
class SourceBase:
    """An undamaged model directory and its config.json."""

    name: str
    config: dict[str, Any]


def build(out: Path) -> dict[str, Path]:
    """Directories by name: tiny families and published models, most with config.json alone."""
    from transformers import AutoConfig

    found = {}
    for kind in KINDS_OF_MODEL:
        found[kind] = out / kind
        options = {k: v for k, v in (_COMMON | FAMILIES[kind]).items() if v is not None}
        AutoConfig.for_model(kind, **options).save_pretrained(found[kind])
    for name, raw in PUBLISHED.items():
        found[name] = out / name
        found[name].mkdir()
        (found[name] / CONFIG).write_text(json.dumps(raw, indent=2))
    for kind in WITH_WEIGHTS:
        found[f"{kind} with weights"] = make_family(kind, out / f"{kind} with weights")
    return found


def read_bases(directories: dict[str, Path]) -> list[SourceBase]:
    return [SourceBase(n, json.loads((d / CONFIG).read_text())) for n, d in directories.items()]


class SourceOracle:
    """Judges cases; ``bases`` are the undamaged directories by name."""

    def __init__(self, bases: dict[str, Path], work: Path) -> None:
        self.bases = bases
        self.work = work

    def judge(self, case: Case) -> str:
        """One of :data:`OUTCOMES`; raises :class:`ViolationError`, or ``NotApplicableError``."""
        with tempfile.TemporaryDirectory(dir=self.work) as name:
            directory = Path(name) / "model"
            make(case, self.bases[case.base], directory)
            try:
                planned = _step(lambda: plan(directory, _OPTIONS, "h200"), directory, "prune --dry-run")
                predicted = _step(lambda: read_model(directory), directory, "plan")
            except ViolationError as violation:
                text = f"{violation}\n{case.text()}".replace(name, "")
                raise type(violation)(text[:LONGEST]) from violation.__cause__
        if planned and not predicted:
            return "planned, no prediction"
        return "planned" if planned else "refused"


def _step(action: Callable[[], Any], directory: Path, name: str) -> bool:
    """Whether it went well; errors other than clear ones are violations."""
    try:
        with limits(SECONDS):
            action()
    except StopError:
        raise OvertimeError(f"{name}: more than {SECONDS:g} s") from None
    except ValueError as error:
        text = str(error)
        wrong = fault_of(text) or (None if str(directory) in text else "no file")
        if wrong:
            raise ViolationError(f"{name}: unclear error ({wrong}): {text[:LONGEST]!r}") from error
        return False
    except Exception as error:
        raise ViolationError(f"{name}: {type(error).__name__}: {str(error)[:LONGEST]}") from error
    return True


# -- kinds -------------------------------------------------------------------------------------------


def values(draw: Draw, base: SourceBase) -> list[Edit]:
    """Any key: another value of any JSON type, no value, another name, twice."""
    return [json_edit(draw, CONFIG, path_in(draw, base.config))]


def types(draw: Draw, base: SourceBase) -> list[Edit]:
    """Any key: null, a list in place of a number, a number as text, a bool."""
    path = path_in(draw, base.config)
    value = base.config
    for key in path:
        value = value[key]
    return [["set", CONFIG, path, pick(draw, None, [value], str(value), True, False, {}, [], "")]]


def numbers(draw: Draw, base: SourceBase) -> list[Edit]:
    """Sizes and counts: zero, negative, odd, huge."""
    places = [[k] for k, v in base.config.items() if type(v) in (int, float)]
    inside = base.config.get("text_config", {})
    places += [["text_config", k] for k, v in inside.items() if type(v) is int]
    known = ["num_labels", "head_dim", "num_experts", "num_key_value_heads", "sliding_window", "pad_token_id"]
    path = draw(st.sampled_from([*places, *([key] for key in known)]))
    return [["set", CONFIG, path, draw(NUMBERS | st.integers(-8, 300))]]


def missing(draw: Draw, base: SourceBase) -> list[Edit]:
    """One to four keys left out."""
    keys = draw(st.lists(st.sampled_from(sorted(base.config)), min_size=1, max_size=4, unique=True))
    return [["delete", CONFIG, [key]] for key in keys]


def ropes(draw: Draw, base: SourceBase) -> list[Edit]:
    """Rotary embeddings: unknown types, missing factors, nested dictionaries, lists of the wrong length."""
    key = pick(draw, "rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor")
    kind = draw(
        st.sampled_from(["linear", "dynamic", "yarn", "longrope", "llama3", "default", "su", "mrope"])
    )
    rope: Any = {pick(draw, "rope_type", "type"): kind if draw(st.booleans()) else draw(SCALARS)}
    for name in ("factor", "original_max_position_embeddings", "long_factor", "short_factor", "rope_theta"):
        if draw(st.booleans()):
            rope[name] = draw(SCALARS | st.lists(NUMBERS, max_size=3) | st.just(8.0))
    if draw(st.booleans()):
        rope = {pick(draw, "full_attention", "sliding_attention", "x"): rope}
    return [["set", CONFIG, [key], pick(draw, rope, rope, rope, draw(JSON))]]


def known_keys(draw: Draw, base: SourceBase) -> list[Edit]:
    """Keys that other models have, with values that fit and values that do not."""
    key = pick(
        draw,
        *("layer_types", "hidden_act", "hidden_activation", "activation_function", "torch_dtype", "dtype"),
        *("auto_map", "quantization_config", "compression_config", "quantization", "text_config"),
        *("vision_config", "is_encoder_decoder", "architectures", "id2label", "_attn_implementation"),
        *("attn_implementation", "tie_word_embeddings", "return_dict", "output_attentions", "pad_token_id"),
        *("is_decoder", "add_cross_attention", "pruned_heads", "mlp_only_layers", "kv_lora_rank"),
    )
    return [["set", CONFIG, [key], draw(JSON | st.sampled_from(["gelu", "silu", "float16", "eager", True]))]]


def kinds(draw: Draw, base: SourceBase) -> list[Edit]:
    """Another ``model_type``: one that has another class, one that there is not."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return [["set", CONFIG, ["model_type"], draw(st.sampled_from(sorted(CONFIG_MAPPING)) | STRINGS)]]


def text(draw: Draw, base: SourceBase) -> list[Edit]:
    """Bytes of config.json: spliced, cut, padded, nested, a byte-order mark, another root."""
    how = pick(draw, "splice", "splice", "size", "nest", "root", "mark", "encoding")
    if how == "size":
        return [["resize", CONFIG, draw(st.integers(0, 3000) | st.sampled_from([0, 1 << 25, 1 << 30]))]]
    if how == "root":
        return [["set", CONFIG, [], draw(JSON)]]
    if how == "nest":
        opening = pick(draw, "5b", "7b2261223a", "20", "00")
        return [["splice", CONFIG, draw(AT), 0, opening, pick(draw, 900, 200_000)]]
    if how == "mark":
        return [["splice", CONFIG, 0, 0, pick(draw, "efbbbf", "fffe", "feff", "0000feff")]]
    if how == "encoding":
        return [["write", CONFIG, json.dumps(base.config).encode(pick(draw, "utf-16", "utf-32")).hex()]]
    return [["splice", CONFIG, draw(AT), draw(st.integers(0, 6)), draw(HEX)]]


def together(draw: Draw, base: SourceBase) -> list[Edit]:
    """Two or three edits of other kinds."""
    some = [kind for name, kind in SOURCE_KINDS.items() if name not in ("together", "text")]
    return [edit for _ in range(draw(st.integers(2, 3))) for edit in draw(st.sampled_from(some))(draw, base)]


SOURCE_KINDS: dict[str, Callable[[Draw, SourceBase], list[Edit]]] = {
    "values": values,
    "types": types,
    "numbers": numbers,
    "missing keys": missing,
    "ropes": ropes,
    "known keys": known_keys,
    "model types": kinds,
    "text": text,
    "together": together,
}


@st.composite
def source_cases(draw: Draw, kind: str, bases: list[SourceBase]) -> Case:
    """A case of one kind."""
    base = draw(st.sampled_from(bases))
    return Case(base.name, kind, "kept", SOURCE_KINDS[kind](draw, base))
