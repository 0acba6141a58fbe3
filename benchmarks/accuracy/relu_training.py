"""Does a slight regularisation cost nothing? The same small Llama trained with SiLU, ReLU, and ReLU with L1.

usage: python -m benchmarks.accuracy.relu_training [--runs silu relu-0.001 …] [--seed 0] [--report-only]

The claim of "Sparser, Faster, Lighter Transformer Language Models" (arXiv 2603.23198) at the size of a CPU:
seven million parameters, three million tokens of Wikipedia text, the same weights at the start and the same
windows for every run. Each takes twelve minutes of one core. Finished runs in
benchmarks/results/relu_training.json are kept; the trained models lie in .cache/relu_training as Hugging
Face directories. The table and plot of docs/twell.md are made from that file.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import small_llama
from benchmarks.accuracy.small_llama import LEARNING_RATE, Plan, described, make_tokenizer, train
from benchmarks.common.markdown import insert, table
from benchmarks.common.results import ROOT, entry_of, fingerprint, read, save_entry, write
from vllm_spense.demo_assets import fetch_text
from vllm_spense.evaluation import evaluate
from vllm_spense.evaluation.density import text_density
from vllm_spense.text import tokenize

RESULTS = ROOT / "benchmarks" / "results" / "relu_training.json"
DOCUMENT = ROOT / "docs" / "twell.md"
PLOT = ROOT / "docs" / "img" / "relu_training.png"
PACKAGE = ROOT / "vllm_spense"
TRAINING = [
    ROOT / "benchmarks" / "accuracy" / "small_llama.py",
    PACKAGE / "recovery" / "penalty.py",
    PACKAGE / "evaluation" / "hidden.py",
]
"""What decides the weights."""
STEPS = 1500
STRENGTHS = (1e-4, 1e-3, 5e-3)
CONTROLS = (1e-3, 5e-4)
"""Learning rates that the document shows, too, where they were run."""
TOKENS = 1 << 16
"""Of the test split, in windows as long as those that were trained on."""


def plans(seed: int, steps: int = STEPS) -> dict[str, Plan]:
    """The runs by name, in the order of the table."""
    found = {"silu": Plan("silu", 0.0, seed, steps), "relu": Plan("relu", 0.0, seed, steps)}
    return found | {f"relu-{l1:g}": Plan("relu", l1, seed, steps) for l1 in STRENGTHS}


def key_of(plan: Plan, learning_rate: float) -> str:
    """What a run goes by in results and directories."""
    return plan.key if learning_rate == LEARNING_RATE else f"{plan.key}/{learning_rate:g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", type=Path, default=ROOT / ".cache" / "assets")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "relu_training")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--runs", nargs="*", metavar="RUN", help=f"of {', '.join(plans(0))}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer for a trial: then give --results")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="another one: a control")
    parser.add_argument("--report-only", action="store_true")
    arguments = parser.parse_args()
    small_llama.LEARNING_RATE = arguments.learning_rate
    if not arguments.report_only:
        text = fetch_text(arguments.assets, print)
        for name, plan in plans(arguments.seed, arguments.steps).items():
            if not arguments.runs or name in arguments.runs:
                measure(plan, text, arguments.work, arguments.results)
    if arguments.results == RESULTS:
        write_report(read(RESULTS))


def measure(plan: Plan, text: Path, work: Path, results: Path) -> None:
    """Train, unless that is done, and measure what came out, unless that is."""
    key = key_of(plan, small_llama.LEARNING_RATE)
    directory = work / key.replace("/", "-")
    sources = fingerprint(TRAINING)
    trained = entry_of(results, "trained", key, sources)
    if not trained or not (directory / "model.safetensors").is_file():
        tokenizer = make_tokenizer(text / "train.txt")
        ids = tokenize(tokenizer, (text / "train.txt").read_text(encoding="utf-8"))
        done = train(plan, ids, tokenizer, directory, lambda line: print(line, flush=True))
        trained = {"sources": sources, "plan": described(plan), "text_tokens": len(ids), **asdict(done)}
        save_entry(results, "trained", key, trained)
    if entry_of(results, "measured", key, sources).get("seconds") == trained["seconds"]:
        return  # of this very model
    options: dict[str, Any] = {"seq_len": 256, "max_tokens": TOKENS}
    scored = evaluate(directory, text / "test.txt", **options)
    found = text_density(directory, text / "test.txt", **options)
    entry = {
        "sources": sources,
        "seconds": trained["seconds"],
        "loss": scored.nll,
        "tokens": scored.tokens,
        "density": found.mean,
        "dead": found.dead,
        "layers": [asdict(layer) for layer in found.layers.values()],
    }
    if plan.activation == "relu":  # what serving goes by
        config = directory / "config.json"
        density = [round(layer.density, 4) for layer in found.layers.values()]
        write(config, read(config) | {"sparsity_density": density})
    save_entry(results, "measured", key, entry)
    print(f"{key}: loss {scored.nll:.4f}, density {found.mean:.2%}, dead {found.dead:.1%}", flush=True)


# -- report --------------------------------------------------------------------------------------


def measured(
    results: dict[str, Any], learning_rate: float = LEARNING_RATE
) -> dict[tuple[str, int], dict[str, Any]]:
    """Figures by run and seed, of whole runs at one learning rate, in the order of the table."""
    entries = results.get("measured", {})
    keys = {
        (name, seed): key_of(plan, learning_rate) for seed in range(8) for name, plan in plans(seed).items()
    }
    order = {name: i for i, name in enumerate(plans(0))}
    found = {place: entries[key] for place, key in keys.items() if key in entries}
    return dict(sorted(found.items(), key=lambda item: (order[item[0][0]], item[0][1])))


def label(name: str) -> str:
    activation, _, l1 = name.partition("-")
    shown = {"silu": "SiLU", "relu": "ReLU"}[activation]
    return f"{shown} + L1, λ = {l1}" if l1 else shown


def report(results: dict[str, Any], learning_rate: float = LEARNING_RATE) -> str:
    """The table: losses of each run beside those of SiLU and of ReLU with the same seed and learning rate."""
    found = measured(results, learning_rate)
    lines = []
    for (name, seed), entry in found.items():
        cells = [label(name), str(seed), f"{entry['loss']:.4f}"]
        for other in ("silu", "relu"):
            base = found.get((other, seed))
            cells.append("–" if base is None or name == other else f"{entry['loss'] - base['loss']:+.4f}")
        shares = [layer["density"] for layer in entry["layers"]]
        neurons = entry["layers"][0]["neurons"]
        cells += [
            f"{entry['density']:.1%}",
            f"{entry['density'] * neurons:.0f} of {neurons}",
            " ".join(f"{100 * share:.1f}" for share in shares),
            f"{entry['dead']:.1%}",
        ]
        lines.append(cells)
    head = ["gate", "seed", "loss, nats", "over SiLU", "over ReLU", "density", "neurons per token"]
    return table([*head, "density per layer, %", "dead neurons"], lines)


def write_report(results: dict[str, Any]) -> None:
    """Print the table, put it into docs/twell.md and draw the plot."""
    shown = report(results)
    for rate in CONTROLS:
        if measured(results, rate):
            shown += f"\n\nThe same at a highest learning rate of {rate:g} instead of {LEARNING_RATE:g}:\n\n"
            shown += report(results, rate)
    print(shown)
    insert(DOCUMENT, "relu-training", shown)
    if measured(results):
        write_plot(results)


def write_plot(results: dict[str, Any]) -> None:
    """Loss against density, controls as rings, and density layer by layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = measured(results)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    names = list(dict.fromkeys(name for name, _ in found))
    colours = dict(zip(names, ("#777777", "#33658a", "#86bbd8", "#f6ae2d", "#c8553d"), strict=False))
    for (name, seed), entry in found.items():
        first = seed == min(other for known, other in found if known == name)
        point = {"color": colours[name], "marker": "o", "linestyle": ""}
        left.plot(100 * entry["density"], entry["loss"], label=label(name) if first else None, **point)
        if first:
            shares = [100 * max(layer["density"], 1e-4) for layer in entry["layers"]]
            right.plot(range(len(shares)), shares, marker="o", markersize=3, color=colours[name])
    for rate, size in zip(CONTROLS, (6, 9), strict=True):
        for (name, _), entry in measured(results, rate).items():
            ring = {"color": colours.get(name, "black"), "markersize": size, "fillstyle": "none"}
            left.plot(100 * entry["density"], entry["loss"], marker="o", linestyle="", **ring)
    left.set_xscale("log")
    left.set_xlabel("hidden values that are not zero, %", fontsize=8)
    left.set_ylabel("loss on held-out text, nats per token", fontsize=8)
    left.legend(fontsize=7, frameon=False)
    right.set_yscale("log")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_xlabel("layer", fontsize=8)
    right.set_ylabel("density, %", fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
