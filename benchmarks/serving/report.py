"""Tables and plot of the serving benchmark in docs/performance.md: `python -m benchmarks.serving.report`.

Made from benchmarks/results/gpu/serving_decode.json alone: tokens per second, memory and start-up, and where
the time of a step goes. Without results the document says that there are none.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.common.markdown import fill, table
from benchmarks.common.results import RESULTS, ROOT, read
from benchmarks.serving.engine import Kernels, Point
from benchmarks.serving.models import DENSE
from benchmarks.serving.profile import CATEGORIES, GAPS, OTHER, breakdown, largest, steps
from vllm_spense.cli.plot import new_figure

Pairs = dict[str, dict[str, Any]]
COLOURS = ("#c8553d", "#33658a", "#f6ae2d", "#7a9e7e", "#9d79bc", "#3a3a3a", "#b5a898", "#dddddd")
NOTEWORTHY = 0.02
"""Share of a step from which on kernels of no known kind are named."""


class Step(NamedTuple):
    """One profiled step of one engine: its duration without profiler, and the time by category."""

    model: str
    ratio: str
    point: Point
    spense: bool
    seconds: float
    parts: dict[str, float]
    kernels: Kernels

    @property
    def length(self) -> float:
        """ms of the bar: that of the step, or of its kernels if they overlap."""
        return max(self.seconds * 1e3, sum(self.parts.values()) / 1e3)

    @property
    def engine(self) -> str:
        return "Spense" if self.spense else "dense"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "serving_decode.json")
    report(parser.parse_args().results)


def report(results: Path, root: Path = ROOT) -> None:
    """Fill docs/performance.md, and draw docs/img/serving_profile.png if there are profiles."""
    pairs: Pairs = read(results).get("pairs", {})
    found = list(profiled_steps(pairs))
    document = root / "docs" / "performance.md"
    document.write_text(filled(document.read_text(), pairs))
    print(f"{document}: {len(pairs)} pairs of engines, {len(found)} profiled steps")
    if found:
        write_plot(found, root / "docs" / "img" / "serving_profile.png")


def filled(text: str, pairs: Pairs) -> str:
    """A document with what was measured between its markers."""
    text = fill(text, "serving", "\n".join(serving_lines(pairs)))
    return fill(text, "profile", "\n".join(profile_lines(pairs)))


def serving_lines(pairs: Pairs) -> list[str]:
    """Speed, memory and start-up of every pair of engines, slower ones included."""
    if not pairs:
        return ["Nothing has been served on a GPU yet."]
    head = ["model", "dense ratio", "step", "dense tokens/s", "Spense tokens/s", "speed-up (range)"]
    speeds, sizes = [], []
    for key, entry in pairs.items():
        name, _, ratio = key.rpartition("/")
        for point, found in entry["points"].items():
            rates = [f"{found[f'{engine}_tokens_per_second']:,.0f}" for engine in ("dense", "spense")]
            low, high = found["speed_up_range"]
            speed = f"{found['speed_up']:.3f}× ({low:.3f} … {high:.3f})"
            speeds.append([name, ratio, described(Point.of(point)), *rates, speed])
        engines = [entry["engines"][DENSE], entry["engines"][ratio]]
        weights = [sum(worker["weights"] for worker in engine["memory"]) / 1e9 for engine in engines]
        starts = [engine["start_seconds"] for engine in engines]
        sizes.append([name, ratio, "{:.2f} → {:.2f}".format(*weights), "{:.0f} → {:.0f}".format(*starts)])
    return [
        f"Tokens per second, medians of turns A B A B; the range is that of the turns. {made(pairs)}",
        "",
        table(head, speeds),
        "",
        "Dense → Spense; the weights are all that the model holds, the engines start one after the other:",
        "",
        table(["model", "dense ratio", "weights, GB", "start-up, s"], sizes),
    ]


def made(pairs: Pairs) -> str:
    """Where and when."""
    origins = [entry["made"] for entry in pairs.values()]
    devices, commits, dates = (
        sorted({origin.get(what) or "unknown" for origin in origins}) for what in ("device", "commit", "date")
    )
    found = sorted({f"{k} {v}" for origin in origins for k, v in origin.get("versions", {}).items()})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} … {dates[-1]}"
    return f"{', '.join(devices)}, {when}, commit {', '.join(commits)}, {', '.join(found)}."


def described(point: Point) -> str:
    kind = "decode" if point.output > 1 else "prefill"
    return f"{kind} {point.batch} × {point.input}"


# --- where the time goes ------------------------------------------------------------------------------------


def profiled_steps(pairs: Pairs) -> Iterator[Step]:
    """Every profile that succeeded, dense before Spense."""
    for key, entry in pairs.items():
        name, _, ratio = key.rpartition("/")
        for point_key, profile in entry.get("profiles", {}).items():
            point, times = Point.of(point_key), entry["points"].get(point_key)
            if times is None or "error" in profile:
                continue
            for spense, variant in enumerate((DENSE, ratio)):
                seconds = median(times["spense_seconds" if spense else "dense_seconds"]) / steps(point)
                kernels = profile[variant]
                parts = breakdown(kernels, seconds)
                yield Step(name, ratio, point, bool(spense), seconds, parts, kernels)


def profile_lines(pairs: Pairs) -> list[str]:
    """The plot, the table in ms, and what the table does not explain."""
    found = list(profiled_steps(pairs))
    failed = [
        f"- {key}, {described(Point.of(point))}: no profile ({profile['error']})"
        for key, entry in pairs.items()
        for point, profile in entry.get("profiles", {}).items()
        if "error" in profile
    ]
    if not found:
        return ["No profile has been measured yet.", *(["", *failed] if failed else [])]
    head = ["model", "dense ratio", "step", "engine", "ms", *CATEGORIES, "kernels"]
    rows = []
    for step in found:
        times = [f"{us / 1e3:.2f}" if us else "–" for us in step.parts.values()]
        launches = sum(calls for calls, _ in step.kernels.values())
        where = [step.model, step.ratio, described(step.point), step.engine, f"{step.seconds * 1e3:.2f}"]
        rows.append([*where, *times, f"{launches:.0f}"])
    return [
        "![time of a step by kind of kernel](img/serving_profile.png)",
        "",
        f"ms of one step. {made(pairs)}",
        "",
        table(head, rows),
        "",
        *unexplained(found),
        *failed,
    ]


def unexplained(found: list[Step]) -> Iterator[str]:
    """The longest kernels of no known kind, where they matter."""
    for step in found:
        share = step.parts[OTHER] / (step.seconds * 1e6)
        if share >= NOTEWORTHY:
            names = "; ".join(f"`{n[:100]}` {us:.0f} µs" for n, us in largest(step.kernels, OTHER))
            where = f"{step.model} {step.ratio}, {described(step.point)}, {step.engine}"
            yield f"- {where}: other is {share:.0%} ({names})".replace("|", "/")


def write_plot(found: list[Step], path: Path) -> None:
    """A panel per profiled step, a bar per engine; the line marks the duration without profiler."""
    panels = list(dict.fromkeys(described(step.point) for step in found))
    pairs = list(dict.fromkeys((step.model, step.ratio) for step in found))
    figure = new_figure(2.9 * len(panels) + 1.7, 0.62 * len(pairs) + 1.6)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    labels: dict[float, str] = {}
    for axis, panel in zip(axes, panels, strict=True):
        of_panel = [step for step in found if described(step.point) == panel]
        for step in of_panel:
            y = 2.5 * pairs.index((step.model, step.ratio)) + step.spense
            labels[y] = f"{step.model} {f'Spense {step.ratio}' if step.spense else 'dense'}"
            draw_bar(axis, y, step)
        axis.set_xlim(0, 1.16 * max(step.length for step in of_panel))
        axis.set_title(panel, fontsize=8)
        axis.set_xlabel("ms per step" if panel.startswith("decode") else "ms", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(list(labels), list(labels.values()))
    axes[0].invert_yaxis()
    legend(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_bar(axis: Any, y: float, step: Step) -> None:
    start, ms = 0.0, step.seconds * 1e3
    for (name, us), colour in zip(step.parts.items(), COLOURS, strict=True):
        hatch = "////" if name == GAPS else None
        axis.barh(y, us / 1e3, left=start, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4)
        start += us / 1e3
    axis.plot([ms, ms], [y - 0.45, y + 0.45], color="black", linewidth=1)
    text = f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}"
    axis.annotate(text, (step.length, y), (3, 0), textcoords="offset points", va="center", fontsize=7)


def legend(figure: Any) -> None:
    """The categories below all panels."""
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=colour, label=name, hatch="////" if name == GAPS else None, edgecolor="white")
        for name, colour in zip(CATEGORIES, COLOURS, strict=True)
    ]
    figure.legend(handles=patches, loc="lower center", ncol=4, fontsize=7, frameon=False)
    inches = figure.get_figheight()
    figure.tight_layout(rect=(0, 0.5 / inches, 1, 1))


if __name__ == "__main__":
    main()
