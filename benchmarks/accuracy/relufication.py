"""What is left of a trained SiLU model that gets ReLU gates: loss and density, by how long it is trained.

usage: python -m benchmarks.accuracy.relufication [--rows ROW …] [--report-only]

`spense recover --activation relu` on SmolLM2, distilled from itself on windows of 512 tokens of the Wikipedia
train split; scored as `benchmarks.accuracy.sparsify` scores thresholds, which are the alternative. Finished
rows in benchmarks/results/relufication.json are kept. The table of docs/twell.md is made from that file. Six
minutes of one core per hundred windows.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.sparsify import TOKENS, WINDOW
from benchmarks.common.markdown import insert, table
from benchmarks.common.results import ROOT, entry_of, fingerprint, read, save_entry, write
from vllm_spense.demo_assets import fetch_fiction, fetch_model, fetch_text
from vllm_spense.evaluation import evaluate
from vllm_spense.evaluation.density import text_density
from vllm_spense.format.checkpoint import CONFIG_NAME
from vllm_spense.recovery import RecoveryConfig, recover
from vllm_spense.recovery.gates import relu_config
from vllm_spense.recovery.training import RecoveryError

RESULTS = ROOT / "benchmarks" / "results" / "relufication.json"
DOCUMENT = ROOT / "docs" / "twell.md"
SOURCES = [ROOT / "vllm_spense" / "recovery", ROOT / "vllm_spense" / "evaluation" / "hidden.py"]


@dataclass(frozen=True)
class Row:
    """A run: so many windows, the highest learning rate, the penalty. Without windows gates alone change."""

    windows: int
    learning_rate: float = 1e-4
    l1: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.windows}/{self.learning_rate:g}/{self.l1:g}"

    def make(self, model: Path, text: Path, out: Path) -> None:
        if self.windows:
            config = RecoveryConfig(
                calibration=str(text / "train.txt"),
                activation="relu",
                l1=self.l1,
                steps=self.windows,
                learning_rate=self.learning_rate,
                seq_len=WINDOW,
                overwrite=True,
            )
            recover(model, out, config)
            return
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(model, out)
        write(out / CONFIG_NAME, relu_config(read(model / CONFIG_NAME)))


ROWS = (
    Row(0),
    Row(100),
    Row(100, 3e-4),
    Row(100, 1e-3),
    Row(500, 3e-4),
    Row(500, 3e-4, 2e-5),
    Row(500, 3e-4, 2e-4),
)
DENSE = "dense"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", type=Path, default=ROOT / ".cache" / "assets")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "relufication")
    parser.add_argument("--rows", nargs="*", metavar="ROW", help=f"of {', '.join(row.key for row in ROWS)}")
    parser.add_argument("--report-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.report_only:
        model = fetch_model(arguments.assets, print)
        texts = {
            "wikipedia": fetch_text(arguments.assets, print),
            "novel": fetch_fiction(arguments.assets, print),
        }
        measure(
            model,
            texts,
            arguments.work,
            [row for row in ROWS if not arguments.rows or row.key in arguments.rows],
        )
    write_report(read(RESULTS))


def measure(model: Path, texts: dict[str, Path], work: Path, rows: list[Row]) -> None:
    """Fill in the dense model's row and those of ``rows`` that are missing; ``texts``: directories."""
    sources = fingerprint(SOURCES)

    def score(directory: Path) -> dict[str, float]:
        return {
            name: evaluate(directory, text / "test.txt", seq_len=WINDOW, max_tokens=TOKENS[name]).nll
            for name, text in texts.items()
        }

    if not entry_of(RESULTS, model.name, DENSE, sources):
        save(model.name, DENSE, sources, score(model))
    for row in rows:
        if entry_of(RESULTS, model.name, row.key, sources):
            continue
        out = work / model.name / row.key.replace("/", "-")
        try:
            row.make(model, texts["wikipedia"], out)
        except RecoveryError as error:
            save(model.name, row.key, sources, {"refused": str(error)})
            continue
        density = text_density(
            out, texts["wikipedia"] / "test.txt", seq_len=WINDOW, max_tokens=TOKENS["wikipedia"]
        )
        shares = [layer.density for layer in density.layers.values()]
        figures = score(out) | {
            "density": density.mean,
            "least": min(shares),
            "most": max(shares),
        }
        save(model.name, row.key, sources, figures)


def save(model: str, key: str, sources: str, figures: dict[str, Any]) -> None:
    save_entry(RESULTS, model, key, {"sources": sources} | figures)
    print(f"{model}, {key}: {figures}", flush=True)


def report(results: dict[str, Any]) -> str:
    """The table: what each row adds to the dense model's loss."""
    lines = []
    for model, entries in results.items():
        dense = entries.get(DENSE, {})
        for row in ROWS:
            if not (entry := entries.get(row.key)):
                continue
            run = [f"{row.learning_rate:g}", f"{row.l1:g}"] if row.windows else ["–", "–"]
            found = ["refused", "–", "–", "–"]
            if "refused" not in entry:
                costs = [f"{entry[text] - dense[text]:+.3f}" for text in TOKENS]
                found = [f"{entry['density']:.1%}", f"{entry['least']:.0%} to {entry['most']:.0%}", *costs]
            lines.append([model, str(row.windows), *run, *found])
    head = ["model", "windows", "learning rate", "λ", "density", "of a layer"]
    return table([*head, "loss over SiLU, Wikipedia", "novel"], lines)


def write_report(results: dict[str, Any]) -> None:
    shown = report(results)
    print(shown)
    insert(DOCUMENT, "relufication", shown)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
