"""Which layers a budget keeps dense, and what each lost: a plot of one pruned checkpoint.

usage: python benchmarks/pruning_layers.py CHECKPOINT [--out docs/img/pruning_layers.png]

Above, the share of intermediate indices that stay dense in each layer; below, the relative squared output
error of each linear on the calibration text, as the checkpoint's provenance records it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_file import ROOT
from vllm_spense.format import Checkpoint

PLOT = ROOT / "docs" / "img" / "pruning_layers.png"


def layers(checkpoint: Checkpoint) -> tuple[list[float], dict[str, list[float]]]:
    """Dense share per layer of the MLP's last linear, and by short name the losses of its linears."""
    losses: dict[str, float] = checkpoint.require_spense().provenance["losses"]
    shares, by_name = [], {}
    for name, loss in losses.items():
        short = name.rpartition(".")[2]
        by_name.setdefault(short, []).append(loss)
        if short in ("down_proj", "fc2", "c_proj"):
            layout = checkpoint.layout(name)
            shares.append(1.0 if not layout.sparse else layout.dense / layout.in_features)
    return shares, by_name


def plot(checkpoint: Checkpoint, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares, by_name = layers(checkpoint)
    picture, (above, below) = pyplot.subplots(2, 1, figsize=(7, 4.2), sharex=True)
    above.bar(range(len(shares)), [100 * share for share in shares], color="tab:blue", width=0.8)
    mean = 100 * sum(shares) / len(shares)
    above.axhline(mean, color="black", linewidth=0.8, linestyle="--", label=f"mean {mean:.1f} %")
    above.set_ylabel("dense indices, %", fontsize=8)
    above.legend(fontsize=7, frameon=False)
    for short, losses in by_name.items():
        below.plot(losses, marker="o", markersize=3, linewidth=1, label=short)
    below.set_ylabel("relative output error", fontsize=8)
    below.set_xlabel("layer", fontsize=8)
    below.legend(fontsize=7, frameon=False)
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    picture.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=PLOT)
    arguments = parser.parse_args()
    plot(Checkpoint(arguments.checkpoint), arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
