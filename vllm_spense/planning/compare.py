"""How far predictions are from what a serving benchmark measured end to end."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_spense.devices import GPUS
from vllm_spense.format.errors import CheckpointError
from vllm_spense.planning.gain import plan
from vllm_spense.planning.shapes import ModelShape, read_model

_Count = Annotated[int, Field(strict=True, ge=1)]
_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MeasuredRow(_Strict):
    """Tokens per second of both models. ``batch`` sequences behind ``context`` tokens (decode), or one prompt
    of ``context`` tokens in one step (prefill; more prompts take turns)."""

    phase: Literal["decode", "prefill"]
    batch: _Count = 1
    context: _Count
    dense_tokens_per_s: _Rate
    spense_tokens_per_s: _Rate


class MeasuredRun(_Strict):
    """The file that :func:`compare` reads. ``gpu`` is one of ``devices.GPUS``; the rest says what ran."""

    gpu: str
    tensor_parallel: _Count = 1
    kv_dtype: Literal["bf16", "fp8"] = "bf16"
    date: str
    command: str
    rows: Annotated[tuple[MeasuredRow, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Comparison:
    """One row: the speed-ups, and the relative errors of prediction over measurement (0.1: 10 % too high)."""

    row: MeasuredRow
    predicted_speedup: float
    measured_speedup: float
    dense_error: float
    spense_error: float

    @property
    def error(self) -> float:
        """Relative error of the predicted speed-up."""
        return self.predicted_speedup / self.measured_speedup - 1


def read_run(path: str | Path, model: ModelShape) -> MeasuredRun:
    """A :class:`MeasuredRun`, or what benchmarks/serving/decode.py wrote about ``model`` at its dense ratio.

    :class:`CheckpointError` names the file and the first wrong key.
    """
    content = Path(path).read_bytes()
    try:
        raw = json.loads(content)
    except ValueError:
        raw = None  # pydantic says where
    if isinstance(raw, dict) and "pairs" in raw:
        return _benchmark_run(raw, path, model)
    try:
        return MeasuredRun.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        reason = ": ".join([".".join(map(str, first["loc"])), first["msg"]]).removeprefix(": ")
    raise CheckpointError(
        f"no measured run ({reason})", file=path, fix="docs/performance.md shows what such a file holds"
    )


def _benchmark_run(raw: dict[str, Any], path: str | Path, model: ModelShape) -> MeasuredRun:
    """Points are ``BATCHxINPUT+OUTPUT``: one token out is prefill; of more, half are context on average."""
    name = f"{model.name}/{model.mlp_dense_ratio():g}"
    try:
        made, points = raw["pairs"][name]["made"], raw["pairs"][name]["points"]
        rows = []
        for key, point in points.items():
            batch, tokens, output = map(int, re.split(r"[x+]", key))
            rows.append(
                MeasuredRow(
                    phase="decode" if output > 1 else "prefill",
                    batch=batch,
                    context=tokens + output // 2 if output > 1 else tokens,
                    dense_tokens_per_s=point["dense_tokens_per_second"],
                    spense_tokens_per_s=point["spense_tokens_per_second"],
                )
            )
        gpu = next(gpu.name for gpu in GPUS.values() if gpu.device == made["device"])
        return MeasuredRun(
            gpu=gpu, date=str(made.get("date")), command=str(made.get("command")), rows=tuple(rows)
        )
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise CheckpointError(
            f"no measured run of {name} on one of {', '.join(GPUS)} ({type(error).__name__}: {error})",
            file=path,
            fix="measure this model and dense ratio with benchmarks/serving/decode.py, or name another",
        ) from None


def compare(model: str | Path | ModelShape, run: MeasuredRun | str | Path) -> list[Comparison]:
    """Predict every row of ``run`` and set it beside what was measured."""
    model = model if isinstance(model, ModelShape) else read_model(model)
    found = run if isinstance(run, MeasuredRun) else read_run(run, model)
    compared = []
    for row in found.rows:
        prediction = plan(
            model,
            found.gpu,
            batch=row.batch,
            context=row.context,
            prefill_tokens=row.context,
            kv_dtype=found.kv_dtype,
            tensor_parallel=found.tensor_parallel,
            batches=(),
        )
        phase = prediction.decode if row.phase == "decode" else prediction.prefill
        compared.append(
            Comparison(
                row=row,
                predicted_speedup=phase.speedup,
                measured_speedup=row.spense_tokens_per_s / row.dense_tokens_per_s,
                dense_error=phase.dense_tokens_per_s / row.dense_tokens_per_s - 1,
                spense_error=phase.spense_tokens_per_s / row.spense_tokens_per_s - 1,
            )
        )
    return compared


def mean_error(compared: Sequence[Comparison]) -> float:
    """Geometric mean over the rows of how far the speed-up is off, in either direction (0.05: by 5 %)."""
    return math.exp(sum(abs(math.log1p(c.error)) for c in compared) / len(compared)) - 1
