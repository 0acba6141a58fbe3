"""README and docs/: links lead somewhere, places that scripts fill are there, README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
FILLED = {  # what scripts look for with `insert`, and leave out in silence where it is missing
    "README.md": {"quality", "speed-cpu"},
    "docs/accuracy.md": {"goals", "frontier", "second-model"},
    "docs/experiments.md": {"layer-costs", "tries", "ablations"},
    "docs/kernels.md": {"speed", "cpu-linear"},
    "docs/performance.md": {"serving-cpu", "serving", "profile"},
    "docs/reliability.md": {"start-up"},
    "docs/twell.md": {
        "cpu-sparse-mlp",
        "serving-sparse-relu",
        "serving-sparse-trained",
        "sparsify",
        "relufication",
        "relu-training",
    },
}


def anchors(text: str) -> set[str]:
    """As GitHub makes them: lower case, spaces to hyphens, other signs left out."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path.read_text()), f"{page.name}: {target}"


@pytest.mark.parametrize("name", FILLED)
def test_places_that_scripts_fill(name: str) -> None:
    text = (ROOT / name).read_text()
    for block in FILLED[name]:
        begin, end = (text.find(f"<!-- {block}:{mark} -->") for mark in ("begin", "end"))
        assert 0 <= begin < end, f"{name}: {block}"


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_the_readme_names_the_command_that_tests_everything() -> None:
    """What `.ci/run` calls is what a reader is told."""
    assert "`make test`" in (ROOT / "README.md").read_text()
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text() + "\n"
