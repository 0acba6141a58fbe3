"""The accuracy benchmark: costs by hand, resuming, stale figures, the table."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.accuracy import frontier as accuracy_frontier
from benchmarks.accuracy import frontier_report, frontier_rows
from benchmarks.accuracy.frontier import SUBJECTS, Bench, Remembered, Store, lock, measure
from benchmarks.accuracy.frontier_cost import cost, enlarged, linear_layouts
from benchmarks.accuracy.frontier_report import Figure, Figures
from benchmarks.accuracy.frontier_rows import ABLATIONS, BASE, GEMMA_ROWS, ROWS, Row
from benchmarks.common.markdown import insert
from benchmarks.common.results import read
from tests.tiny import make_llama
from tests.tiny_text import add_tokenizer, write_text
from vllm_spense.evaluation import load_model
from vllm_spense.format import Layout
from vllm_spense.pruning import PruneConfig


def test_cost_by_hand(tiny_llama: Path, tiny_spense: Path, tiny_spense_bf16: Path) -> None:
    """Stored FP8 tensors are counted byte by byte; a bf16 checkpoint costs what it would in FP8."""
    state = load_file(tiny_spense / "model.safetensors")
    parts = ("sparse_values", "sparse_meta", "dense_weight", "weight_scale")
    stored = sum(t.numel() * t.element_size() for name, t in state.items() if name.endswith(parts))
    pruned = cost(tiny_spense)
    assert pruned.weight_bytes == stored
    assert pruned.mlp_sparsity == pytest.approx(0.5 * 112 / 208)
    assert cost(tiny_spense_bf16) == pruned
    dense = cost(tiny_llama)
    weights = load_file(tiny_llama / "model.safetensors")
    linear = [w for name, w in weights.items() if name.endswith("_proj.weight")]
    assert dense.weight_bytes == sum(w.numel() + 4 * w.shape[0] for w in linear)
    assert dense.mlp_sparsity == 0
    assert pruned.decode_seconds < dense.decode_seconds


def test_layers_keep_their_share_when_enlarged(tiny_spense: Path) -> None:
    assert len(linear_layouts(tiny_spense)) == 14
    assert enlarged("down_proj", Layout("input", 576, 1536, 768)) == Layout("input", 5120, 25600, 12800)
    assert enlarged("gate_proj", Layout("output", 1536, 576, 1152)) == Layout("output", 25600, 5120, 19200)
    assert enlarged("k_proj", Layout("output", 192, 576, 0)) == Layout("output", 1024, 5120, 0)


def test_settings_of_a_row_are_its_own_over_its_base() -> None:
    by_key = {row.key: row for row in [*ROWS, *ABLATIONS]}
    assert len(by_key) == len(ROWS) + len(ABLATIONS)
    changed = replace(ABLATIONS[0], base=replace(BASE, options={"dense_ratio": 0.25, "num_samples": 8}))
    options = {"weight_dtype": "bf16", "dense_ratio": 0.25, "num_samples": 8} | ABLATIONS[0].options
    expected = PruneConfig(calibration="any", **options).decisive()
    assert changed.settings() == {name: value for name, value in expected.items() if name != "seed"}
    for row in [*by_key.values(), *GEMMA_ROWS]:
        if row.options is not None:
            config = row.config(3, Path("train.txt"))
            assert config.weight_dtype == row.options.get("weight_dtype", "bf16")
            assert config.seed == 3
    assert not by_key["dense"].seeded
    assert not by_key["magnitude"].seeded
    assert by_key["wanda"].seeded


def test_rows_without_bos_differ_in_nothing_else() -> None:
    by_key = {row.key: row for row in GEMMA_ROWS}
    for key in ("spensegpt+0.5", "guided0.5"):
        settings, without = by_key[key].settings(), by_key[f"{key}-no-bos"].settings()
        assert settings is not None
        assert without == settings | {"bos": "never"}
        assert by_key[key] in ROWS, "the same method on both models"
    assert len({subject.results for subject in SUBJECTS.values()}) == len(SUBJECTS)


@torch.inference_mode()
def test_windows_start_with_the_models_bos(tmp_path: Path) -> None:
    """Scored against the slow way: BOS, then 511 tokens that follow each other, each a target."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    directory = add_tokenizer(make_llama(tmp_path / "dense"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.bos_token = "w511"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="w511 $A", special_tokens=[("w511", 511)]
    )
    tokenizer.save_pretrained(directory)
    for name in ("wikipedia", "fiction"):
        (tmp_path / name).mkdir()
        write_text(tmp_path / name / "test.txt", 1200)
    subject = replace(SUBJECTS["smollm2"], fetch=lambda *_: directory)
    bench = Bench(subject, tmp_path, "test")
    ids = torch.tensor([int(word[1:]) for word in (tmp_path / "wikipedia" / "test.txt").read_text().split()])

    def nll(windows: list[torch.Tensor]) -> float:
        losses = []
        for window in windows:
            scores = bench.dense(input_ids=window[None]).logits[0].log_softmax(-1)
            losses += [-scores[i, token] for i, token in enumerate(window[1:])]
        return float(torch.stack(losses).double().mean())

    start = torch.tensor([511])
    with_bos = nll([torch.cat([start, ids[:511]]), torch.cat([start, ids[511:1022]])])
    assert bench.wikipedia(bench.dense)["nll"] == pytest.approx(with_bos, abs=1e-5)
    assert bench.wikipedia(load_model(directory))["nll"] == pytest.approx(with_bos, abs=1e-5)
    assert bench.novel(bench.dense)["nll"] == pytest.approx(with_bos, abs=1e-5)
    without = nll([ids[:512], ids[512:1024]])
    assert bench.without_bos(bench.dense)["nll"] == pytest.approx(without, abs=1e-5)
    assert abs(with_bos - without) > 1e-3


