"""Write the predicted tables and plots of docs/performance.md: `python -m benchmarks.serving.prediction`.

Needs no GPU. Where a tuning table lies on this machine (``spense tune``), its times go in.
"""

from __future__ import annotations

from benchmarks.common.markdown import fill, table
from benchmarks.common.results import RESULTS, ROOT, read
from benchmarks.serving.prediction_plots import write_growth, write_roofline
from vllm_spense.cli.plan import plot_plan
from vllm_spense.planning import GPUS, plan
from vllm_spense.planning.gain import Prediction

DOCUMENT, IMAGES = ROOT / "docs" / "performance.md", ROOT / "docs" / "img"
MODELS = ("Qwen3-32B", "Seed-OSS-36B", "Llama-3.1-8B")
RATIOS = (0.5, 0.25)
POINTS = ((1, 512), (32, 512), (32, 4096), (8, 32768))
"""Batch and context."""


def tables() -> dict[str, str]:
    """Markdown by the name of its markers."""
    return {"models": _models(), "gpus": _gpus(), "formats": _formats(), "batches": _batches()}


def filled(text: str) -> str:
    """A document with its tables made anew."""
    for name, found in tables().items():
        text = fill(text, name, found)
    return text


def _models() -> str:
    points = [f"batch {batch}, context {context}" for batch, context in POINTS]
    head = ["model", "dense ratio", *points, "prefill 8192", "weights GB", "KV tokens gained"]
    rows = []
    for model in MODELS:
        for ratio in RATIOS:
            found = [plan(model, dense_ratio=ratio, batch=b, context=c, batches=()) for b, c in POINTS]
            speeds = [f"{f.decode.speedup:.2f}×" for f in found]
            m = found[0].memory
            gained = f"{m.spense_kv_tokens - m.dense_kv_tokens:,} of {m.dense_kv_tokens:,}"
            weights = f"{m.dense_bytes / 1e9:.1f} → {m.spense_bytes / 1e9:.1f}"
            rows.append([model, f"{ratio:g}", *speeds, f"{found[0].prefill.speedup:.2f}×", weights, gained])
    return table(head, rows)


def _gpus() -> str:
    head = ["GPUs", "dense ratio", "batch 1, context 512", "batch 32, context 512", "prefill 8192"]
    rows = []
    for gpu, size in [(name, 1) for name in GPUS] + [("H200", 2), ("H200", 4)]:
        for ratio in RATIOS:
            one, many = (
                plan(
                    *("Qwen3-32B", gpu),
                    dense_ratio=ratio,
                    tensor_parallel=size,
                    batch=batch,
                    context=512,
                    batches=(),
                )
                for batch in (1, 32)
            )
            speeds = (one.decode.speedup, many.decode.speedup, one.prefill.speedup)
            rows.append([f"{size} × {gpu}", f"{ratio:g}", *(f"{speed:.2f}×" for speed in speeds)])
    return table(head, rows)


def _formats() -> str:
    """Each row of the plan at dense ratio 0.5, Spense at 0.25 behind it; speed-ups over dense FP8."""
    points = POINTS[::2]
    head = ["GPU", "format", *(f"batch {b}, context {c}" for b, c in points), "prefill 8192", "weights GB"]
    rows = []
    for gpu in ("H200", "B200"):
        half, quarter = (
            [plan(MODELS[0], gpu, dense_ratio=r, batch=b, context=c, batches=()) for b, c in points]
            for r in RATIOS
        )
        for i, first in enumerate(half[0].alternatives):
            if first.name.startswith("Spense"):
                shown = [
                    (f"{first.name}, dense ratio {r:g}", p)
                    for r, p in zip(RATIOS, (half, quarter), strict=True)
                ]
            else:
                shown = [(first.name, half)]
            for name, plans in shown:
                found = [p.alternatives[i] for p in plans]
                speeds = [*(f.decode_speedup for f in found), found[0].prefill_speedup]
                cells = [f"{s:.2f}×" for s in speeds]
                rows.append([gpu, name, *cells, f"{found[0].weight_bytes / 1e9:.1f}"])
    return table(head, rows)


def _batches() -> str:
    head = ["batch", "dense ms", "Spense ms", "speed-up", "MLP weights", "KV cache", "other"]
    rows = []
    for batch, p in _shown().batches.items():
        kv = p.dense.attention / p.dense.total
        times = [f"{p.dense.total * 1e3:.2f}", f"{p.spense.total * 1e3:.2f}", f"{p.speedup:.2f}×"]
        shares = [f"{share:.0%}" for share in (p.mlp_share, kv, 1 - p.mlp_share - kv)]
        rows.append([str(batch), *times, *shares])
    return table(head, rows)


def _shown() -> Prediction:
    return plan("Qwen3-32B", context=2048)


if __name__ == "__main__":
    DOCUMENT.write_text(filled(DOCUMENT.read_text()))
    plot_plan(_shown(), IMAGES / "plan_qwen3_32b_h200.png")
    write_growth(IMAGES / "plan_growth.png")
    write_roofline(IMAGES / "plan_roofline.png", read(RESULTS / "kernels.json").get("rows", []))
    print(f"wrote {DOCUMENT} and its plots")
