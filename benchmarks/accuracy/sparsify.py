"""What does it cost to skip small inputs of down, without training? Loss at 30, 50 and 70 % on two texts.

usage: python -m benchmarks.accuracy.sparsify [--models SmolLM2-135M-Instruct …] [--report-only]

`spense sparsify` with thresholds from 16 windows of the Wikipedia train split, its shares by measured loss or
the same in each layer; scored are the first 16 windows of 512 tokens of the Wikipedia test split and 8 of a
novel's (docs/accuracy.md says which). Finished rows in benchmarks/results/sparsify.json are kept. The table
of docs/twell.md is made from that file. Half an hour of one core per model.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any, Literal

from benchmarks.accuracy.gemma_model import NAME as GEMMA
from benchmarks.common.markdown import insert, table
from benchmarks.common.results import ROOT, entry_of, fingerprint, read, save_entry
from vllm_spense.demo_assets import MODEL_NAME as SMOLLM2
from vllm_spense.demo_assets import fetch_fiction, fetch_text
from vllm_spense.evaluation import evaluate
from vllm_spense.evaluation.density import text_density
from vllm_spense.sparsify import SparsifyConfig, sparsify

RESULTS = ROOT / "benchmarks" / "results" / "sparsify.json"
DOCUMENT = ROOT / "docs" / "twell.md"
SOURCES = [ROOT / "vllm_spense" / "sparsify", ROOT / "vllm_spense" / "evaluation" / "thresholds.py"]
WINDOW = 512
TOKENS = {"wikipedia": 16 * 512, "novel": 8 * 512}
LEVELS = (0.3, 0.5, 0.7)
Allocation = Literal["uniform", "loss"]
ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "loss")
SHOWN = {"uniform": "the same share in each layer", "loss": "by measured loss"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", type=Path, default=ROOT / ".cache" / "assets")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "sparsify")
    parser.add_argument("--models", nargs="*", default=[SMOLLM2, GEMMA], help="directories in --assets")
    parser.add_argument("--report-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.report_only:
        wikipedia, novel = fetch_text(arguments.assets, print), fetch_fiction(arguments.assets, print)
        texts = {"wikipedia": wikipedia, "novel": novel}
        for model in arguments.models:
            measure(arguments.assets / model, texts, arguments.work)
    write_report(read(RESULTS))


def measure(model: Path, texts: dict[str, Path], work: Path) -> None:
    """Fill in the rows of one model that are missing; ``texts``: directories with splits."""
    sources = fingerprint(SOURCES)

    def known(key: str) -> bool:
        return bool(entry_of(RESULTS, model.name, key, sources))

    def score(directory: Path) -> dict[str, float]:
        return {
            name: evaluate(directory, text / "test.txt", seq_len=WINDOW, max_tokens=TOKENS[name]).nll
            for name, text in texts.items()
        }

    if not known("dense"):
        save(model.name, "dense", sources, score(model))
    for level in LEVELS:
        for allocation in ALLOCATIONS:
            if known(key := f"{allocation}/{level:g}"):
                continue
            out = work / model.name / key
            config = SparsifyConfig(
                calibration=str(texts["wikipedia"] / "train.txt"),
                seq_len=WINDOW,
                sparsity=level,
                allocation=allocation,
                overwrite=True,
            )
            done = sparsify(model, out, config)
            density = text_density(out, texts["wikipedia"] / "test.txt", max_tokens=8 * WINDOW)
            shares = [1 - layer.density for layer in density.layers.values()]
            figures = score(out) | {
                "skipped": 1 - density.mean,
                "least": min(shares),
                "most": max(shares),
                "divergence": done.loss,
                "seconds": done.seconds,
            }
            save(model.name, key, sources, figures)
            shutil.rmtree(out)


def save(model: str, key: str, sources: str, figures: dict[str, float]) -> None:
    save_entry(RESULTS, model, key, {"sources": sources} | figures)
    print(f"{model}, {key}: {figures}", flush=True)


def report(results: dict[str, Any]) -> str:
    """The table: what each row adds to the dense model's loss."""
    lines = []
    for model, rows in results.items():
        dense = rows.get("dense", {})
        for level in LEVELS:
            for allocation in ALLOCATIONS:
                if row := rows.get(f"{allocation}/{level:g}"):
                    costs = [f"{row[text] - dense[text]:+.3f}" for text in ("wikipedia", "novel")]
                    spread = f"{row['least']:.0%} to {row['most']:.0%}"
                    shown = [model, f"{level:.0%}", SHOWN[allocation], f"{row['skipped']:.1%}", spread]
                    lines.append([*shown, *costs])
    head = ["model", "asked", "shares", "skipped on test text", "of a layer", "loss over dense, Wikipedia"]
    return table([*head, "novel"], lines)


def write_report(results: dict[str, Any]) -> None:
    shown = report(results)
    print(shown)
    insert(DOCUMENT, "sparsify", shown)


if __name__ == "__main__":
    main()
