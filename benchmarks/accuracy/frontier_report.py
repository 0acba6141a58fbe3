"""Tables of docs/accuracy.md, docs/experiments.md and README, and the plot, from accuracy_frontier*.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.common.markdown import insert, table
from benchmarks.common.results import ROOT

DOCUMENT = ROOT / "docs" / "accuracy.md"
EXPERIMENTS = ROOT / "docs" / "experiments.md"
README = ROOT / "README.md"
PLOT = ROOT / "docs" / "img" / "accuracy_frontier.png"
PLOT_LIMIT = 2.0  # nats; losses beyond it are marked at the edge


class Line(Protocol):
    """What of a row is shown."""

    @property
    def key(self) -> str: ...

    @property
    def label(self) -> str: ...


@dataclass(frozen=True)
class Figure:
    """Mean and standard deviation over seeds; the deviation is None for a single run."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, form: str) -> str:
        spread = None if self.deviation is None else f"{self.deviation:{form}}"
        return f"{self.mean:{form}}" + ("" if spread in (None, f"{0:{form}}") else f" ± {spread}")


Run = dict[str, Any]
"""The figures of one row and seed, on one split: cost and the metrics of frontier.py."""


@dataclass(frozen=True)
class Column:
    """One figure: how it comes out of a run, and its format."""

    title: str
    value: Callable[[Run, Run], float]
    form: str


def loss(run: Run, dense: Run) -> float:
    """ln(perplexity / dense perplexity), in nats."""
    return run["wikipedia"]["nll"] - run["wikipedia"]["reference_nll"]


COLUMNS = {
    "sparsity": Column("MLP zeros", lambda run, dense: run["cost"]["mlp_sparsity"], ".1%"),
    "perplexity": Column("perplexity", lambda run, dense: math.exp(run["wikipedia"]["nll"]), ".2f"),
    "loss": Column("loss over dense, nats", loss, ".3f"),
    "fiction": Column("perplexity, novel", lambda run, dense: math.exp(run["fiction"]["nll"]), ".2f"),
    "speeches": Column("perplexity, speeches", lambda run, dense: math.exp(run["speeches"]["nll"]), ".2f"),
    "without_bos": Column(
        "perplexity without BOS", lambda run, dense: math.exp(run["without_bos"]["nll"]), ".2f"
    ),
    "kl": Column("KL, nats", lambda run, dense: run["wikipedia"]["kl"], ".3f"),
    "top1": Column("top-1 agreement", lambda run, dense: run["wikipedia"]["top1"], ".1%"),
    "continuation": Column("continuation", lambda run, dense: run["continuation"]["accuracy"], ".1%"),
    "seconds": Column("pruning, core s", lambda run, dense: run["cost"]["prune_seconds"], ".0f"),
    "mib": Column("MiB", lambda run, dense: run["cost"]["weight_bytes"] / 2**20, ".1f"),
    "bytes": Column(
        "bytes", lambda run, dense: run["cost"]["weight_bytes"] / dense["cost"]["weight_bytes"], ".1%"
    ),
    "decode": Column(
        "decode time",
        lambda run, dense: run["cost"]["decode_seconds"] / dense["cost"]["decode_seconds"],
        ".1%",
    ),
}
FRONTIER_COLUMNS = tuple(column for column in COLUMNS if column != "without_bos")
GEMMA_COLUMNS = (
    *("sparsity", "bytes", "perplexity", "loss", "fiction", "speeches", "kl", "top1"),
    *("without_bos", "seconds"),
)
README_COLUMNS = ("sparsity", "bytes", "perplexity", "fiction", "top1")
TRY_COLUMNS = ("bytes", "loss", "fiction", "kl", "top1", "seconds")
ABLATION_COLUMNS = ("sparsity", "bytes", "perplexity", "loss", "fiction", "kl", "top1", "seconds")


REFUSED = "refused"
"""What a run has instead of figures when recovery's guard wrote no model (``RecoveryError``)."""


