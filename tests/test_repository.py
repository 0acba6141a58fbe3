"""What stands around the code says what is there: named files, make targets, versions."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import vllm_spense

yaml = pytest.importorskip("yaml", reason="PyYAML reads the workflows")

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
PHONY = re.search(r"^\.PHONY:((?:.*\\\n)*.*)", MAKEFILE, re.MULTILINE)
TARGETS = set(PHONY[1].replace("\\", " ").split()) if PHONY else set()
FOLDERS = r"(?:\.ci|\.github|benchmarks|docs|kernels|requirements|tests|tools|vllm_spense)"


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def made(text: str) -> set[str]:
    """Targets of the ``make`` commands in a text."""
    calls = re.findall(r"(?:^|[`;&]\s*)make((?: +[\w.=/$-]+)+)", text, re.MULTILINE)
    return {word for call in calls for word in call.split() if "=" not in word}


def test_contributing_names_what_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(rf"\b(?<![\w/]){FOLDERS}/[\w./-]*\w|\.ci/run|\.github/[\w./-]*\w", text))
    named |= set(re.findall(r"\]\((?!http)([^)#]+)", text))
    assert len(named) > 25
    assert not [name for name in named if not (ROOT / name).exists()]
    assert {"setup", "test", "lint"} <= made(text) <= TARGETS
    assert len(text.splitlines()) <= 120


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_targets_that_exist(workflow: Path) -> None:
    called = set().union(*(made(step.get("run", "")) for step in steps(workflow)))
    assert called
    assert called <= TARGETS


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_to_a_major_version(workflow: Path) -> None:
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used
    assert not [name for name in used if not re.fullmatch(r"[\w./-]+@(release/)?v\d+", name)]


def test_only_publishing_may_ask_for_a_token() -> None:
    """Trusted publishing: the job that builds foreign code gets no identity, and nothing holds a password."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    publish = workflow["jobs"].pop("publish")
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"] == "release"
    assert not [name for name, job in workflow["jobs"].items() if "permissions" in job]
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()


def test_issue_forms_ask_for_doctor_and_inspect() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 2
    for form in forms:
        body = yaml.safe_load(form.read_text())["body"]
        required = {part.get("id") for part in body if part.get("validations", {}).get("required")}
        assert {"doctor", "command"} <= required
        assert "inspect" in {part.get("id") for part in body}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_one_version_everywhere() -> None:
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {version} == {released[0], citation["version"], vllm_spense.__version__}
    assert "2606.10445" in citation["references"][0]["url"]


@pytest.mark.parametrize(("tool", "hooks"), [("ruff", 2), ("clang-format", 1)])
def test_hooks_have_the_pinned_formatters(tool: str, hooks: int) -> None:
    pinned = re.search(rf"^{tool}==.*$", (ROOT / "requirements" / "cpu.txt").read_text(), re.MULTILINE)
    configured = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert pinned
    found = [hook["additional_dependencies"] for hook in configured if hook["id"].startswith(tool)]
    assert found == [[pinned[0]]] * hooks
