"""Quality against size and speed: pruning methods on trained models, over several calibration seeds.

usage: python -m benchmarks.accuracy.frontier [--model MODEL] [--rows ROW …] [--seeds 0 1 2]
    [--ablations | --tries | --formats]

The first model is SmolLM2-135M-Instruct, on which `guided` was tuned. Gemma 3 270M, on which nothing was, is
fetched only when it is asked for (its licence: benchmarks/accuracy/gemma_model.py).

Each row is pruned for bf16 weights (so that rounding plays no part) on 64 windows of 512 tokens of the train
split, and measured: perplexity, KL divergence and top-1 agreement with the dense model on 32 windows of 512
tokens (Gemma: 12) of Wikipedia text; perplexity on as many of a novel, which no calibration text resembles,
and of speeches, which no choice was made on; a four-way continuation task. Tune with `--split valid`. The
documents show the methods on the test split, and the `--ablations` (one option changed at a time) on the
validation split.

Finished figures, in a file per model in benchmarks/results, are kept: run it again to go on, start it twice
to share the work, `--again` to measure once more. A row takes 8 to 20 minutes of one core per seed; with
OMP_NUM_THREADS=1 the seconds of pruning, which are the processor's, do not depend on what else runs.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.accuracy.formats_report import write_formats
from benchmarks.accuracy.frontier_cost import cost
from benchmarks.accuracy.frontier_goals import SETTINGS, side_by_side
from benchmarks.accuracy.frontier_report import (
    REFUSED,
    write_documents,
    write_goals,
    write_quality,
    write_second_model,
    write_tries,
)
from benchmarks.accuracy.frontier_rows import (
    ABLATIONS,
    BASE,
    BEFORE,
    FORMATS,
    GEMMA_ROWS,
    POINTS,
    README_ROWS,
    ROWS,
    TRIES,
    TUNING,
    Row,
)
from benchmarks.accuracy.gemma_model import fetch_gemma
from benchmarks.accuracy.smollm2 import environment
from benchmarks.accuracy.speeches_text import fetch_speeches
from benchmarks.common.results import ROOT, provenance, read, write
from vllm_spense.demo_assets import Progress, fetch_fiction, fetch_model, fetch_text
from vllm_spense.evaluation import load_model, load_tokenizer
from vllm_spense.evaluation.agreement import agreement
from vllm_spense.evaluation.continuation import continuation, text_items
from vllm_spense.evaluation.perplexity import mean_nll, text_windows
from vllm_spense.recovery import RecoveryError
from vllm_spense.text import Beginning, Bos, context_length, opening

RESULTS = ROOT / "benchmarks" / "results"
SEQ_LEN = 512


@dataclass(frozen=True)
class Subject:
    """A model that is pruned: where it comes from, its results file in ``RESULTS``, its rows and metrics.
    ``windows``: how many of each text are scored; ``impossible``: tries that it does not allow."""

    fetch: Callable[[Path, Progress], Path]
    results: str
    rows: list[Row]
    metrics: tuple[str, ...]
    seeds: tuple[int, ...]
    windows: int = 32
    impossible: tuple[str, ...] = ()

    def known(self) -> dict[str, Row]:
        """All rows that can be measured on it, by key."""
        return {row.key: row for row in [*ROWS, BASE, *ABLATIONS, *TRIES, *FORMATS, *self.rows]}


SUBJECTS = {
    "smollm2": Subject(
        fetch_model,
        "accuracy_frontier.json",
        [*ROWS, *BEFORE],
        ("wikipedia", "fiction", "speeches", "continuation"),
        (0, 1, 2),
    ),
    "gemma-3-270m": Subject(
        fetch_gemma,
        "accuracy_frontier_gemma.json",
        GEMMA_ROWS,
        ("wikipedia", "fiction", "speeches", "without_bos"),
        (0, 1, 2),
        12,
        ("t-attention",),  # one key/value head cannot be parted
    ),
}


class Remembered(torch.nn.Module):
    """A causal language model that runs its layers once per input: every row is compared with it."""

    model: Any

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.states: dict[bytes, torch.Tensor] = {}

    def forward(self, input_ids: torch.Tensor, **options: Any) -> SimpleNamespace:
        key = input_ids.numpy().tobytes()
        if key not in self.states:
            self.states[key] = self.model.model(input_ids=input_ids, **options).last_hidden_state
        return SimpleNamespace(logits=self.model.lm_head(self.states[key]))


class Bench:
    """The texts, the dense model and the measurements on one split; everything is loaded on first use."""

    def __init__(self, subject: Subject, assets: Path, split: str) -> None:
        self.model = subject.fetch(assets, print)
        self.text, self.fiction = fetch_text(assets, print), fetch_fiction(assets, print)
        self.assets = assets
        self.split, self.max_tokens = split, subject.windows * SEQ_LEN
        self.tokenizer = load_tokenizer(self.model)

    @cached_property
    def dense(self) -> torch.nn.Module:
        return load_model(self.model)

    @cached_property
    def reference(self) -> Remembered:
        return Remembered(self.dense)

    @cached_property
    def context(self) -> int:
        return context_length(opening(self.tokenizer))

    def windows(self, folder: Path, bos: Bos = "auto") -> torch.Tensor:
        return text_windows(self.tokenizer, self.beginning(folder), SEQ_LEN, self.max_tokens, bos)

    def beginning(self, folder: Path) -> Beginning:
        return Beginning(folder / f"{self.split}.txt", self.tokenizer)

    def wikipedia(self, model: torch.nn.Module) -> dict[str, float]:
        windows = self.windows(self.text)
        if model is self.dense:
            nll = mean_nll(model, windows, context=self.context)
            return {"nll": nll, "reference_nll": nll, "kl": 0.0, "top1": 1.0}
        return asdict(agreement(model, self.reference, windows, context=self.context))

    def without_bos(self, model: torch.nn.Module) -> dict[str, float]:
        return {"nll": mean_nll(model, self.windows(self.text, "never"))}

    def novel(self, model: torch.nn.Module) -> dict[str, float]:
        return {"nll": mean_nll(model, self.windows(self.fiction), context=self.context)}

    def speeches(self, model: torch.nn.Module) -> dict[str, float]:
        windows = self.windows(fetch_speeches(self.assets, print))
        return {"nll": mean_nll(model, windows, context=self.context)}

    def continuation(self, model: torch.nn.Module) -> dict[str, float]:
        result = continuation(model, text_items(self.tokenizer, self.beginning(self.text)))
        return asdict(result) | {"standard_error": result.standard_error}


METRICS: dict[str, Callable[[Bench, torch.nn.Module], dict[str, float]]] = {
    "wikipedia": Bench.wikipedia,
    "without_bos": Bench.without_bos,
    "fiction": Bench.novel,
    "speeches": Bench.speeches,
    "continuation": Bench.continuation,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SUBJECTS, default="smollm2")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="default: those of the model's table")
    parser.add_argument("--ablations", action="store_true", help="these, on the validation split")
    parser.add_argument("--tries", action="store_true", help="rows near the default, on the validation split")
    parser.add_argument("--formats", action="store_true", help="every codec at every size")
    parser.add_argument("--seeds", nargs="+", type=int, help="of the calibration windows")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--metrics", nargs="+", choices=METRICS)
    parser.add_argument("--again", action="store_true", help="measure what is known already once more")
    parser.add_argument("--keep", action="store_true", help="keep the pruned checkpoints in --work")
    parser.add_argument("--plot-only", action="store_true", help="only make the documents")
    parser.add_argument("--assets", type=Path, default=ROOT / ".cache" / "assets")
    parser.add_argument("--work", type=Path, help="default: .cache/frontier/MODEL")
    parser.add_argument("--results", type=Path, help="default: the model's file in benchmarks/results")
    arguments = parser.parse_args()
    subject = SUBJECTS[arguments.model]
    rows = subject.known()
    if unknown := set(arguments.rows or ()) - set(rows):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(rows)}")
    if arguments.formats:
        arguments.rows, arguments.metrics = [row.key for row in FORMATS], ["wikipedia", "fiction"]
    arguments.rows = arguments.rows or [row.key for row in subject.rows]
    arguments.seeds = arguments.seeds or subject.seeds
    if arguments.split != "test" and "speeches" in (arguments.metrics or ()):
        parser.error("the speeches are scored on the test split alone: no choice may be made on them")
    usual = [metric for metric in subject.metrics if metric != "speeches" or arguments.split == "test"]
    arguments.metrics = arguments.metrics or usual
    arguments.work = arguments.work or ROOT / ".cache" / "frontier" / arguments.model
    arguments.results = arguments.results or RESULTS / subject.results
    if arguments.ablations or arguments.tries:
        shown = TUNING if arguments.ablations else TRIES
        possible = [row.key for row in shown if row.key not in subject.impossible]
        arguments.split, arguments.rows = "valid", possible
        arguments.metrics = ["wikipedia", "fiction"]
    if not arguments.plot_only:
        bench = Bench(subject, arguments.assets, arguments.split)
        jobs = [(rows[key], seed) for seed in arguments.seeds for key in arguments.rows]
        for row, seed in jobs:
            if row.seeded or seed == arguments.seeds[0]:
                measure(row, seed if row.seeded else 0, bench, arguments)
    files = {name: RESULTS / subject.results for name, subject in SUBJECTS.items()}
    files[arguments.model] = arguments.results
    figures = {name: current(read(path), SUBJECTS[name].known()) for name, path in files.items()}
    write_documents(figures["smollm2"], [*ROWS, *BEFORE], TUNING)
    write_second_model(figures["gemma-3-270m"], GEMMA_ROWS)
    write_goals(side_by_side(figures))
    titles = {setting.model: setting.name for setting in SETTINGS}
    known = {name: SUBJECTS[name].known() for name in README_ROWS}
    quality = {name: [known[name][key] for key in keys] for name, keys in README_ROWS.items()}
    write_quality({titles[name]: (figures[name], of_model) for name, of_model in quality.items()})
    write_tries(figures, TRIES)
    write_formats(figures, POINTS)


def current(results: dict[str, Any], rows: dict[str, Row]) -> dict[str, Any]:
    """Only the runs of these rows that were made with the rows' present settings."""
    runs = results.get("runs", {}).items()
    known = {name: rows[key] for name, _ in runs if (key := name.rpartition("/")[0]) in rows}
    return {"runs": {n: run for n, run in runs if n in known and run.get("settings") == known[n].settings()}}


