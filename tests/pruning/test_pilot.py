"""The crude trials behind the budget over layers, against plain transformers models with pruned weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny_families import make_family, pruned_modules
from tests.tiny_text import add_tokenizer, write_text
from vllm_spense.format import Checkpoint
from vllm_spense.pruning import PruneConfig, prune
from vllm_spense.pruning.activations import LayerInputs
from vllm_spense.pruning.choice import pilot
from vllm_spense.pruning.choice.pilot import FALL, Pilot, Verdict, choose, falling
from vllm_spense.pruning.choice.sensitivity import index_costs
from vllm_spense.pruning.source import SourceModel

CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 256, (16, 64), generator=torch.Generator().manual_seed(0))
INTERMEDIATE = 208


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")
    return lambda kind: root / kind if (root / kind).is_dir() else make_family(kind, root / kind)


@torch.no_grad()
def embed(source: SourceModel, windows: torch.Tensor) -> LayerInputs:
    with source.resident(*source.embedding()):
        return LayerInputs(source.network, windows, CPU, dtype=torch.float32)


@torch.no_grad()
def chosen(directory: Path, **options: object):
    source = SourceModel(directory, CPU)
    costs = index_costs(source, embed(source, WINDOWS), WINDOWS)
    steps: list[tuple[int, int]] = []
    config = PruneConfig(calibration="any", **({"pilot_samples": 4} | options))
    choice, verdict = choose(
        source, lambda w: embed(source, w), WINDOWS, costs, config, lambda *step: steps.append(step)
    )
    assert steps == [(i, 6) for i in range(1, 7)]
    assert all(parameter.is_meta for parameter in source.network.parameters()), "nothing stays in memory"
    return choice, verdict, costs


@torch.no_grad()
def reference(kind: str, directory: Path, sparse: dict[int, list[int]]) -> float:
    """KL from the dense model with these indices of these layers in 2:4, group by group."""
    dense, network = (
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval() for _ in range(2)
    )
    squares: dict[str, torch.Tensor] = {}
    for groups in pruned_modules(kind):
        for name in groups:
            hook = lambda _m, args, name=name: squares.__setitem__(  # noqa: E731
                name, squares.get(name, 0) + args[0].reshape(-1, args[0].shape[-1]).square().sum(0)
            )
            dense.get_submodule(name).register_forward_pre_hook(hook)
    expected = [dense(input_ids=w[None]).logits[0].log_softmax(-1) for w in WINDOWS]
    for layer, indices in sparse.items():
        *inner, down = pruned_modules(kind)[layer]
        for name in inner:
            weight = network.get_submodule(name).weight
            for i in indices:
                for k in range(0, weight.shape[1], 4):
                    _drop_two(weight[i, k : k + 4], squares[name][k : k + 4])
        weight = network.get_submodule(down).weight
        for row in weight:
            for at in range(0, len(indices), 4):
                columns = indices[at : at + 4]
                values = row[columns]
                _drop_two(values, squares[down][columns])
                row[columns] = values
    total = 0.0
    for window, log in zip(WINDOWS, expected, strict=True):
        found = network(input_ids=window[None]).logits[0].log_softmax(-1)
        total += float((log.exp() * (log - found)).sum(-1).mean()) / len(WINDOWS)
    return total


def _drop_two(four: torch.Tensor, energies: torch.Tensor) -> None:
    four[(four.square() * energies).argsort()[:2]] = 0.0


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "phi"])
def test_divergences_are_those_of_pruned_models(kind: str, model: Callable[[str], Path]) -> None:
    generator = torch.Generator().manual_seed(1)
    some = [torch.randperm(INTERMEDIATE, generator=generator)[:n].sort().values for n in (40, 104, 200)]
    variants = [[some[0], None, None], [None, some[1], None], [None, None, None], some]
    source = SourceModel(model(kind), CPU)
    found = Pilot(source, None).divergences(embed(source, WINDOWS), WINDOWS, variants)
    for value, variant in zip(found, variants, strict=True):
        sparse = {i: s.tolist() for i, s in enumerate(variant) if s is not None}
        assert value == pytest.approx(reference(kind, model(kind), sparse), rel=1e-3, abs=1e-7)
    assert found[2] == 0.0
    assert len(set(found)) == 4
    assert Pilot(source, None).divergences(embed(source, WINDOWS), WINDOWS, variants, 2) != found


def test_what_a_layer_costs_falls_to_nothing() -> None:
    costs = falling(0.3, 120, 200)
    assert costs.shape == (200,)
    assert (costs[:-1] >= costs[1:]).all()
    assert float(costs[80:].sum()) == pytest.approx(0.3)
    assert float(costs.sum()) == pytest.approx(0.3 * (200 / 120) ** FALL)


def test_the_guard_takes_what_does_better_on_each_model(model: Callable[[str], Path]) -> None:
    """On Llama the measured budget; on Jais 2, whose layers do not add up, the same ratio everywhere."""
    for kind, wanted in (("llama", "bytes"), ("jais2", "uniform")):
        choice, verdict, costs = chosen(model(kind))
        allocation, selection = verdict.chosen.split(", ")
        assert allocation == wanted
        best = verdict.divergences[verdict.chosen]
        assert best <= min(verdict.divergences.values()) / (1 - pilot.MARGIN)
        assert best < 0.9 * min(v for name, v in verdict.divergences.items() if wanted not in name)
        assert (len(set(choice.counts)) == 1) == (wanted == "uniform")
        torch.testing.assert_close(choice.costs, costs.ranking(selection))


def test_a_layer_that_overflows_is_the_dearest(
    model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[torch.Tensor]] = []
    measured, counts = Pilot.layers, pilot.dense_counts
    monkeypatch.setattr(Pilot, "layers", lambda *args: [*measured(*args)[:2], math.inf])
    monkeypatch.setattr(
        pilot, "dense_counts", lambda costs, *rest: asked.append(costs) or counts(costs, *rest)
    )
    chosen(model("llama"))
    first, _, last = asked[0]
    assert all(cost.isfinite().all() for cost in asked[0])
    torch.testing.assert_close(last, first, msg="Llama's first layer is its dearest")


def test_the_guard_takes_other_scores_where_they_do_clearly_better(
    model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "bytes, consensus": 1.0,
        "bytes, spensegpt+": 0.96,
        "uniform, consensus": 2.0,
        "uniform, +": 2.0,
    }
    measured = Pilot.divergences

    def told(self: Pilot, *args: object) -> list[float]:
        found = measured(self, *args)
        return found if len(args) > 3 else list(values.values())  # trials, which ask at every token

    monkeypatch.setattr(Pilot, "divergences", told)
    assert chosen(model("llama"))[1].chosen == "bytes, consensus", "by less than the trials tell"
    values["bytes, spensegpt+"] = 0.94
    choice, verdict, costs = chosen(model("llama"))
    assert verdict.chosen == "bytes, spensegpt+"
    assert choice.costs is costs.scores
    monkeypatch.undo()
    choice, verdict, _ = chosen(model("opt"), selection="spensegpt+", allocation="bytes")
    assert set(verdict.divergences) == {"bytes, spensegpt+", "uniform, spensegpt+"}
    assert choice.costs is None, "each layer ranks its own, on all samples"


def test_a_checkpoint_has_what_the_verdict_says(model: Callable[[str], Path], tmp_path: Path) -> None:
    directory = add_tokenizer(make_family("jais2", tmp_path / "jais2"))
    text = write_text(tmp_path / "text.txt")
    events = []
    config = PruneConfig(calibration=str(text), num_samples=8, seq_len=64, weight_dtype="bf16")
    report = prune(directory, tmp_path / "out", config, events.append)
    checkpoint = Checkpoint(tmp_path / "out")
    said = checkpoint.config["quantization_config"]
    assert Verdict.read(said["provenance"]["allocation"]).chosen == report.verdict.chosen
    assert [event.verdict for event in events if event.verdict is not None] == [report.verdict]
    dense = [spec["dense"] for name, spec in said["modules"].items() if name.endswith("down_proj")]
    assert (len(set(dense)) == 1) == report.verdict.chosen.startswith("uniform")
    assert report.verdict.chosen in str(report.verdict)


def test_records_of_verdicts_survive() -> None:
    verdict = Verdict("a", {"a": 0.125, "b": math.inf})
    assert Verdict.read(verdict.record()) == verdict
    assert Verdict.read(None) is None
