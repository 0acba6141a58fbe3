"""How long does ``spense prune`` take for a model, and which stage takes it? Measured on a few of its layers.

    python -m benchmarks.pruning.pruning_time --shape qwen3-32b | smollm2 [--check MODEL TEXT] [--report]

makes random models of the shape with one layer and with a few, prunes them by the product's own pipeline with
fewer calibration windows than the real run has, and times every stage (on CUDA between synchronisations).
The difference of two such models is what their extra layers take; the rest comes once. So a model takes
``once + layers · per layer``; stages that are linear in tokens (windows keep their length) are scaled to the
real number of windows. ``--check`` prunes a whole real model as well and compares. Writes
results/pruning_time_SHAPE.json; --report makes docs/pruning_time.md from all of them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.results import ROOT, provenance, read, write
from vllm_spense.models import presets
from vllm_spense.pruning import PruneConfig, layer, prune
from vllm_spense.pruning.config import Preset
from vllm_spense.pruning.solvers.joint import tokens_used
from vllm_spense.pruning.stages import Stage, watched

RESULTS = ROOT / "benchmarks" / "results"
GPU_RESULT = RESULTS / "gpu" / "pruning.json"
TABLE = ROOT / "docs" / "pruning_time.md"
PRESETS = ("guided", "spensegpt+", "spensegpt")
WORDS = 200_000
Runs = dict[str, dict[str, list[dict[str, float]]]]
"""Seconds by stage of every run, by preset and number of layers (as text, for JSON)."""


@dataclass(frozen=True)
class Shape:
    """A model and the calibration of the real run; ``few``: layers of the larger measured model.

    ``goal`` and ``paper`` in seconds, the paper's (arXiv 2606.10445, one B200) by preset.
    """

    config: dict[str, Any]
    layers: int
    samples: int
    seq_len: int
    few: int
    goal: float | None = None
    paper: dict[str, float] = field(default_factory=dict)


def _model(
    kind: str, hidden: int, intermediate: int, heads: int, kv: int, head: int, vocab: int, **more: Any
) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads}
    return (
        {"model_type": kind, "num_key_value_heads": kv, "head_dim": head, "vocab_size": vocab} | sizes | more
    )


QWEN3_32B = presets.PRESETS["Qwen3-32B"]
SHAPES = {
    "qwen3-32b": Shape(  # a small vocabulary: embedding and head are only read, run once and written
        QWEN3_32B | {"model_type": "qwen3", "vocab_size": 4096, "max_position_embeddings": 16384},
        layers=QWEN3_32B["num_hidden_layers"],
        samples=128,
        seq_len=16384,
        few=2,
        goal=3600,
        paper={"spensegpt": 1.33 * 3600, "spensegpt+": 1.87 * 3600},
    ),
    "smollm2": Shape(
        _model("llama", 576, 1536, 9, 3, 64, 49152, tie_word_embeddings=True),
        layers=30,
        samples=64,
        seq_len=512,
        few=3,
        goal=300,
    ),
    "tiny": Shape(_model("llama", 64, 128, 2, 2, 32, 256), layers=5, samples=16, seq_len=32, few=2),
}


class Stopwatch:
    """Seconds by stage; every moment counts for the innermost stage that is open."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._clock = clock
        self._open = ["other"]
        self._since = clock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._charge()
        inside_gradient = self._open[-1] == "gradient" and name == "forward"
        self._open.append("gradient" if inside_gradient else name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def stop(self) -> dict[str, float]:
        self._charge()
        return dict(self.seconds)

    def _charge(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = self._clock()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now


def growth(stage: str, shape: Shape, samples: int) -> float:
    """How much longer the stage takes with all windows of ``shape`` than with ``samples``."""
    if stage in ("embed", "forward") or stage.startswith("Hessian"):
        return shape.samples / samples
    if stage == "joint fit":  # of so many tokens and no more
        sizes = shape.seq_len, shape.config["hidden_size"]
        return tokens_used(shape.samples, *sizes) / tokens_used(samples, *sizes)
    if stage == "gradient":
        windows = PruneConfig(preset="guided", calibration="any").gradient_samples
        return min(windows, shape.samples) / min(windows, samples)
    return 1.0


def label(stage: Stage, features: int | None, intermediate: int) -> str:
    """Row of the table: a stage about some linears tells down, whose input is the wide one, from the rest."""
    if features is None:
        return stage
    side = "down" if features == intermediate else "gate, up"
    return f"{stage} of {side}" if stage == "Hessian" else f"{stage} {side}"


@contextmanager
def timing(watch: Stopwatch, intermediate: int) -> Iterator[None]:
    """While open, ``watch`` sees the stages of pruning runs."""
    with watched(lambda stage, features: watch.stage(label(stage, features, intermediate))):
        yield


@contextmanager
def keeping(inputs: int) -> Iterator[None]:
    """While open, inputs of down are kept if a run with so many bytes of them would keep them."""
    usual = layer.KEEP_BYTES
    layer.KEEP_BYTES = 1 << 62 if inputs <= usual else 0
    try:
        yield
    finally:
        layer.KEEP_BYTES = usual


def save_model(directory: Path, shape: Shape, layers: int) -> None:
    """A random model of ``layers`` layers in bf16, and a tokenizer of words w0, w1 …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = AutoConfig.for_model(**shape.config | {"num_hidden_layers": layers}, dtype="bfloat16")
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    words = {f"w{i}": i for i in range(shape.config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)


class Bench:
    """Timed runs of one shape in a temporary directory."""

    def __init__(self, shape: Shape, samples: int, root: Path) -> None:
        self.shape, self.samples, self.root = shape, samples, root
        ids = torch.randint(shape.config["vocab_size"], (WORDS,), generator=torch.Generator().manual_seed(0))
        (root / "text.txt").write_text(" ".join(f"w{i}" for i in ids.tolist()))
        for layers in (1, shape.few):
            save_model(root / str(layers), shape, layers)

    def run(self, preset: Preset, layers: int) -> dict[str, float]:
        """Seconds by stage of one pruning run."""
        shape, watch = self.shape, Stopwatch()
        width = 2 if torch.cuda.is_available() else 4
        intermediate = shape.config["intermediate_size"]
        inputs = shape.samples * shape.seq_len * intermediate * width  # of the real run, with all its windows
        with keeping(inputs), timing(watch, intermediate):
            self.prune(self.root / str(layers), self.root / "text.txt", preset, self.samples)
        return watch.stop()

    def prune(self, model: Path, text: Path, preset: Preset, samples: int) -> float:
        config = PruneConfig(
            preset=preset, calibration=str(text), num_samples=samples, seq_len=self.shape.seq_len
        )
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            return prune(model, Path(folder) / "out", config).seconds


def extrapolate(runs: dict[str, list[dict[str, float]]], shape: Shape, samples: int) -> dict[str, dict]:
    """By stage: seconds per layer and once, as measured, how often the windows, and seconds of the model."""
    few, medians = str(shape.few), {}
    for layers, repeats in runs.items():
        names = {name for run in repeats for name in run}
        medians[layers] = {n: statistics.median(run.get(n, 0.0) for run in repeats) for n in names}
    stages = {}
    for name, seconds in sorted(medians[few].items(), key=lambda item: -item[1]):
        one = medians["1"].get(name, 0.0)
        per_layer = (seconds - one) / (shape.few - 1)
        times = growth(name, shape, samples)
        total = times * (one + (shape.layers - 1) * per_layer)
        stages[name] = {"layer": per_layer, "once": one - per_layer, "times": times, "model": total}
    return stages


def summary(runs: Runs, shape: Shape, samples: int) -> dict[str, Any]:
    """What goes into the results file for the presets that are complete."""
    stages = {
        preset: extrapolate(layers, shape, samples) for preset, layers in runs.items() if len(layers) == 2
    }
    seconds = {preset: sum(stage["model"] for stage in found.values()) for preset, found in stages.items()}
    return {
        "shape": asdict(shape),
        "measured": {"layers": [1, shape.few], "samples": samples, "seq_len": shape.seq_len, "runs": runs},
        "extrapolated": (
            f"{shape.layers} layers from {shape.few}; {shape.samples} windows from {samples} for embed, "
            "gradient, forward, Hessian and joint fit; random weights, half of each MLP dense, "
            f"a vocabulary of {shape.config['vocab_size']}"
        ),
        "stages": stages,
        "seconds": seconds,
    }


def table(result: dict[str, Any]) -> str:
    """A markdown table, stages by presets, in seconds of the whole model."""
    shape, stages, seconds = result["shape"], result["stages"], result["seconds"]
    names = sorted({n for s in stages.values() for n in s}, key=lambda n: -_most(stages, n))

    def line(title: str, values: dict[str, float | None]) -> str:
        cells = ["–" if values.get(p) is None else f"{values[p]:,.1f}" for p in stages]
        return f"| {' | '.join([title, *cells])} |"

    lines = [line(n, {p: s.get(n, {}).get("model") for p, s in stages.items()}) for n in names]
    lines.append(line("**whole model**", seconds))
    if shape["paper"]:
        lines.append(line("paper, one B200", shape["paper"]))
    if shape["goal"]:
        lines.append(line("goal", dict.fromkeys(stages, shape["goal"])))
    for name, key in (("a real run", "measured"), ("… over extrapolated", "ratio")):
        if result.get("check"):
            lines.append(line(name, {p: entry[key] for p, entry in result["check"].items()}))
    head = f"| seconds | {' | '.join(stages)} |\n|---|{'---|' * len(stages)}\n"
    return head + "\n".join(lines) + "\n"


def _most(stages: dict[str, dict[str, dict]], name: str) -> float:
    return max(found[name]["model"] for found in stages.values() if name in found)


def report(paths: list[Path]) -> None:
    text = "# Pruning time\n\nMade by `python -m benchmarks.pruning.pruning_time --report`.\n"
    for result in filter(None, map(read, paths)):
        made = f"{result['device']}, commit {result['provenance']['commit']}"
        text += (
            f"\n## {result['name']} on {made}\n\nExtrapolated: {result['extrapolated']}.\n\n{table(result)}"
        )
    TABLE.write_text(text)


def device_name() -> str:
    cuda = torch.cuda.is_available()
    return torch.cuda.get_device_name() if cuda else f"a CPU, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--samples", type=int, default=8, help="windows of the measured runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="for repeats")
    parser.add_argument("--check", nargs=2, type=Path, metavar=("MODEL", "TEXT"))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--report", action="store_true", help="only make the table")
    options = parser.parse_args()
    if options.report:
        return report([*sorted(RESULTS.glob("pruning_time_*.json")), GPU_RESULT])
    if torch.cuda.device_count() > 1:
        parser.error("stages are timed on one device: set CUDA_VISIBLE_DEVICES")
    warnings.simplefilter("ignore")  # a few layers are a small model, and few windows are few
    started, shape = time.monotonic(), SHAPES[options.shape]
    path = options.results or RESULTS / f"pruning_time_{options.shape}.json"
    about = {"name": options.shape, "device": device_name()}
    runs: Runs = {preset: {} for preset in options.presets}
    with tempfile.TemporaryDirectory(prefix="spense-time-") as folder:
        root = Path(folder)
        for name in ("warm", "bench"):
            (root / name).mkdir()
        warm = Bench(SHAPES["tiny"], 8, root / "warm")  # imports, libraries' handles
        warm.run("guided", 1)
        bench = Bench(shape, options.samples, root / "bench")
        for repeat in range(options.repeats):
            began = time.monotonic()
            for preset in options.presets:
                for layers in (1, shape.few):
                    runs[preset].setdefault(str(layers), []).append(bench.run(preset, layers))
                content = about | summary(runs, shape, options.samples)
                write(path, content | {"provenance": provenance()})
                print(f"{repeat + 1}. {preset}: {content['seconds'][preset]:.1f} s", flush=True)
            if time.monotonic() - started + (time.monotonic() - began) > options.budget:
                break
        if options.check:
            content["check"] = check = {}
            model, text = options.check
            for preset in options.presets:
                taken = bench.prune(model, text, preset, shape.samples)
                check[preset] = {"measured": taken, "ratio": taken / content["seconds"][preset]}
                write(path, content | {"provenance": provenance()})
    print(table(content))


if __name__ == "__main__":
    main()
