"""Which layers of a checkpoint are kept dense, and what each lost: ``spense inspect --plot``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_spense.format.files import writing
from vllm_spense.format.report import CheckpointReport, ModuleReport, sparsity

_DRAWN = b"Matplotlib"
"""It signs its pictures."""

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class LayerSeries:
    """What is drawn, by decoder layer: dense shares of MLPs and of attention, losses by linear."""

    mlp: dict[int, float] = field(default_factory=dict)
    attention: dict[int, float] = field(default_factory=dict)
    losses: dict[str, dict[int, float]] = field(default_factory=dict)


def layer_series(report: CheckpointReport) -> LayerSeries:
    """A report's numbers by decoder layer; attention only where it has a 2:4 region anywhere."""
    series = LayerSeries()
    groups: dict[tuple[bool, int], list[ModuleReport]] = {}
    pruned_attention = any(module.attention for module in report.hybrid)
    for module in report.modules:
        found = re.search(r"\.(\d+)\.(.+)$", module.name)
        if found is None:
            continue
        layer, linear = int(found[1]), found[2]
        groups.setdefault((module.attention, layer), []).append(module)
        if module.loss is not None:
            series.losses.setdefault(linear, {})[layer] = module.loss
    for (attention, layer), modules in groups.items():
        if not attention:
            series.mlp[layer] = 1 - 2 * sparsity(modules)
        elif pruned_attention:
            series.attention[layer] = 1 - 2 * sparsity(modules)
    return series


def new_figure(width: float, height: float) -> Figure:
    """An empty picture, in inches; ``ImportError`` with the fix when matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "the plot needs matplotlib. Fix: pip install matplotlib (or 'vllm-spense[bench]')"
        ) from None
    return Figure(figsize=(width, height))


def save_figure(figure: Figure, out: Path) -> None:
    """Write a picture as a PNG file that is whole or not there.

    Raises ``ValueError`` for another kind of file, ``FileExistsError`` when what is there is not a picture of
    ours, and ``OSError``.
    """
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: pictures are written as PNG files; choose a name that ends with .png")
    place = out.resolve()
    if place.exists() and not _is_ours(place):
        raise FileExistsError(f"{out} is there and was not drawn by this command; choose another name")
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f".{place.name}.partial")
        figure.savefig(partial, dpi=130, format="png")
        partial.replace(place)


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return _DRAWN in stream.read(1024)


def plot_layers(report: CheckpointReport, out: Path) -> None:
    """Draw dense ratios above, losses below (relative output error on calibration text), as ``out``.

    Raises like :func:`new_figure` and :func:`save_figure`.
    """
    figure = new_figure(7, 4.2)
    series = layer_series(report)
    above, below = figure.subplots(2, 1, sharex=True)
    shares = list(series.mlp.values())
    above.bar(list(series.mlp), [100 * share for share in shares], color="tab:blue", width=0.8)
    if shares:
        mean = 100 * sum(shares) / len(shares)
        above.axhline(mean, color="black", linewidth=0.8, linestyle="--", label=f"mean of MLPs {mean:.1f} %")
    if series.attention:
        attention = [100 * share for share in series.attention.values()]
        above.plot(list(series.attention), attention, "_", color="tab:orange", label="attention")
    above.set_ylabel("dense weights, %", fontsize=8)
    for linear, losses in series.losses.items():
        below.plot(list(losses), list(losses.values()), marker="o", markersize=3, linewidth=1, label=linear)
    if not series.losses:
        below.text(0.5, 0.5, "the checkpoint records no losses", ha="center", transform=below.transAxes)
    below.set_ylabel("relative output error", fontsize=8)
    below.set_xlabel("layer", fontsize=8)
    below.xaxis.get_major_locator().set_params(integer=True)
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    save_figure(figure, out)
