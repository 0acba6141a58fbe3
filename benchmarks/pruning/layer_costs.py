"""Do Fisher costs order layers? Against what pruning one layer alone does to the model's answers.

usage: python -m benchmarks.pruning.layer_costs [--models smollm2 gemma-3-270m]

Per layer: the Fisher costs of the cheaper half of its indices, and the KL divergence from the dense model
with this half in 2:4 (crudely, as the pilot of `guided` does it; vllm_spense/pruning/choice/pilot.py), on 8
calibration windows of 128 tokens. A minute or two of one core each.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.frontier import SUBJECTS
from benchmarks.accuracy.frontier_report import EXPERIMENTS
from benchmarks.common.markdown import insert
from benchmarks.common.results import ROOT, provenance, read, write
from vllm_spense.demo_assets import fetch_text
from vllm_spense.evaluation import load_tokenizer
from vllm_spense.pruning import PruneConfig
from vllm_spense.pruning.activations import LayerInputs
from vllm_spense.pruning.choice.pilot import PILOT_TOKENS, Pilot, cheaper_half
from vllm_spense.pruning.choice.sensitivity import index_costs
from vllm_spense.pruning.pipeline import GRADIENT_TOKENS
from vllm_spense.pruning.source import SourceModel
from vllm_spense.text import calibrate, find_sources

RESULTS = ROOT / "benchmarks" / "results" / "layer_costs.json"
PLOT = ROOT / "docs" / "img" / "layer_costs.png"
TITLES = {"smollm2": "SmolLM2-135M", "gemma-3-270m": "Gemma 3 270M"}


@torch.no_grad()
def measure(model: Path, text: Path) -> dict[str, list[float | None]]:
    """Per layer ``fisher`` (up to a common factor) and ``divergence`` (nats per token)."""
    config = PruneConfig(calibration=str(text))
    source = SourceModel(model, torch.device("cpu"))
    sizes = config.num_samples, config.seq_len, config.seed
    windows = calibrate(find_sources(str(text)), load_tokenizer(model), *sizes).windows

    def embed(tokens: torch.Tensor) -> LayerInputs:
        with source.resident(*source.embedding()):
            return LayerInputs(source.network, tokens, source.device, dtype=torch.float32)

    some = windows[: config.gradient_samples, :GRADIENT_TOKENS]
    costs = index_costs(source, embed(some), some).fisher
    halves = [cheaper_half(cost, config.alignment) for cost in costs]
    measured = windows[-config.pilot_samples :, :PILOT_TOKENS]
    found = Pilot(source, None).layers(embed(measured), measured, halves)
    return {
        "fisher": [float(cost[half].sum()) for cost, half in zip(costs, halves, strict=True)],
        "divergence": found,
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: how the two agree in each model."""
    lines = [
        "| model | correlation of the logarithms | most underrated layers | most overrated layers |",
        "|---|---|---|---|",
    ]
    for name, figures in results.items():
        ratios = [d / f for d, f in zip(figures["divergence"], figures["fisher"], strict=True)]
        usual = sorted(ratios)[len(ratios) // 2]
        order = sorted(range(len(ratios)), key=ratios.__getitem__)
        under = ", ".join(f"{i} ({ratios[i] / usual:.1f}×)" for i in order[:-4:-1])
        over = ", ".join(f"{i} ({ratios[i] / usual:.1f}×)" for i in order[:3])
        logs = torch.tensor([figures["fisher"], figures["divergence"]], dtype=torch.float64).log()
        lines.append(f"| {TITLES[name]} | {float(torch.corrcoef(logs)[0, 1]):.2f} | {under} | {over} |")
    return "\n".join(lines)


def plot(results: dict[str, Any]) -> None:
    """One panel per model; the line is what costs that order layers would lie on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(1, len(results), figsize=(4.5 * len(results), 3.8), squeeze=False)
    for axis, (name, figures) in zip(axes[0], results.items(), strict=True):
        fisher, divergence = figures["fisher"], figures["divergence"]
        scale = math.exp(sum(math.log(d / f) for d, f in zip(divergence, fisher, strict=True)) / len(fisher))
        predicted = [scale * value for value in fisher]
        axis.loglog(predicted, divergence, "o", markersize=4)
        for i, point in enumerate(zip(predicted, divergence, strict=True)):
            axis.annotate(str(i), point, fontsize=6, xytext=(3, 2), textcoords="offset points")
        ends = [min(predicted), max(predicted)]
        axis.loglog(ends, ends, linewidth=0.8, color="grey")
        axis.set_title(TITLES[name], fontsize=9)
        axis.set_xlabel("Fisher cost of the layer's cheaper half, scaled", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7, which="both")
    axes[0][0].set_ylabel("measured KL, nats per token", fontsize=8)
    picture.tight_layout()
    picture.savefig(PLOT, dpi=130)
    pyplot.close(picture)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--assets", type=Path, default=ROOT / ".cache" / "assets")
    arguments = parser.parse_args()
    text = fetch_text(arguments.assets, print) / "train.txt"
    results = read(RESULTS)
    for name in arguments.models:
        figures = measure(SUBJECTS[name].fetch(arguments.assets, print), text)
        results[name] = figures | {"made": provenance()}
        write(RESULTS, results)
    insert(EXPERIMENTS, "layer-costs", table(results))
    plot(results)


if __name__ == "__main__":
    main()
