"""How wrong is a result, where, and what did the kernel multiply instead?

The error metric of the GPU tests and its bounds stand here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-2}
"""Relative Frobenius error by output dtype. Rounding to bf16 alone gives 2e-3; the rest is room for the FP8
tensor cores, which keep some 14 bits of their sums."""

ELEMENT = 0.06
"""No element may be off by more than this share of the root mean square of its token, beyond rounding: one
wrong element among a million, or a token of small scale, does not show in the norm."""


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """``‖y - expected‖ / ‖expected‖``; NaN if y holds one."""
    expected = expected.double()
    return ((y.double() - expected).norm() / expected.norm()).item()


def bad_elements(y: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Mask of elements that rounding and reduced accumulation cannot explain (NaN is one)."""
    expected = expected.double()
    allowed = expected.abs() * 2.0**-7 + ELEMENT * expected.square().mean(1, keepdim=True).sqrt()
    return ~((y.double() - expected).abs() <= allowed)


def wrong(y: torch.Tensor, expected: torch.Tensor) -> str | None:
    """None if ``y`` is right, else what is wrong in a few lines."""
    error, bad = relative_error(y, expected), bad_elements(y, expected)
    if error <= BOUNDS[y.dtype] and not bad.any():
        return None
    return f"relative error {error:.3e} (bound {BOUNDS[y.dtype]:g}), {describe(y, expected, bad)}"


def describe(y: torch.Tensor, expected: torch.Tensor, bad: torch.Tensor) -> str:
    """Where the bad elements of ``y [tokens, rows]`` lie: slabs of 64 rows are warpgroups of the kernel."""
    slabs = [slab.double().mean().item() for slab in bad.T.split(64)]
    tokens = bad.double().mean(1).tolist()
    lines = [
        f"{int(bad.sum())} of {bad.numel()} elements bad, {int(y.isnan().sum())} NaN (never written?)",
        f"  bad share per slab of 64 rows: {_shares(slabs)}",
        f"  bad share per token: {_shares(tokens)}",
    ]
    worst = int(torch.tensor(slabs).argmax()) * 64
    for token in sorted({0, int(torch.tensor(tokens).argmax())}):
        rows = slice(worst, worst + 6)
        got, want = ([round(v, 4) for v in t[token, rows].tolist()] for t in (y.float(), expected.float()))
        lines.append(f"  token {token}, rows {worst}…: got {got}, want {want}")
    ratio = (y.double() * expected).sum() / expected.double().square().sum()
    lines.append(f"  best factor on the expected result: {ratio.item():.4f} (1 is right, 0 is unrelated)")
    return "\n".join(lines)


def _shares(values: Sequence[float], limit: int = 24) -> str:
    """``0: 1.00, 3: 0.25``: the non-zero ones, by index."""
    hit = [(i, v) for i, v in enumerate(values) if v]
    text = ", ".join(f"{i}: {v:.2f}" for i, v in hit[:limit])
    return f"{text or 'none'}{', …' if len(hit) > limit else ''} (of {len(values)})"


def probe_columns(
    call: Callable[[torch.Tensor], torch.Tensor],
    weight: torch.Tensor,
    columns: Sequence[int],
    tokens: int,
    boundary: int | None = None,
) -> str:
    """Multiply one-hot tokens to read back the matrix that the kernel really uses.

    ``call``: e4m3 ``[tokens, K]`` to ``[tokens, N]`` with all scales 1, so that every output is one weight,
    exact in bf16. ``weight [N, K]``: the right ones. Says for wrong columns which rows are off and
    which column of ``weight`` is there instead; ``boundary``: where 2:4 columns end.
    """
    n, k = weight.shape
    right = weight.float()
    found = torch.empty(n, len(columns), device=weight.device)
    for start in range(0, len(columns), tokens):
        part = torch.tensor(columns[start : start + tokens], device=weight.device)
        x = torch.zeros(tokens, k, device=weight.device)
        x[torch.arange(len(part), device=weight.device), part] = 1
        found[:, start : start + len(part)] = call(x.to(torch.float8_e4m3fn))[: len(part)].float().T
    off = found != right[:, list(columns)]
    bad = [i for i in range(len(columns)) if off[:, i].any()]
    if not bad:
        return f"one-hot probe of {len(columns)} columns: all right (so the sum over many columns is wrong)"
    lines = [f"one-hot probe: {len(bad)} of {len(columns)} columns wrong"]
    for i in bad[:12]:
        rows = off[:, i].nonzero().flatten()
        same = (right[rows] == found[rows, i, None]).double().mean(0)
        near = int(same.argmax())
        zeros = (found[rows, i] == 0).double().mean().item()
        side = "" if boundary is None else " (2:4)" if columns[i] < boundary else " (dense)"
        lines.append(
            f"  k={columns[i]}{side}: {len(rows)} of {n} rows, {_ranges(rows.tolist())}; "
            f"{zeros:.0%} of them zero; most like k={near} ({same[near]:.0%} equal)"
        )
    lines.append(f"  wrong columns: {_ranges([columns[i] for i in bad])}")
    return "\n".join(lines)


def _ranges(values: Sequence[int], limit: int = 10) -> str:
    """``0-63, 70``: runs of consecutive numbers."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    text = ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in runs[:limit])
    return text + (", …" if len(runs) > limit else "")
