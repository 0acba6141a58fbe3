"""Both models side by side: the default preset against SpenseGPT+, and against what we want of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.accuracy.frontier_report import Figure, Figures
from benchmarks.common.markdown import table

OURS, THEIRS = "guided", "spensegpt+"
TEXTS = {"wikipedia": "Wikipedia", "fiction": "novel", "speeches": "speeches"}
"""What is scored, the calibration text's own kind first."""
TIME_GOAL = 2.0


@dataclass(frozen=True)
class Setting:
    """A model and a dense ratio; ``goal``: the most loss that we want, relative to SpenseGPT+."""

    model: str
    name: str
    dense_ratio: float
    goal: float

    @property
    def title(self) -> str:
        return f"{self.name}, {50 * (1 - self.dense_ratio):g} %"


SETTINGS = [
    Setting("smollm2", "SmolLM2-135M", 0.5, 0.48),
    Setting("smollm2", "SmolLM2-135M", 0.25, 0.50),
    Setting("gemma-3-270m", "Gemma 3 270M", 0.5, 0.60),
    Setting("gemma-3-270m", "Gemma 3 270M", 0.25, 0.60),
]


class Comparison:
    """Losses of the two methods in one setting: loss over dense in nats, by text and seed."""

    def __init__(self, setting: Setting, figures: Figures) -> None:
        self.setting, self.figures = setting, figures

    def losses(self, method: str, text: str) -> dict[int, float]:
        """By seed; those that are measured."""
        dense = self.figures.dense.get(text, {}).get("nll", math.nan)
        runs = self.figures.by_seed(f"{method}{self.setting.dense_ratio}")
        found = {seed: run[text] for seed, run in runs.items() if text in run}
        return {seed: of["nll"] - of.get("reference_nll", dense) for seed, of in found.items()}

    def paired(self, text: str) -> list[tuple[float, float]]:
        """(ours, theirs) of the seeds that both have."""
        ours, theirs = self.losses(OURS, text), self.losses(THEIRS, text)
        return [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]

    def ratio(self, text: str) -> float | None:
        """Ratio of the mean losses."""
        pairs = self.paired(text)
        return sum(a for a, _ in pairs) / sum(b for _, b in pairs) if pairs else None

    def worse(self) -> int:
        """In how many (text, seed) we lose more than they do."""
        return sum(a > b for text in TEXTS for a, b in self.paired(text))

    def seconds(self) -> float | None:
        """Ours over theirs, in core seconds of pruning."""
        found = []
        for method in (OURS, THEIRS):
            runs = self.figures.by_seed(f"{method}{self.setting.dense_ratio}").values()
            values = [run["cost"]["prune_seconds"] for run in runs if "prune_seconds" in run.get("cost", {})]
            if not values:
                return None
            found.append(statistics.fmean(values))
        return found[0] / found[1]

    def cells(self) -> list[str]:
        """A row of the table."""
        pairs = self.paired("wikipedia")
        cells = [self.setting.title, str(len(pairs))]
        for column in range(2):
            values = [pair[1 - column] for pair in pairs]
            cells.append(Figure.of(values).text(".3f") if values else "–")
        for text in TEXTS:
            ratio = self.ratio(text)
            goal = self.setting.goal if text == "wikipedia" else 1.0
            cells.append("–" if ratio is None else f"{ratio:.2f} ({_verdict(ratio, goal)})")
        seconds = self.seconds()
        compared = sum(len(self.paired(text)) for text in TEXTS)
        cells.append(f"{self.worse()} of {compared}")
        cells.append("–" if seconds is None else f"{seconds:.1f}× ({_verdict(seconds, TIME_GOAL)})")
        return cells


def goals_table(figures: Callable[[str], Figures]) -> str:
    """Markdown; ``figures`` gives those of a model on the test split."""
    texts = [f"{name}: ours / theirs" for name in TEXTS.values()]
    titles = ["model", "seeds", "SpenseGPT+, nats", "`guided`, nats", *texts, "worse in", "core time"]
    return table(titles, [Comparison(setting, figures(setting.model)).cells() for setting in SETTINGS])


def side_by_side(results: dict[str, dict[str, Any]]) -> str:
    """:func:`goals_table` of results files' contents by model."""
    return goals_table(lambda model: Figures(results[model], "test"))


def _verdict(value: float, goal: float) -> str:
    return f"goal {goal:g}: {'met' if value <= goal else '**missed**'}"
