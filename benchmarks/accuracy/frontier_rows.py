"""Rows of the quality benchmark (``frontier.py``): one pruning method, or one change to one, each."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.accuracy.formats_report import Point
from benchmarks.accuracy.smollm2 import report
from vllm_spense.pruning import PruneConfig, prune
from vllm_spense.recovery import RecoveryConfig, recover


@dataclass(frozen=True)
class Row:
    """One line of the table. ``options`` go to PruneConfig over those of ``base``; None: the dense model.
    ``recovery``: options of a training run behind pruning; None: no such run."""

    key: str
    label: str
    options: dict[str, Any] | None
    base: Row | None = field(default=None, repr=False)
    recovery: dict[str, Any] | None = None

    def settings(self) -> dict[str, Any] | None:
        """What decides the pruned model besides the seed; figures made with other settings are stale."""
        if self.options is None:
            return None
        settings = self.config(0, Path("any")).decisive()
        if self.recovery is not None:
            settings["recovery"] = RecoveryConfig(calibration="any", **self.recovery).decisive()
        return {name: value for name, value in settings.items() if name != "seed"}

    def _options(self) -> dict[str, Any]:
        """Own ones over those of the base; a row without a base is pruned for bf16 weights."""
        inherited = {"weight_dtype": "bf16"} if self.base is None else self.base._options()
        return inherited | (self.options or {})

    def config(self, seed: int, calibration: Path) -> PruneConfig:
        config = PruneConfig(seed=seed, calibration=str(calibration), restart=True, **self._options())
        return config if config.needs_calibration else config.model_copy(update={"calibration": None})

    def make(self, seed: int, dense: Path, calibration: Path, out: Path) -> float:
        """Write the row's model to ``out``; processor seconds that took (other work does not count)."""
        started = time.process_time()
        prune(dense, out, self.config(seed, calibration), report)
        if self.recovery is not None:
            pruned = out.with_name(f"{out.name}-pruned")
            shutil.rmtree(pruned, ignore_errors=True)
            out.rename(pruned)
            config = RecoveryConfig(calibration=str(calibration), **self.recovery)
            try:
                recover(pruned, out, config, dense)
            finally:
                shutil.rmtree(pruned)
        return time.process_time() - started

    @property
    def seeded(self) -> bool:
        """Whether the seed changes anything: not without calibration."""
        return self.options is not None and self.config(0, Path("any")).needs_calibration


SPENSEGPT = {"method": "obs", "selection": "spensegpt"}
SPENSEGPT_PLUS = {"method": "obs", "selection": "spensegpt+"}

GUIDED = {"preset": "guided"}
FP8 = {"weight_dtype": "fp8"}
TIME = {"allocation": "time"}

ROWS = [
    Row("dense", "dense", None),
    Row("magnitude", "magnitude, strict 2:4", SPENSEGPT | {"method": "magnitude", "dense_ratio": 0}),
    Row("wanda", "Wanda, strict 2:4", SPENSEGPT_PLUS | {"method": "wanda", "dense_ratio": 0}),
    Row("sparsegpt", "SparseGPT, strict 2:4", SPENSEGPT_PLUS | {"dense_ratio": 0}),
    Row("spensegpt0.25", "SpenseGPT, dense ratio 0.25", SPENSEGPT | {"dense_ratio": 0.25}),
    Row("spensegpt+0.25", "SpenseGPT+, dense ratio 0.25", SPENSEGPT_PLUS | {"dense_ratio": 0.25}),
    Row("guided0.25", "guided (ours), dense ratio 0.25", GUIDED | {"dense_ratio": 0.25}),
    Row("spensegpt0.5", "SpenseGPT, dense ratio 0.5", SPENSEGPT | {"dense_ratio": 0.5}),
    Row("spensegpt+0.5", "SpenseGPT+, dense ratio 0.5", SPENSEGPT_PLUS | {"dense_ratio": 0.5}),
    Row("guided0.5", "guided (ours), dense ratio 0.5", GUIDED | {"dense_ratio": 0.5}),
]

SCORES = {"selection": "fisher", "regroup": 16}
"""Indices ranked by the gradient pass alone."""
FISHER = SCORES | {"pilot_samples": 0}
"""Layers compared by it, too: `guided` as it was until a second model was measured."""
FEW = {"pilot_samples": 4}
"""Measured when the pilot read 256 tokens of a window; it reads 128 now."""
BEFORE = [
    *(
        Row(
            f"guided{ratio}-fisher",
            f"… with Fisher's scores and budget, dense ratio {ratio}",
            GUIDED | FISHER | {"dense_ratio": ratio},
        )
        for ratio in (0.25, 0.5)
    ),
    Row(
        "guided0.5-scores",
        "… with Fisher's scores, budget by 4 windows of 256 tokens, dense ratio 0.5",
        GUIDED | SCORES | FEW | {"dense_ratio": 0.5},
    ),
    *(
        Row(
            f"guided{ratio}-few",
            f"… with the budget by 4 windows of 256 tokens, dense ratio {ratio}",
            GUIDED | FEW | {"dense_ratio": ratio},
        )
        for ratio in (0.25, 0.5)
    ),
]

