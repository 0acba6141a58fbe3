"""The serving benchmarks up to the GPU: configurations, order of measurements, resuming, real engines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from benchmarks.common.results import read, write
from benchmarks.serving import decode as serving_decode
from benchmarks.serving import engine as serving_engine
from benchmarks.serving import openai as serving_openai
from benchmarks.serving.decode import figures, points
from benchmarks.serving.engine import Engine, NoAnswer, Point, ProfileError
from benchmarks.serving.models import DENSE, MODELS
from benchmarks.serving.profile import category
from tests.tiny import LINEARS
from vllm_spense.format import parse_config

QWEN = MODELS["Qwen3-32B"]


def test_sizes_by_hand() -> None:
    """Per layer of Qwen3-32B: q and o 8192 x 5120, k and v 1024 x 5120, three of 25600 x 5120."""
    attention = 2 * 8192 * 5120 + 2 * 1024 * 5120
    mlp = 3 * 25600 * 5120
    assert QWEN.linear_bytes(DENSE) == 64 * (attention + mlp)
    assert QWEN.linear_bytes("0.5") == 64 * (attention + mlp - mlp * 3 // 16)  # half of it at 5/8 of a byte
    assert QWEN.linear_bytes("0.25") == 64 * (attention + mlp - mlp * 9 // 32)


@pytest.mark.parametrize("name", MODELS)
def test_configurations(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    config = json.loads((model.write(tmp_path, "0.25") / "config.json").read_text())
    spense = parse_config(config["quantization_config"])
    assert len(spense.modules) == len(LINEARS) * model.layers
    for module, spec in spense.modules.items():
        share = spec.dense / (spec.dense + spec.sparse)
        assert share == pytest.approx(0.25 if ".mlp." in module else 1.0, abs=0.02)
        assert spec.bias == (name == "Seed-OSS-36B" and module.endswith(("q_proj", "k_proj", "v_proj")))
    dense = json.loads((model.write(tmp_path, DENSE) / "config.json").read_text())
    assert dense["quantization_config"]["quant_method"] == "compressed-tensors"
    assert {k: v for k, v in dense.items() if k != "quantization_config"} == {
        k: v for k, v in config.items() if k != "quantization_config"
    }


def test_figures_by_hand() -> None:
    found = figures(Point(32, 128, 129), dense=[2.0, 2.2, 2.4], spense=[2.0, 2.0, 1.6])
    assert found["speed_up"] == pytest.approx(1.1)
    assert found["speed_up_range"] == pytest.approx([1.0, 1.5])
    assert found["dense_tokens_per_second"] == pytest.approx(32 * 128 / 2.2)
    prefill = figures(Point(4, 8192, 1), dense=[2.0], spense=[1.0])
    assert prefill["spense_tokens_per_second"] == pytest.approx(4 * 8192)


class FakeEngine:
    """Dense takes 3 ms per decoded token and 1 s per prompt batch, Spense 2 ms and 0.5 s."""

    asked: ClassVar[list[tuple[str, int, int, int]]] = []
    profiled: ClassVar[list[tuple[str, int, int, int]]] = []
    running: ClassVar[list[str]] = []
    starts: ClassVar[list[tuple[str, ...]]] = []

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        self.variant = model.name
        self.running.append(self.variant)
        self.starts.append(("started", self.variant, *options))

    def wait(self, timeout: float) -> dict[str, Any]:
        self.starts.append(("ready", self.variant))
        return {"start_seconds": 1.0}

    def time(self, batch: int, input: int, output: int, timeout: float) -> float:
        self.asked.append((self.variant, batch, input, output))
        step, prompt = (3e-3, 1.0) if self.variant == DENSE else (2e-3, 0.5)
        return prompt + step * (output - 1)

    def profile(self, batch: int, input: int, output: int, timeout: float) -> dict[str, list[float]]:
        """One GEMM in the prompt and one a step, of half the time."""
        self.profiled.append((self.variant, batch, input, output))
        step, prompt = (1500, 5e5) if self.variant == DENSE else (1000, 2.5e5)
        return {"nvjet_tst": [output, prompt + step * (output - 1)], "flash::fwd": [1, 10.0]}

    def stop(self) -> None:
        self.running.remove(self.variant)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    monkeypatch.setattr(FakeEngine, "asked", [])
    monkeypatch.setattr(FakeEngine, "profiled", [])
    monkeypatch.setattr(FakeEngine, "running", [])
    monkeypatch.setattr(FakeEngine, "starts", [])
    monkeypatch.setattr(serving_decode, "Engine", FakeEngine)
    return FakeEngine


def run(tmp_path: Path, *more: str, key: str = "tiny/0.5") -> dict[str, Any]:
    common = ["--models", "tiny", "--ratios", "0.5", "--repeats", "2", "--length", "300"]
    serving_decode.main([*common, "--results", str(tmp_path / "results.json"), *more])
    return read(tmp_path / "results.json").get("pairs", {}).get(key, {})


def test_engines_take_turns_and_decoding_is_told_from_prefill(tmp_path: Path, fake: type[FakeEngine]) -> None:
    entry = run(tmp_path)
    assert [p.key for p in points(128, 300)] == list(entry["points"])
    assert entry["points"]["32x128+128"]["speed_up"] == pytest.approx(1.5)  # 3 ms against 2: no prompt in it
    assert entry["points"]["1x128+1"]["speed_up"] == pytest.approx(2.0)
    order = [variant for variant, *_ in fake.asked if variant]
    first = [("dense", 32, 128, 128), ("dense", 32, 128, 1), ("0.5", 32, 128, 128), ("0.5", 32, 128, 1)]
    assert fake.asked[:12] == first * 3  # a round to warm up and two that count
    assert order.count("dense") == order.count("0.5")
    assert fake.running == []


def test_engines_start_one_after_the_other(tmp_path: Path, fake: type[FakeEngine]) -> None:
    """vLLM takes memory that another engine grows by for its own, and refuses to start."""
    run(tmp_path)
    assert [step[:2] for step in fake.starts] == [
        (step, variant) for variant in (DENSE, "0.5") for step in ("started", "ready")
    ]


def test_a_short_run(tmp_path: Path, fake: type[FakeEngine]) -> None:
    """Fewer layers, points and graphs; caches of the size that the points take."""
    chosen = ["32x128+128", "1x290+1", "1x128+128"]
    short = ["--layers", "1", "--points", *chosen, "--capture-sizes", "1", "8", "32", "--budget", "280"]
    entry = run(tmp_path, *short, key="tiny-1-layers/0.5")
    assert list(entry["points"]) == chosen
    assert len(entry["points"]["1x290+1"]["dense_seconds"]) == 2
    kv = 2 * 2 * 2 * 64  # bytes of a token in the one layer: keys and values in bf16, 2 heads of 64
    mib = -(-kv * (32 * (128 + 128 + 64) + 1024) >> 20)
    limits = ("--length", "300", "--sequences", "32", "--cache", str(mib), "--capture-sizes", "1", "8", "32")
    assert [step[2:] for step in fake.starts if step[0] == "started"] == [limits, limits]


def test_points_that_fit_the_cache() -> None:
    """32 x 4096 tokens of Qwen3-32B are 34 GB, too much for two engines beside the weights of both."""
    qwen, llama = MODELS["Qwen3-32B"], MODELS["Llama-3.1-8B"]
    assert qwen.cache_bytes(1) == 64 * 2 * 8 * 128 * 2
    options = argparse.Namespace(points=None, output=128, length=8200)
    keys = {model.name: [p.key for p in serving_decode.wanted(model, options)] for model in (qwen, llama)}
    assert set(keys[llama.name]) - set(keys[qwen.name]) == {"32x4096+128"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--points", "32x128"], "a point is BATCHxINPUT+OUTPUT, like 32x128+128, not 32x128"),
        (["--points", "1x299+2"], "point 1x299+2 is longer than --length 300"),
        (["--points", "999999x200+8"], "point 999999x200+8 needs more than 26 GiB of KV cache in tiny"),
        (["--layers", "3"], "tiny has 2 layers, not 3"),
    ],
)
def test_bad_options(
    tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], message: str, fake: type[FakeEngine]
) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, *more)
    assert message in capsys.readouterr().err
    assert fake.starts == []


def test_what_was_timed_before_the_end_stays(
    tmp_path: Path,
    fake: type[FakeEngine],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The second point takes longer than the budget: it is given up, without an error."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(serving_decode, "time", SimpleNamespace(monotonic=lambda: clock.now))
    works = fake.time

    def slow(engine: FakeEngine, batch: int, *more: Any) -> float:
        if batch == 1:
            clock.now = 281
            raise NoAnswer("no answer from the engine in 200 s")
        return works(engine, batch, *more)

    monkeypatch.setattr(fake, "time", slow)
    entry = run(tmp_path, "--budget", "280")
    assert list(entry["points"]) == ["32x128+128"]
    out = capsys.readouterr().out
    assert "the 280 s are over; no answer from the engine in 200 s" in out
    assert out.splitlines()[-1] == "8 points left, profiles among them"
    assert fake.running == []


def test_points_that_do_not_fit_the_time_are_left_out(
    tmp_path: Path, fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_decode, "guess", lambda model, point: 100.0 if point.batch == 32 else 1.0)
    entry = run(tmp_path, "--budget", "280")
    assert "32x128+128" not in entry["points"]
    assert "8x128+128" in entry["points"]


def test_an_engine_that_ends_is_told_from_a_slow_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "engine.py"
    monkeypatch.setattr(Engine, "PROGRAM", [sys.executable, str(program)])
    program.write_text("import time; print('loading', flush=True); time.sleep(60)")
    engine = Engine(tmp_path, tmp_path / "slow.log")
    with pytest.raises(NoAnswer, match="no answer from the engine in 3 s"):
        engine.wait(3)
    engine.stop()
    program.write_text("raise SystemExit('no GPU')")
    engine = Engine(tmp_path, tmp_path / "ended.log")
    with pytest.raises(RuntimeError, match=r"the engine has ended; end of .*\nno GPU") as ended:
        engine.wait(60)
    assert not isinstance(ended.value, NoAnswer)
    engine.stop()


@pytest.mark.parametrize("cuda", [True, False])
def test_what_vllm_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: bool) -> None:
    """A cache of a given size; on a GPU so small a share of it that the other engine may have the rest."""
    asked: dict[str, Any] = {}

    class Stop(Exception):
        pass

    def engine(model: str, **options: Any) -> None:
        asked.update(options)
        raise Stop

    vllm = SimpleNamespace(LLM=engine, SamplingParams=None, __file__=str(tmp_path / "__init__.py"))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    limits = ["--cache", "700", "--sequences", "32", "--capture-sizes", "1", "8"]
    monkeypatch.setattr(sys, "argv", ["engine.py", "DIR", *limits])
    with pytest.raises(Stop):
        serving_engine.main()
    assert asked["kv_cache_memory_bytes"] == 700 << 20
    assert asked["max_num_seqs"] == 32
    assert asked["compilation_config"] == {"cudagraph_capture_sizes": [1, 8]}
    assert asked.get("gpu_memory_utilization") == (0.1 if cuda else None)
    assert asked.get("attention_backend") == ("TRITON_ATTN" if cuda else None)
    (tmp_path / "vllm_flash_attn").mkdir()
    (tmp_path / "vllm_flash_attn" / "_vllm_fa3_C.abi3.so").touch()
    asked.clear()
    with pytest.raises(Stop):
        serving_engine.main()
    assert "attention_backend" not in asked


def test_known_points_are_kept_and_other_sources_are_not(
    tmp_path: Path, fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run(tmp_path)
    fake.asked.clear()
    fake.profiled.clear()
    run(tmp_path)
    assert fake.asked == fake.profiled == []
    assert "0 points left" in capsys.readouterr().out
    monkeypatch.setattr(serving_decode, "sources", lambda: "others")
    assert run(tmp_path)["sources"] == "others"
    assert fake.asked


def test_a_step_is_profiled_once_in_both_engines(tmp_path: Path, fake: type[FakeEngine]) -> None:
    profiles = run(tmp_path)["profiles"]
    assert list(profiles) == ["32x128+128", "1x128+128", "1x128+1"]
    assert profiles["32x128+128"] == {DENSE: {"nvjet_tst": [1, 1500]}, "0.5": {"nvjet_tst": [1, 1000]}}
    assert profiles["1x128+1"][DENSE] == {"nvjet_tst": [1, 5e5], "flash::fwd": [1, 10.0]}
    assert fake.profiled[:4] == [(v, 32, 128, output) for v in (DENSE, "0.5") for output in (128, 1)]
    assert len(fake.profiled) == 10


def test_a_missing_profile_is_made_without_timing_again(tmp_path: Path, fake: type[FakeEngine]) -> None:
    run(tmp_path)
    results = read(tmp_path / "results.json")
    del results["pairs"]["tiny/0.5"]["profiles"]["1x128+128"]
    write(tmp_path / "results.json", results)
    fake.asked.clear()
    fake.profiled.clear()
    assert len(run(tmp_path)["profiles"]) == 3
    assert fake.asked == []
    assert {asked[1:3] for asked in fake.profiled} == {(1, 128)}


@pytest.mark.parametrize("gone", [False, True])
def test_a_failing_profile_costs_no_timing(
    tmp_path: Path,
    fake: type[FakeEngine],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    gone: bool,
) -> None:
    works = fake.profile

    def fail(engine: FakeEngine, batch: int, *more: Any) -> Any:
        if batch == 32:
            raise RuntimeError("no answer\nof whom") if gone else ProfileError("no CUPTI")
        return works(engine, batch, *more)

    monkeypatch.setattr(fake, "profile", fail)
    entry = run(tmp_path)
    assert len(entry["points"]) == len(points(128, 300))
    assert entry["profiles"]["32x128+128"] == {"error": "of whom" if gone else "no CUPTI"}
    assert len(entry["profiles"]) == (1 if gone else 3), "an engine that is gone is not asked again"
    assert f"{2 if gone else 0} points left" in capsys.readouterr().out
    fake.asked.clear()
    assert len(run(tmp_path)["profiles"]) == 3
    assert fake.asked == []


def test_without_time_nothing_is_started(tmp_path: Path, fake: type[FakeEngine]) -> None:
    assert run(tmp_path, "--budget", "10") == {}
    assert fake.asked == []


def test_a_failing_engine_takes_the_other_one_along(
    tmp_path: Path, fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> float:
        raise RuntimeError("no answer")

    monkeypatch.setattr(fake, "time", fail)
    with pytest.raises(RuntimeError, match="no answer"):
        run(tmp_path)
    assert fake.running == []


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    serving_decode.main(["--dry-run", "--results", str(tmp_path / "none.json")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert "Qwen3-32B, dense ratio 0.5: 31.2 and 26.5 GB of linear weights, 10 points" in lines[0]
    assert "3 profiles (32x128+128, 1x128+128, 1x8192+1), about" in lines[0]


@pytest.mark.vllm
def test_real_engines_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights from config.json alone, in both variants; numbers have no meaning on a CPU."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    logs = str(tmp_path / "logs")
    entry = run(tmp_path, "--eager", "--no-onednn", "--output", "4", "--repeats", "1", "--logs", logs)
    assert len(entry["points"]) == len(points(4, 300))
    for figure in entry["points"].values():  # differences of noise: not even their sign is certain
        assert len(figure["dense_seconds"]) == len(figure["spense_seconds"]) == 1
    assert all(engine["memory"][0]["weights"] > 0 for engine in entry["engines"].values())
    assert list(entry["profiles"]) == ["32x128+4", "1x128+4", "1x128+1"]
    for key, profile in entry["profiles"].items():
        for variant, kernels in profile.items():
            kinds = {category(name) for name, (calls, _) in kernels.items() if calls >= 1}
            assert kinds >= {"dense GEMM", "attention", "sampling"}, (key, variant)


# --- the server ---------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """No server and no load: throughput doubles up to 4 requests a second, then grows by 2 %."""
    seen: dict[str, list] = {"served": [], "rates": []}

    @contextmanager
    def fake_serve(model: Path, log: Path, arguments: Any) -> Iterator[SimpleNamespace]:
        seen["served"].append(json.loads((model / "config.json").read_text())["quantization_config"])
        yield SimpleNamespace(port=1, start_seconds=2.0)

    def fake_load(port: int, model: Path, mix: Any, rate: float, *_: Any) -> dict[str, float]:
        seen["rates"].append((mix.input, rate))
        return {"rate": rate, "output_throughput": min(rate, 4) * 100 + 2 * rate}

    monkeypatch.setattr(serving_openai, "serve", fake_serve)
    monkeypatch.setattr(serving_openai, "load", fake_load)
    return seen


def serve_tiny(tmp_path: Path, *more: str) -> dict[str, Any]:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    common = ["--models", "tiny", "--tokenizer", str(tmp_path), "--logs", str(tmp_path / "logs")]
    serving_openai.main([*common, "--results", str(tmp_path / "openai.json"), *more])
    return read(tmp_path / "openai.json").get("servers", {})


def test_rates_rise_until_throughput_does_not(tmp_path: Path, server: dict[str, list]) -> None:
    found = serve_tiny(tmp_path)
    assert [q["quant_method"] for q in server["served"]] == ["compressed-tensors", "spense"]
    for variant in ("dense", "0.5"):
        for mix in ("random", "chat"):
            entry = found[f"tiny/{variant}"]["mixes"][mix]
            assert [point["rate"] for point in entry["points"]] == [1, 2, 4, 8]
            assert entry["saturated"]
    server["rates"].clear()
    serve_tiny(tmp_path)
    assert server["rates"] == []  # all of it is known


def test_an_interrupted_mix_goes_on_at_its_next_rate(
    tmp_path: Path, server: dict[str, list], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = serving_openai.load

    def stop(port: int, model: Path, mix: Any, rate: float, *more: Any) -> dict[str, float]:
        if rate == 4:
            raise KeyboardInterrupt
        return fake(port, model, mix, rate, *more)

    monkeypatch.setattr(serving_openai, "load", stop)
    with pytest.raises(KeyboardInterrupt):
        serve_tiny(tmp_path)
    monkeypatch.setattr(serving_openai, "load", fake)
    server["rates"].clear()
    serve_tiny(tmp_path)
    assert server["rates"][:2] == [(1024, 4), (1024, 8)]


def test_curves_are_drawn(tmp_path: Path, server: dict[str, list], monkeypatch: pytest.MonkeyPatch) -> None:
    results = {
        "servers": {
            f"tiny/{variant}": {
                "mixes": {
                    "chat": {
                        "points": [
                            {"output_throughput": 10.0 * i}
                            | {f"p{p}_{w}_ms": i * p for p in (50, 99) for w in ("ttft", "itl")}
                            for i in (1, 2, 3)
                        ]
                    }
                }
            }
            for variant in ("dense", "0.5")
        }
    }
    monkeypatch.setattr(serving_openai, "PLOT", tmp_path / "plot.png")
    serving_openai.report(results)
    assert (tmp_path / "plot.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="run the benchmark first"):
        serving_openai.report({})


def test_a_tokenizer_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        serving_openai.main(["--tokenizer", str(tmp_path)])
    assert "--tokenizer needs a directory with tokenizer.json" in capsys.readouterr().err
