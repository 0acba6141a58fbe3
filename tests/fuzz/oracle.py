"""What may happen to a damaged checkpoint: one clear error, or exactly what a second reader finds in it.

Anything else is a :class:`ViolationError`: another exception, a message without place and fix, too much time
or memory, NaN, weights that the slow reading of the same files does not confirm, or damage that a kept
manifest should have shown.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.fuzz import serving
from tests.fuzz.edits import Case, make
from tests.fuzz.limits import LONGEST, SECONDS, OvertimeError, StopError, ViolationError, fault_of, limits
from tests.fuzz.reading import InvalidError, Linear, read
from vllm_spense.format import CheckpointError
from vllm_spense.format.manifest import MANIFEST_NAME, is_loaded_file
from vllm_spense.verification import verify

ALLOWED = ("refused", "identical", "another valid checkpoint", "found by verify only", "no change")


@dataclass
class Step:
    """How one way of using the checkpoint ended: with ``error``, or with ``result``."""

    error: BaseException | None = None
    result: Any = None


class Oracle:
    """Judges cases; ``bases`` are the undamaged checkpoints by name."""

    def __init__(self, bases: dict[str, Path], work: Path) -> None:
        self.bases = bases
        self.work = work
        self.reference = {name: _serve(path).result for name, path in bases.items()}
        for name, path in bases.items():
            _confirm(self.reference[name], path)
            verify(path)

    def judge(self, case: Case) -> str:
        """One of :data:`ALLOWED`; raises :class:`ViolationError`, or ``NotApplicableError``."""
        with tempfile.TemporaryDirectory(dir=self.work) as name:
            directory = Path(name) / "checkpoint"
            make(case, self.bases[case.base], directory)
            try:
                return self._judge(case, directory)
            except ViolationError as violation:
                text = f"{violation}\n{case.text()}".replace(name, "")
                raise type(violation)(text[:LONGEST]) from violation.__cause__

    def _judge(self, case: Case, directory: Path) -> str:
        verified = _step(lambda: verify(directory), "spense verify")
        served = _serve(directory)
        if _same_files(directory, self.bases[case.base]):
            if verified.error or served.error:
                raise ViolationError(f"nothing changed, but it is refused: {verified.error or served.error}")
            return "no change"
        if case.manifest == "kept":
            damaged = _damaged(directory, self.bases[case.base])
            if verified.error is None and damaged:
                raise ViolationError("spense verify accepts files that its manifest does not describe")
            if served.error is None and any(is_loaded_file(name) for name in damaged):
                raise ViolationError("serving accepts files that the manifest does not describe")
        if served.error is not None:
            by_engine = isinstance(served.error, serving.LeftToEngineError)
            size = "tensor parallel size 1 is not among" in str(served.error)  # legal, and not for one rank
            if verified.error is None and not by_engine and not size:
                raise ViolationError(f"spense verify accepts what serving refuses: {served.error}")
            if by_engine and verified.error is None:
                return "another valid checkpoint"
            return "refused"
        same = _equal(served.result, self.reference[case.base])
        if not same:
            if case.manifest == "kept":
                raise ViolationError("the manifest was kept, and serving loads other weights")
            _confirm(served.result, directory)
        if verified.error is not None:
            return "found by verify only"
        return "identical" if same else "another valid checkpoint"


# -- steps -------------------------------------------------------------------------------------------


def _serve(directory: Path) -> Step:
    def run() -> serving.Loaded:
        try:
            path = directory / "config.json"
            if not path.is_file() or path.stat().st_size > 1 << 24:
                raise OSError("no file that vLLM could read")
            config = json.loads(path.read_bytes())
            isinstance(config["quantization_config"]["quant_method"], str)
        except (ValueError, KeyError, TypeError, OSError, RecursionError, IndexError) as error:
            raise serving.LeftToEngineError("vLLM cannot read config.json") from error
        return serving.serve(directory, config)

    return _step(run, "serving")


def _step(action: Callable[[], Any], name: str) -> Step:
    """Run one step within its time; errors other than clear ones are violations."""
    try:
        with limits():
            return Step(result=action())
    except CheckpointError as error:
        _check_message(error, name)
        return Step(error=error)
    except serving.LeftToEngineError as error:
        return Step(error=error)
    except StopError:
        raise OvertimeError(f"{name}: more than {SECONDS:g} s") from None
    except Exception as error:
        raise ViolationError(f"{name}: {type(error).__name__}: {str(error)[:LONGEST]}") from error


def _check_message(error: CheckpointError, name: str) -> None:
    text = str(error)
    wrong = None
    if not error.fix:
        wrong = "no fix"
    elif not (error.file or error.module):
        wrong = "neither file nor module"
    wrong = wrong or fault_of(text)
    if wrong:
        raise ViolationError(f"{name}: unclear error ({wrong}): {text[:LONGEST]!r}")


# -- comparisons ---------------------------------------------------------------------------------------


def _files(directory: Path) -> dict[str, bytes | None]:
    """Content by name; None for what is no ordinary file."""
    return {
        p.relative_to(directory).as_posix(): p.read_bytes() if p.is_file() and not p.is_symlink() else None
        for p in directory.rglob("*")
    }


def _same_files(directory: Path, base: Path) -> bool:
    """Whether the edits cancelled out; the manifest's text may differ."""
    return _small(directory) and _files(directory) == _files(base)


