"""How values are stored against how many are: table and plot of docs/accuracy.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.accuracy.frontier_report import DOCUMENT, Figures
from benchmarks.common.markdown import insert, table
from benchmarks.common.results import ROOT
from vllm_spense.format import Codecs, Layout, LinearFormat

PLOT = ROOT / "docs" / "img" / "accuracy_formats.png"
LARGE = 1024
"""Columns of the layer whose bytes are counted: scales of rows are next to nothing in it, as in real ones."""
COLUMNS = (("loss", ".3f"), ("fiction", ".2f"), ("kl", ".3f"), ("top1", ".1%"))
HEAD = ("loss over dense, nats", "perplexity, novel", "KL, nats", "top-1 agreement")


@dataclass(frozen=True)
class Point:
    """A codec at a dense ratio, and the row of frontier_rows.py that measures it."""

    key: str
    codec: str
    dense_ratio: float

    @property
    def title(self) -> str:
        return {"nf4+fp8": "2:4 in NF4, dense in FP8"}.get(self.codec, self.codec.upper().replace("BF", "bf"))

    @property
    def bytes(self) -> float:
        """Per weight of the MLPs, with metadata and scales."""
        sparse, _, dense = self.codec.partition("+")
        codecs = Codecs.of({"sparse": sparse, "dense": dense or sparse})
        layout = Layout("output", LARGE, LARGE, round(LARGE * (1 - self.dense_ratio)))
        return LinearFormat(layout, codecs).nbytes() / LARGE**2


def write_formats(results: Mapping[str, dict[str, Any]], points: Sequence[Point]) -> None:
    """A table and a panel of the plot per model, on the test split."""
    parts, panels = [], {}
    for model, of_model in results.items():
        figures = Figures(of_model, "test")
        rows, drawn = [], []
        for point in points:
            loss = figures.get(point.key, "loss")
            if loss is None:
                continue
            drawn.append((point, loss.mean))
            found = [(figures.get(point.key, column), form) for column, form in COLUMNS]
            cells = ["–" if figure is None else figure.text(form) for figure, form in found]
            ratio = {1.0: "dense", 0.0: "2:4"}.get(point.dense_ratio, f"{point.dense_ratio:g}")
            rows.append([point.title, ratio, f"{point.bytes:.2f}", *cells])
        head = ["values", "dense ratio", "bytes per MLP weight", *HEAD]
        parts.append(f"**{model}**\n\n{table(head, rows)}")
        panels[model] = drawn
    insert(DOCUMENT, "formats", "\n\n".join(parts))
    if any(panels.values()):
        plot(panels)


def plot(panels: Mapping[str, Sequence[tuple[Point, float]]]) -> None:
    """Loss against bytes per MLP weight, a line per codec: below and to the left is the better buy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False)
    for axis, (model, drawn) in zip(axes[0], panels.items(), strict=True):
        for title in dict.fromkeys(point.title for point, _ in drawn):
            line = sorted((point.bytes, loss) for point, loss in drawn if point.title == title)
            axis.plot(*zip(*line, strict=True), "o-", markersize=4, label=title)
        axis.set_title(model, fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_xticks([0.25, 0.5, 1, 2], ["1/4", "1/2", "1", "2"])
        axis.set_xlabel("bytes per MLP weight", fontsize=8)
        axis.set_ylabel("loss over dense, nats", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, frameon=False)
    picture.tight_layout()
    picture.savefig(PLOT, dpi=130)
    pyplot.close(picture)