class Figures:
    """All figures of a results file on one split."""

    def __init__(self, results: dict[str, Any], split: str) -> None:
        self.runs: dict[str, dict[int, Run]] = {}
        for key, entry in results.get("runs", {}).items():
            run = {
                name.removeprefix(f"{split}/"): figures
                for name, figures in entry.items()
                if name in ("cost", REFUSED) or name.startswith(f"{split}/")
            }
            row, _, seed = key.rpartition("/")
            self.runs.setdefault(row, {})[int(seed)] = run
        self.dense = next(iter(self.by_seed("dense").values()), {})

    def by_seed(self, row: str) -> dict[int, Run]:
        """All runs of a row."""
        return self.runs.get(row, {})

    def get(self, row: str, column: str) -> Figure | None:
        """None when no run of the row has what the column needs."""
        values = []
        for run in self.by_seed(row).values():
            try:
                values.append(COLUMNS[column].value(run, self.dense))
            except KeyError:  # not measured yet, or not at all (the dense model's pruning)
                continue
        return Figure.of(values) if values else None

    def table(self, rows: Sequence[Line], columns: Sequence[str] = FRONTIER_COLUMNS) -> str:
        """Markdown; a row without figures shows why recovery refused it, or is left out."""
        titles = [COLUMNS[column].title for column in columns]
        lines = []
        for row in rows:
            if self.get(row.key, "perplexity"):
                found = [(self.get(row.key, column), COLUMNS[column].form) for column in columns]
                cells = ["–" if figure is None else figure.text(form) for figure, form in found]
                lines.append([row.label, *cells])
            elif reasons := [
                run[REFUSED]["reason"] for run in self.by_seed(row.key).values() if REFUSED in run
            ]:
                lines.append([f"{row.label}: {reasons[0].partition(':')[0]}", *["–"] * len(columns)])
        return table(["method", *titles], lines)


def write_documents(results: dict[str, Any], rows: Sequence[Line], ablations: Sequence[Line]) -> None:
    """Print the tables, of rows on the test split and of ablations on the validation split, put them into
    docs/ and draw the plot."""
    figures, tuning = Figures(results, "test"), Figures(results, "valid")
    tables = figures.table(rows), tuning.table(ablations, ABLATION_COLUMNS)
    print(*tables, sep="\n\n")
    insert(DOCUMENT, "frontier", tables[0])
    insert(EXPERIMENTS, "ablations", tables[1])
    if any(figures.get(row.key, "loss") for row in rows):
        write_plot(figures, rows)


def write_second_model(results: dict[str, Any], rows: Sequence[Line]) -> None:
    """Print the table of the second model on the test split and put it into docs/."""
    shown = Figures(results, "test").table(rows, GEMMA_COLUMNS)
    print(f"\n{shown}")
    insert(DOCUMENT, "second-model", shown)


def write_tries(results: dict[str, dict[str, Any]], rows: Sequence[Line]) -> None:
    """Put a table per model, on the validation split, into docs/."""
    parts = []
    for model, of_model in results.items():
        parts.append(f"**{model}**\n\n{Figures(of_model, 'valid').table(rows, TRY_COLUMNS)}")
    insert(EXPERIMENTS, "tries", "\n\n".join(parts))


def write_goals(table: str) -> None:
    """Print the table of both models and put it into docs/."""
    print(f"\n{table}")
    insert(DOCUMENT, "goals", table)


def write_quality(models: dict[str, tuple[dict[str, Any], Sequence[Line]]]) -> None:
    """Put a short table on the test split into README: results and rows by the model's name."""
    lines: list[str] = []
    for name, (results, rows) in models.items():
        heading, rule, *body = Figures(results, "test").table(rows, README_COLUMNS).splitlines()
        lines = lines or [f"| model {heading}", f"|---{rule}"]
        lines += [f"| {name} {line}" for line in body]
    insert(README, "quality", "\n".join(lines))


def write_plot(figures: Figures, rows: Sequence[Line]) -> None:
    """Loss over dense against bytes and against predicted decode time; the dense model is the origin."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    colours = dict(zip((row.key for row in rows), map(pyplot.get_cmap("tab20"), range(20)), strict=False))
    panels = {
        "bytes": "bytes of the linear weights in FP8, relative to dense",
        "decode": "predicted decode time of the linear layers, relative to dense FP8",
    }
    for axis, (column, title) in zip(axes, panels.items(), strict=True):
        for row in rows:
            x, y = figures.get(row.key, column), figures.get(row.key, "loss")
            if x is None or y is None:
                continue
            beyond = y.mean > PLOT_LIMIT
            axis.errorbar(
                100 * x.mean,
                min(y.mean, PLOT_LIMIT),
                yerr=None if beyond else y.deviation,
                marker="^" if beyond else "o",
                markersize=5,
                capsize=3,
                linestyle="",
                color=colours[row.key],
                label=f"{row.label} ({y.mean:.2f})",
                clip_on=False,
            )
        axis.set_xlabel(f"{title}, %", fontsize=8)
        axis.set_ylim(0, PLOT_LIMIT)
        axis.set_xlim(right=100)
        axis.invert_xaxis()  # dense, at 100 % and without loss, is the origin
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("loss over dense, nats (lower is better)", fontsize=8)
    axes[0].legend(fontsize=6.5, frameon=False, loc="upper left")
    picture.tight_layout()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(PLOT, dpi=130)
    pyplot.close(picture)