def test_figures_made_with_other_settings_are_stale(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Store(path, "row/0", {"damping": 0.1}).save("cost", {"weight_bytes": 1})
    Store(path, "row/1", {"damping": 0.1}).save("cost", {"weight_bytes": 2})
    store = Store(path, "row/0", {"damping": 0.1})
    assert store.entry()["cost"]["weight_bytes"] == 1
    assert store.entry()["cost"]["made"]["versions"]
    other = Store(path, "row/0", {"damping": 0.2})
    assert other.entry() == {}
    other.save("test/fiction", {"nll": 3.0})
    assert set(read(path)["runs"]["row/0"]) == {"settings", "test/fiction"}
    assert read(path)["runs"]["row/1"]["cost"]["weight_bytes"] == 2


def test_stale_runs_are_not_shown() -> None:
    row = Row("a", "method a", {"method": "magnitude", "selection": "spensegpt", "dense_ratio": 0})
    fresh, stale = {"settings": row.settings()}, {"settings": {**(row.settings() or {}), "damping": 7}}
    results = {"runs": {"a/0": fresh, "a/1": stale, "dense/0": {"settings": None}, "gone/0": fresh}}
    shown = accuracy_frontier.current(results, {"a": row, "dense": Row("dense", "dense", None)})
    assert shown == {"runs": {"a/0": fresh, "dense/0": {"settings": None}}}


@torch.inference_mode()
def test_the_reference_is_computed_once_and_unchanged(tmp_path: Path) -> None:
    model = load_model(make_llama(tmp_path / "dense"))
    remembered = Remembered(model)
    windows = torch.arange(24).view(2, 1, 12)
    expected = [model(input_ids=window, use_cache=False).logits for window in windows]
    calls: list[int] = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        for window, logits in zip(windows, expected, strict=True):
            torch.testing.assert_close(remembered(input_ids=window, use_cache=False).logits, logits)
    assert len(calls) == len(windows)


class FakeBench:
    """Two metrics that count their calls; the second fails the first time."""

    split = "valid"

    def __init__(self, model: Path, text: Path) -> None:
        self.model, self.text, self.calls = model, text, []

    def first(self, model: torch.nn.Module) -> dict[str, float]:
        self.calls.append("first")
        return {"nll": 1.0}

    def second(self, model: torch.nn.Module) -> dict[str, float]:
        self.calls.append("second")
        if self.calls.count("second") == 1:
            raise KeyboardInterrupt
        return {"nll": 2.0}


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = {"first": FakeBench.first, "second": FakeBench.second}
    monkeypatch.setattr(accuracy_frontier, "METRICS", metrics)
    pruned: list[int] = []
    real = frontier_rows.prune
    monkeypatch.setattr(frontier_rows, "prune", lambda *a: pruned.append(1) or real(*a))
    row = Row("magnitude", "magnitude", {"method": "magnitude", "selection": "spensegpt", "dense_ratio": 0})
    arguments = Namespace(
        results=tmp_path / "results.json",
        work=tmp_path / "work",
        metrics=list(metrics),
        again=False,
        keep=False,
    )
    (tmp_path / "train.txt").write_text("unused")
    bench: Any = FakeBench(add_tokenizer(make_llama(tmp_path / "dense")), tmp_path)

    def run() -> dict[str, Any]:
        measure(row, 0, bench, arguments)
        return read(arguments.results)["runs"]["magnitude/0"]

    with pytest.raises(KeyboardInterrupt):
        run()
    entry = run()
    assert bench.calls == ["first", "second", "second"]
    assert entry["cost"]["mlp_sparsity"] == 0.5
    assert entry["cost"]["prune_seconds"] > 0
    assert (entry["valid/first"]["nll"], entry["valid/second"]["nll"]) == (1.0, 2.0)
    assert not (arguments.work / "magnitude-0").exists()
    assert len(pruned) == 1  # the checkpoint of the interrupted run was used
    run()
    assert len(bench.calls) == 3
    with lock(arguments.work / "magnitude-0.lock", wait=False):
        arguments.again = True
        run()
        assert len(bench.calls) == 3  # another process is at it
    run()
    assert len(bench.calls) == 5


def test_a_model_that_recovery_refuses_is_a_row(tmp_path: Path) -> None:
    """Far too high a learning rate: the reason is saved and shown, nothing is left or tried once more."""
    dense = add_tokenizer(make_llama(tmp_path / "dense"))
    write_text(tmp_path / "train.txt", 4000)
    bench: Any = FakeBench(dense, tmp_path)
    options = {"method": "magnitude", "selection": "spensegpt", "dense_ratio": 0.5, "weight_dtype": "bf16"}
    recovery = {"learning_rate": 1.0, "steps": 4, "seq_len": 64}
    row = Row("far", "far too fast", options, recovery=recovery)
    arguments = Namespace(
        results=tmp_path / "results.json",
        work=tmp_path / "work",
        metrics=["first"],
        again=False,
        keep=False,
    )
    measure(row, 0, bench, arguments)
    results = read(arguments.results)
    entry = results["runs"]["far/0"]
    assert set(entry) == {"settings", "refused"}
    assert [path.name for path in arguments.work.iterdir()] == ["far-0.lock"]
    bench.model = Path("gone")  # not read a second time
    measure(row, 0, bench, arguments)
    shown = Figures(results, "valid").table([row, Row("missing", "missing", {})], ("loss", "kl"))
    assert shown.splitlines()[2:] == [
        f"| far too fast: {entry['refused']['reason'].partition(':')[0]} | – | – |"
    ]
    Store(arguments.results, "far/0", row.settings()).save("cost", {"weight_bytes": 1})
    assert set(read(arguments.results)["runs"]["far/0"]) == {"settings", "cost"}, "it succeeded at last"


def run_of(nll: float, accuracy: float, size: int = 80) -> dict[str, Any]:
    return {
        "settings": {},
        "cost": {"mlp_sparsity": 0.25, "weight_bytes": size << 20, "decode_seconds": size / 10},
        "test/wikipedia": {"nll": nll, "reference_nll": 2.5, "kl": 0.1, "top1": 0.7},
        "test/continuation": {"accuracy": accuracy},
        "valid/fiction": {"nll": 9.0},
    }


def test_table_has_means_and_deviations_over_seeds() -> None:
    runs = {"dense/0": run_of(2.5, 0.8, 100), "a/0": run_of(2.6, 0.7), "a/1": run_of(2.8, 0.74)}
    rows = [Row("dense", "dense", None), Row("a", "method a", {}), Row("missing", "missing", {})]
    figures = Figures({"runs": runs}, "test")
    loss = figures.get("a", "loss")
    assert loss is not None
    assert (loss.mean, loss.deviation) == (pytest.approx(0.2), pytest.approx(0.1 * math.sqrt(2)))
    table = figures.table(rows, ("loss", "fiction", "continuation", "mib", "bytes", "decode")).splitlines()
    assert len(table) == 4  # no line for a row without figures
    assert table[2] == "| dense | 0.000 | – | 80.0% | 100.0 | 100.0% | 100.0% |"
    assert table[3].startswith("| method a | 0.200 ± 0.141 | – | 72.0% ± 2.8% | 80.0 | 80.0%")


def test_the_second_model_has_a_table_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "accuracy.md"
    document.write_text("<!-- second-model:begin -->\n<!-- second-model:end -->\n")
    monkeypatch.setattr(frontier_report, "DOCUMENT", document)
    run = run_of(2.6, 0.7) | {"test/without_bos": {"nll": 4.0}}
    rows = [Row("dense", "dense", None), Row("a", "method a", {})]
    frontier_report.write_second_model({"runs": {"dense/0": run_of(2.5, 0.8, 100), "a/0": run}}, rows)
    lines = document.read_text().splitlines()
    assert lines[1].startswith("| method | MLP zeros | bytes | perplexity | loss over dense, nats |")
    assert lines[4] == "| method a | 25.0% | 80.0% | 13.46 | 0.100 | – | – | 0.100 | 70.0% | 54.60 | – |"


def test_a_single_run_has_no_deviation() -> None:
    assert Figure.of([1.5]).text(".2f") == "1.50"
    assert Figure.of([1.0, 2.0]).text(".2f") == "1.50 ± 0.71"
    assert Figure.of([1.0, 1.001]).text(".2f") == "1.00", "a deviation of 0.0007 is none here"


def test_documents_keep_their_prose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document, experiments = tmp_path / "accuracy.md", tmp_path / "experiments.md"
    document.write_text("Above\n<!-- frontier:begin -->\nold\n<!-- frontier:end -->\nBelow\n")
    experiments.write_text("Above\n<!-- ablations:begin -->\n<!-- ablations:end -->\nBelow\n")
    readme = tmp_path / "README.md"
    readme.write_text("no markers\n")
    files = {
        "DOCUMENT": document,
        "EXPERIMENTS": experiments,
        "README": readme,
        "PLOT": tmp_path / "plot.png",
    }
    for name, path in files.items():
        monkeypatch.setattr(frontier_report, name, path)
    test, valid = run_of(5.0, 0.7), run_of(4.0, 0.7)
    a = test | {name.replace("test/", "valid/"): value for name, value in valid.items()}
    b = {name: value for name, value in test.items() if not name.startswith("test/")}
    results = {"runs": {"dense/0": run_of(2.5, 0.8, 100), "a/0": a, "b/0": b}}
    rows = [Row("dense", "dense", None), Row("a", "method a", {}), Row("b", "method b", {})]
    frontier_report.write_documents(results, rows, rows[1:])
    text, tuning = document.read_text(), experiments.read_text()
    assert "old" not in text
    assert "method b" not in text + tuning  # measured on neither split
    assert "148.41" in text
    assert "54.60" not in text
    assert "54.60" in tuning
    assert "148.41" not in tuning
    assert text.startswith("Above\n<!-- frontier:begin -->\n| method |")
    assert tuning.endswith("<!-- ablations:end -->\nBelow\n")
    assert "| method a |" in text
    frontier_report.write_quality({"small": (results, rows)})
    assert readme.read_text() == "no markers\n"
    assert (tmp_path / "plot.png").stat().st_size > 1000
    insert(document, "frontier", "new")
    assert document.read_text().startswith("Above\n<!-- frontier:begin -->\nnew\n<!-- frontier:end -->\nBel")


def test_the_readme_has_both_models_in_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("Above\n<!-- quality:begin -->\nold\n<!-- quality:end -->\nBelow\n")
    monkeypatch.setattr(frontier_report, "README", readme)
    rows = [Row("dense", "dense", None), Row("a", "method a", {})]
    small = {"runs": {"dense/0": run_of(2.5, 0.8, 100), "a/0": run_of(2.6, 0.7)}}
    frontier_report.write_quality({"small": (small, rows), "new": ({"runs": {}}, rows), "big": (small, rows)})
    table = readme.read_text().removeprefix("Above\n<!-- quality:begin -->\n").splitlines()
    assert len({line.count("|") for line in table[:6]}) == 1
    assert table[3] == "| small | method a | 25.0% | 80.0% | 13.46 | – | 70.0% |"
    assert [line[:8] for line in table[2:6]] == ["| small ", "| small ", "| big | ", "| big | "]
    assert table[6:] == ["<!-- quality:end -->", "Below"]


def test_speeches_are_for_the_test_split_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is pruned; tuning without --metrics leaves them out."""
    asked: list[list[str]] = []
    monkeypatch.setattr(accuracy_frontier, "Bench", lambda *_: None)
    monkeypatch.setattr(accuracy_frontier, "measure", lambda *args: asked.append(list(args[3].metrics)))
    writers = ("write_documents", "write_second_model", "write_goals", "write_quality", "write_tries")
    for name in (*writers, "write_formats"):
        monkeypatch.setattr(accuracy_frontier, name, lambda *_: None)
    command = ["frontier.py", "--rows", "dense", "--split", "valid"]
    monkeypatch.setattr(sys, "argv", [*command, "--metrics", "speeches"])
    with pytest.raises(SystemExit):
        accuracy_frontier.main()
    assert "test split alone" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", command)
    accuracy_frontier.main()
    assert asked == [["wikipedia", "fiction", "continuation"]]