def _damaged(directory: Path, base: Path) -> set[str]:
    """Files that the kept manifest lists and that are not what they were (added files do not count)."""
    before = {n: data for n, data in _files(base).items() if n != MANIFEST_NAME}
    if not _small(directory):
        return set(before)
    now = _files(directory)
    return {name for name, data in before.items() if now.get(name) != data}


def _small(directory: Path) -> bool:
    return all(p.stat().st_size < 1 << 24 for p in directory.rglob("*") if p.is_file())


def _equal(one: serving.Loaded, other: serving.Loaded) -> bool:
    def bits(loaded: serving.Loaded) -> dict[str, Any]:
        layers = {
            n: [x.modules, _bytes(x.weight), _vector(x.bias).tobytes()] for n, x in loaded.layers.items()
        }
        return layers | {n: [t.dtype, t.shape, _bytes(t)] for n, t in loaded.plain.items()}

    return bits(one) == bits(other)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _confirm(served: serving.Loaded, directory: Path) -> None:
    """What the layers compute is what the slow reading finds in the files, bit for bit, and no NaN."""
    try:
        linears, tensors = read(directory)
    except InvalidError as error:
        raise ViolationError(f"serving accepts what the slow reading refuses: {error}") from error
    for name, tensor in served.plain.items():
        if name in tensors and not np.array_equal(tensor.float().numpy(), tensors[name], equal_nan=True):
            raise ViolationError(f"{name}: another tensor than the files hold")
    for name, layer in served.layers.items():
        if torch.isnan(layer.weight).any() or not np.isfinite(_vector(layer.bias)).all():
            raise ViolationError(f"{name}: NaN")
        parts = [linears[module] for module in layer.modules]
        expected = np.concatenate([_expected(part) for part in parts], axis=1)
        found = layer.weight.numpy()
        if parts[0].scale is None:  # CPUs with instructions for bf16 products take subnormals as zero there
            subnormal = np.abs(expected) < np.finfo(np.float32).tiny
            expected = np.where((found == 0) & subnormal, 0, expected)
        if not np.array_equal(found, expected):
            raise ViolationError(f"{name}: other weights than the files hold")
        if layer.bias is not None:
            bias = np.concatenate([np.zeros(0) if p.bias is None else p.bias for p in parts])
            rounded = torch.from_numpy(bias).to(layer.bias.dtype).float().numpy()
            if not np.array_equal(_vector(layer.bias), rounded):
                raise ViolationError(f"{name}: another bias than the files hold")


def _expected(part: Linear) -> np.ndarray:
    """``[K, N]``: outputs for unit vectors (docs/format.md): product, token scale, channel scale in fp32."""
    if part.scale is None:
        return part.stored.T
    code = np.float32(448)  # what a unit vector's one becomes, at token scale 1 / 448
    with np.errstate(over="ignore"):
        return (code * part.stored * (np.float32(1) / code)).T * part.scale


def _vector(bias: torch.Tensor | None) -> np.ndarray:
    return np.zeros(0) if bias is None else bias.float().numpy()