def measure(row: Row, seed: int, bench: Bench, arguments: argparse.Namespace) -> None:
    """Prune once, then fill in the figures that are missing, saving after each. A model that recovery refuses
    is a finding, too: its reason is saved."""
    store = Store(arguments.results, f"{row.key}/{seed}", row.settings())
    directory = arguments.work / f"{row.key}-{seed}"
    arguments.work.mkdir(parents=True, exist_ok=True)
    with lock(arguments.work / f"{row.key}-{seed}.lock", wait=False) as mine:
        if not mine:
            print(f"{row.key}, seed {seed}: another process is at it")
            return
        known = {} if arguments.again else store.entry()
        if REFUSED in known:
            return
        wanted = [metric for metric in arguments.metrics if f"{bench.split}/{metric}" not in known]
        if not wanted:
            return
        if row.options is None:
            directory, model = bench.model, bench.dense
            store.save("cost", asdict(cost(directory)))
        else:
            if arguments.again or not directory.is_dir() or "cost" not in store.entry():
                shutil.rmtree(directory, ignore_errors=True)
                try:
                    seconds = row.make(seed, bench.model, bench.text / "train.txt", directory)
                except RecoveryError as error:
                    store.save(REFUSED, {"reason": str(error)})
                    print(f"{row.key}, seed {seed}: {error}", flush=True)
                    return
                store.save("cost", asdict(cost(directory)) | {"prune_seconds": seconds})
            model = load_model(directory)
        for metric in wanted:
            started = time.monotonic()
            figures = METRICS[metric](bench, model)
            store.save(f"{bench.split}/{metric}", figures | {"seconds": time.monotonic() - started})
            print(f"{row.key}, seed {seed}, {metric} ({bench.split}): {figures}", flush=True)
        if row.options is not None and not arguments.keep:
            shutil.rmtree(directory)


class Store:
    """The figures of one row and seed in the results file, which several processes write."""

    def __init__(self, path: Path, key: str, settings: dict[str, Any] | None) -> None:
        self.path, self.key, self.settings = path, key, settings

    def entry(self) -> dict[str, Any]:
        """What is known so far; empty if it was made with other settings."""
        return self._current(read(self.path))

    def save(self, name: str, figures: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with lock(self.path.parent, wait=True):  # not the file itself, which each write replaces
            results = read(self.path)
            known = self._current(results) or {"settings": self.settings}
            known.pop(REFUSED, None)
            made = provenance() | {"environment": environment()}
            results.setdefault("runs", {})[self.key] = known | {name: figures | {"made": made}}
            write(self.path, results)

    def _current(self, results: dict[str, Any]) -> dict[str, Any]:
        entry = results.get("runs", {}).get(self.key, {})
        return entry if entry.get("settings") == self.settings else {}


@contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a file or directory as a lock; the system lets go of it when the process ends, however it ends."""
    if not path.exists():
        path.touch()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        mine = True
    except BlockingIOError:
        mine = False
    try:
        yield mine
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