BASE = Row(
    "base",
    "base: Fisher's budget, without (a) and (b), 8 windows in the gradient pass, joint fit to all tokens",
    GUIDED | FISHER | {"regroup": 0, "order": "natural", "gradient_samples": 8},
)
ABLATIONS = [
    Row("a-regroup", "(a) down's columns dealt to better groups, 16 rounds", {"regroup": 16}, BASE),
    Row("b-order", "(b) OBS visits the groups with the largest inputs first", {"order": "energy"}, BASE),
    Row("d-no-joint", "(d) without the joint fit of gate and up", {"joint": 0}, BASE),
    Row("d-refit", "(d) … and without better pairs", {"joint": 0, "refine": 0}, BASE),
    Row("d-obs", "(d) … and without least squares: OBS alone", {"joint": 0, "refine": 0, "refit": 0}, BASE),
    Row("e-scores", "(e) SpenseGPT+'s index scores", {"selection": "spensegpt+"}, BASE),
    Row("e-gradient32", "(e) 32 windows in the gradient pass", {"gradient_samples": 32}, BASE),
    Row("f-uniform", "(f) the same dense ratio in every layer", {"allocation": "uniform"}, BASE),
    Row("f-time", "(f) budget of decode time (such small layers gain none: all dense)", TIME, BASE),
    Row("g-fp8", "(g) FP8 weights, rounded to nearest", FP8, BASE),
    Row("h-distill", "(h) recovered: 100 windows, distilled", {}, BASE, {}),
    Row("h-both", "(h) … distilled and trained on their tokens", {}, BASE, {"objective": "both"}),
    Row("i-attention", "(i) attention pruned, too", {"targets": "mlp+attention"}, BASE),
    Row("samples-32", "32 calibration windows", {"num_samples": 32}, BASE),
]
"""One option of ``BASE`` changed at a time; measured on the validation split with ``--ablations``."""
TUNING = [ROWS[-1], BEFORE[1], BASE, *ABLATIONS]

ATTENTION = {"targets": "mlp+attention", "attention_dense_ratio": 0.5}
README_ROWS = {
    "smollm2": ("dense", "sparsegpt", "spensegpt+0.5", "guided0.5"),
    "gemma-3-270m": ("dense", "spensegpt+0.5", "guided0.5"),
}

TRIES = [
    ROWS[-1],
    Row("t-fisher", "Fisher's ranks", {"selection": "fisher"}, ROWS[-1]),
    Row("t-uniform", "the same dense ratio in every layer", {"allocation": "uniform"}, ROWS[-1]),
    Row("t-no-joint", "without the joint fit", {"joint": 0}, ROWS[-1]),
    Row("t-samples128", "128 calibration windows", {"num_samples": 128}, ROWS[-1]),
    Row("t-samples256", "256 calibration windows", {"num_samples": 256}, ROWS[-1]),
    Row("t-seq2048", "16 calibration windows of 2048 tokens", {"num_samples": 16, "seq_len": 2048}, ROWS[-1]),
    Row(
        "t-attention",
        "attention pruned, too, and more of the MLPs dense",
        ATTENTION | {"dense_ratio": 0.6},
        ROWS[-1],
    ),
    Row("t-recovered", "recovered: 100 windows, distilled", {}, ROWS[-1], {}),
    Row("t-recovered-3e-5", "… with a learning rate of 3e-5", {}, ROWS[-1], {"learning_rate": 3e-5}),
    Row("t-recovered-1e-5", "… with a learning rate of 1e-5", {}, ROWS[-1], {"learning_rate": 1e-5}),
    Row("t-both", "… distilled and trained on their tokens", {}, ROWS[-1], {"objective": "both"}),
    Row(
        "t-control",
        "control: the dense model trained the same way",
        {"dense_ratio": 1.0},
        ROWS[-1],
        {"objective": "both"},
    ),
]
"""One option of the default changed at a time; on both models, validation split, with ``--tries``."""

FORMATS = [
    *(
        Row(
            f"format-{codec}-{ratio}",
            f"{title}, {'dense' if ratio == 1 else '2:4' if not ratio else f'dense ratio {ratio}'}",
            GUIDED | dtypes | {"dense_ratio": ratio},
        )
        for codec, title, dtypes, ratios in (
            ("bf16", "bf16", {}, (0.0,)),  # the others are rows of the main table
            ("fp8", "FP8", {"weight_dtype": "fp8"}, (1.0, 0.5, 0.25, 0.0)),
            ("int8", "INT8", {"weight_dtype": "int8"}, (1.0, 0.5, 0.25, 0.0)),
            ("nf4", "NF4", {"weight_dtype": "nf4"}, (1.0, 0.5, 0.25, 0.0)),
            ("nf4+fp8", "2:4 in NF4, rest FP8", {"sparse_dtype": "nf4", "dense_dtype": "fp8"}, (0.5, 0.25)),
        )
        for ratio in ratios
    ),
]
"""How values are stored against how many are: `guided` in every codec at every size, with ``--formats``."""
POINTS = [
    Point("dense", "bf16", 1.0),
    *(Point(f"guided{ratio}", "bf16", ratio) for ratio in (0.5, 0.25)),
    *(Point(row.key, row.key.split("-")[1], float(row.key.split("-")[2])) for row in FORMATS),
]

WITHOUT_BOS = {"bos": "never"}
"""Windows as they were before they started with BOS; evaluated with BOS all the same."""

GEMMA_ROWS = [
    *(row for row in ROWS if row.key == "dense" or row.key.startswith(("spensegpt+", "guided"))),
    *BEFORE,
    Row(
        "spensegpt+0.5-no-bos",
        "SpenseGPT+, calibrated without BOS",
        SPENSEGPT_PLUS | WITHOUT_BOS | {"dense_ratio": 0.5},
    ),
    Row("guided0.5-no-bos", "guided, calibrated without BOS", GUIDED | WITHOUT_BOS | {"dense_ratio": 0.5}),
]
