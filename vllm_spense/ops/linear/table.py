"""Which kernel configuration runs a layer: a measured table per device, else the estimate.

``spense tune`` writes tables to the directory that ``SPENSE_TUNING_DIR`` names (default
``~/.cache/vllm_spense``); tables in ``vllm_spense/ops/tables`` come with the package. A measured layer for
which dense FP8 is faster over its table as a whole is not run by our kernels at all.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_spense.ops import cuda_device, extension
from vllm_spense.ops.linear.configs import KernelConfig, candidates, estimate, illegal
from vllm_spense.ops.linear.spec import LinearSpec

MAX_BUCKET = 32768
PACKAGED = Path(__file__).parents[1] / "tables"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TuningEntry(_Strict):
    """The fastest configuration of one layer shape for one bucket of tokens, in µs per call."""

    split: Literal["output", "input"]
    out_features: int
    in_features: int
    sparse_sizes: tuple[int, ...]
    dense_sizes: tuple[int, ...]
    tokens: int
    kernel: Literal["sm90", "cutlass"]
    tile_rows: int
    tile_tokens: int
    cluster: int
    multicast: bool
    us: float
    dense_us: float | None = None
    codec: str = "fp8"
    """Name of the layer's codec; older tables do not say and hold FP8 alone."""

    @property
    def config(self) -> KernelConfig:
        return KernelConfig(self.kernel, self.tile_rows, self.tile_tokens, self.cluster, self.multicast)

    @property
    def shape(self) -> tuple:
        """What :func:`shape_of` gives for the layer's spec."""
        extents = (self.out_features, self.in_features, self.sparse_sizes, self.dense_sizes)
        return (self.split, *extents, self.codec)


class TuningTable(_Strict):
    """All that was measured on one kind of device."""

    device: str
    torch: str
    date: str
    command: str
    entries: tuple[TuningEntry, ...] = ()


def shape_of(spec: LinearSpec) -> tuple:
    """The part of a spec that decides speed; two layers with the same share an entry."""
    extents = (spec.out_features, spec.in_features, spec.sparse_sizes, spec.dense_sizes)
    return (spec.split, *extents, spec.codecs.name)


def bucket(tokens: int) -> int:
    """Tokens rounded up to a power of two; larger calls share the last bucket."""
    return min(1 << max(0, tokens - 1).bit_length(), MAX_BUCKET)


def table_path(device_name: str, directory: Path | None = None) -> Path:
    """Where the table of a device lies; the user's directory unless one is given."""
    home = os.environ.get("SPENSE_TUNING_DIR") or Path.home() / ".cache" / "vllm_spense"
    return Path(directory or home) / f"{re.sub(r'[^A-Za-z0-9]+', '_', device_name)}.json"


def read_table(path: Path) -> TuningTable | None:
    """None if the file is not there; ``ValueError`` naming it if it is not a table."""
    if not path.is_file():
        return None
    try:
        return TuningTable.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        reason = ": ".join([*map(str, first["loc"]), first["msg"]])
    except UnicodeDecodeError:
        reason = "not UTF-8"
    raise ValueError(
        f"{path} is not a tuning table ({reason}); delete it, or make it anew with `spense tune`"
    )


@functools.cache
def measured(device_name: str) -> dict[tuple, dict[int, TuningEntry]]:
    """Entries by layer shape and bucket; the user's table goes before the packaged one."""
    found: dict[tuple, dict[int, TuningEntry]] = {}
    for path in (table_path(device_name, PACKAGED), table_path(device_name)):
        table = read_table(path)
        for entry in table.entries if table else ():
            found.setdefault(entry.shape, {})[entry.tokens] = entry
    return found


def dense_ratio(entries: dict[int, TuningEntry]) -> float | None:
    """Geometric mean over the buckets of our time by that of dense FP8; None if dense was not measured."""
    ratios = [math.log(e.us / e.dense_us) for e in entries.values() if e.dense_us]
    return math.exp(sum(ratios) / len(ratios)) if ratios else None


def pick(
    spec: LinearSpec,
    tokens: int,
    capability: tuple[int, int],
    processors: int,
    entries: dict[int, TuningEntry],
    cutlass: bool,
    clusters: Callable[[KernelConfig], int | None] = lambda config: None,
) -> KernelConfig | None:
    """The measured configuration of the bucket, else the legal one with the lowest estimate, else None.

    ``clusters``: how many of a configuration's clusters the device runs at once; None where it was not asked.
    """
    entry = entries.get(bucket(tokens))
    if (
        entry
        and illegal(spec, tokens, entry.config, capability) is None
        and (cutlass or entry.kernel == "sm90")
    ):
        return entry.config
    fitting = {c: clusters(c) for c in candidates(spec, bucket(tokens), capability, cutlass)}
    legal = [c for c, count in fitting.items() if count != 0]
    return min(legal, key=lambda c: (estimate(spec, tokens, c, processors, fitting[c]), c), default=None)


@functools.lru_cache(maxsize=4096)
def _choose(spec: LinearSpec, tokens: int, index: int) -> KernelConfig:
    properties = torch.cuda.get_device_properties(index)
    entries = measured(properties.name).get(shape_of(spec), {})
    capability = (properties.major, properties.minor)
    config = pick(
        spec,
        tokens,
        capability,
        properties.multi_processor_count,
        entries,
        cutlass=capability in extension.cutlass_capabilities(),
        clusters=lambda config: cuda_device.clusters(config, index),
    )
    if config is None:
        raise RuntimeError(f"no compiled kernel runs {spec} on compute capability {capability}")
    return config


def choose(spec: LinearSpec, tokens: int, device: torch.device) -> KernelConfig:
    """The configuration for ``tokens`` rows of x on this CUDA device."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _choose(spec, bucket(tokens), index)


def usable(spec: LinearSpec, device: torch.device) -> str | None:
    """None when our kernels should run this layer on this CUDA device, else why not, in one line."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    if not candidates(spec, 1, capability, capability in extension.cutlass_capabilities()):
        return f"no kernel is compiled for compute capability {capability[0]}.{capability[1]}"
    if reason := cuda_device.why_not(index):
        return reason
    ratio = dense_ratio(measured(properties.name).get(shape_of(spec), {}))
    if ratio is not None and ratio > 1:
        return f"dense FP8 was measured faster for this shape: our time is {ratio:.2f} of its"
    if ratio is None and capability[0] == 10:
        return "separate GEMMs are predicted to be no faster than dense FP8 here; `spense tune` measures it"
    return None
