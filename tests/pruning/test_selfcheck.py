"""Models whose layers, run singly, compute something else are refused by name before anything is pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.tiny_families import make_family
from tests.tiny_gemma4 import make_gemma4
from tests.tiny_text import add_tokenizer
from vllm_spense.models.parts import UnsupportedModelError
from vllm_spense.pruning import PruneConfig, prune
from vllm_spense.pruning.selfcheck import check_replay
from vllm_spense.pruning.source import SourceModel

CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(0))


class OddConfig(LlamaConfig):
    model_type = "spense_test_odd"


class OddLayer(LlamaDecoderLayer):
    """A Llama layer that also looks at what its model hands to it."""

    def forward(self, hidden_states: torch.Tensor, extra: Any = None, **kwargs: Any) -> Any:
        if extra == "in a tuple":
            return (super().forward(hidden_states, **kwargs),)
        if isinstance(extra, list):  # a memory that layers add to
            extra.append(hidden_states)
            hidden_states = hidden_states + extra[0]
        elif extra is not None:
            hidden_states = hidden_states + extra
        return super().forward(hidden_states, **kwargs)


class OddModel(LlamaModel):
    """Llama with one more thing between its layers: ``ODDITY``."""

    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.layers = torch.nn.ModuleList([OddLayer(config, i) for i in range(config.num_hidden_layers)])

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False, **_: Any) -> Any:
        states = self.embed_tokens(input_ids)
        places = torch.arange(input_ids.shape[1])[None]
        rotary = self.rotary_emb(states, places)
        states = ODDITY["run"](self, states, input_ids, position_embeddings=rotary, position_ids=places)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(states))


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.model = OddModel(config)


AutoConfig.register("spense_test_odd", OddConfig)
AutoModelForCausalLM.register(OddConfig, OddForCausalLM)

Run = Callable[..., torch.Tensor]
ODDITY: dict[str, Run] = {}


def plain(model: OddModel, states: torch.Tensor, _ids: torch.Tensor, **given: Any) -> torch.Tensor:
    for layer in model.layers:
        states = layer(states, **given)
    return states


def scaled_between(model: OddModel, states: torch.Tensor, _ids: torch.Tensor, **given: Any) -> torch.Tensor:
    for i, layer in enumerate(model.layers):
        states = layer(states if i < 2 else states * 1.01, **given)
    return states


def from_a_layer(model: OddModel, states: torch.Tensor, _ids: torch.Tensor, **given: Any) -> torch.Tensor:
    first = model.layers[0](states, **given)
    second = model.layers[1](first, **given)
    return model.layers[2](second, extra=first * 0.1, **given)


def from_the_tokens(model: OddModel, states: torch.Tensor, ids: torch.Tensor, **given: Any) -> torch.Tensor:
    embedded = states
    for layer in model.layers:  # differs from window to window, the same tensor for all layers
        states = layer(states, embedded, **given)
    return states


def in_a_list(model: OddModel, states: torch.Tensor, _ids: torch.Tensor, **given: Any) -> torch.Tensor:
    memory: list[torch.Tensor] = []
    for layer in model.layers:
        states = layer(states, memory, **given)
    return states


def twice(model: OddModel, states: torch.Tensor, _ids: torch.Tensor, **given: Any) -> torch.Tensor:
    for layer in (*model.layers, model.layers[0]):
        states = layer(states, **given)
    return states


def not_the_last(model: OddModel, states: torch.Tensor, _ids: torch.Tensor, **given: Any) -> torch.Tensor:
    for layer in model.layers[:2]:
        states = layer(states, **given)
    return states


def scaled_behind(model: OddModel, states: torch.Tensor, ids: torch.Tensor, **given: Any) -> torch.Tensor:
    first = model.layers[0](states, **given)
    return model.layers[2](model.layers[1](first, **given), **given) + first


def by_an_object(model: OddModel, states: torch.Tensor, _ids: torch.Tensor, **given: Any) -> torch.Tensor:
    for layer in model.layers:
        states = layer(states, cache_position=object(), **given)
    return states


def with_keywords_alone(model: OddModel, states: torch.Tensor, _: Any, **given: Any) -> torch.Tensor:
    for layer in model.layers:
        states = layer(hidden_states=states, **given)
    return states


def in_a_tuple(model: OddModel, states: torch.Tensor, _ids: torch.Tensor, **given: Any) -> torch.Tensor:
    for layer in model.layers:
        states = layer(states, "in a tuple", **given)[0]
    return states


@pytest.fixture
def odd_model(tmp_path: Path) -> Iterator[Callable[[Run], Path]]:
    """``odd_model(run)`` makes a model that runs its layers so."""

    def make(run: Run) -> Path:
        ODDITY["run"] = run
        config = OddConfig(
            hidden_size=96,
            intermediate_size=208,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "odd")
        return add_tokenizer(tmp_path / "odd")

    yield make
    ODDITY.clear()


REFUSED = {
    scaled_between: r"model\.layers\.2 \(OddLayer\).* what comes into it is not as .*error of 0\.0",
    from_a_layer: r"model\.layers\.2 \(OddLayer\).* its output is not as .*error of 0\.",
    in_a_list: r"model\.layers\.1 \(OddLayer\).* its output is not as .*error of 0\.",
    twice: r"model\.layers\.0 does not run once and in its turn",
    not_the_last: r"model\.layers\.2 does not run in the model's own forward",
    scaled_behind: r"model\.layers\.2 \(OddLayer\).* what the model makes of its output is not",
    by_an_object: r"model\.layers\.0: its argument 'cache_position' differs between windows",
}


@pytest.mark.parametrize(("run", "message"), REFUSED.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_what_cannot_be_replayed_is_refused_first(
    run: Run, message: str, odd_model, text_file: Path, tmp_path: Path
) -> None:
    steps: list[str] = []
    config = PruneConfig(calibration=str(text_file), num_samples=2, seq_len=32)
    with pytest.raises(UnsupportedModelError, match=message):
        prune(odd_model(run), tmp_path / "out", config, lambda event: steps.append(event.stage))
    assert set(steps) <= {"check"}
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.spense-work/layer-*"))


@pytest.mark.parametrize("run", [plain, from_the_tokens, with_keywords_alone, in_a_tuple])
def test_what_can_be_replayed_passes(run: Run, odd_model) -> None:
    source, steps = SourceModel(odd_model(run), CPU), []
    check_replay(source, WINDOWS, lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert all(parameter.is_meta for parameter in source.network.parameters()), "nothing stays in memory"


def test_a_layer_that_fails_by_itself_is_refused(odd_model, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SourceModel(odd_model(plain), CPU)

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("full_attention")

    monkeypatch.setattr(source.layers[1].attention_block, "forward", fail)
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1.* own forward fails in it \(KeyError: 'full_a"
    ):
        check_replay(source, WINDOWS)


@pytest.mark.parametrize("kind", ["gemma4_text", "opt", "phi3", "qwen3_moe", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families_pass(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make = make_gemma4 if kind == "gemma4_text" else lambda out: make_family(kind, out)
    check_replay(SourceModel(make(tmp_path / "model"), CPU, dtype), WINDOWS)
