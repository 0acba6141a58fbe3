"""docs/environment.md has every variable that the package, its build and its tests read."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    *(ROOT / "vllm_spense").rglob("*.py"),
    *(ROOT / "benchmarks").rglob("*.py"),
    *(ROOT / "tools").rglob("*.py"),
    *(ROOT / "tests" / "gpu").glob("*.py"),
    *(ROOT / name for name in ("setup.py", "Makefile", "tests/asset_paths.py", "tests/conftest.py")),
]
NOT_READ = {
    "SPENSE_QUALITY",  # a Python constant
    "SPENSE_DIR",  # an argument in a usage line
}


def test_every_variable_is_on_the_page() -> None:
    """What follows -D is a macro of the compiler."""
    listed = set(re.findall(r"`(SPENSE_[A-Z_]+)`", (ROOT / "docs" / "environment.md").read_text()))
    found: dict[str, str] = {}
    for path in FILES:
        for name in re.findall(r"(?<!-D)\bSPENSE_[A-Z_]+", path.read_text()):
            found.setdefault(name, str(path.relative_to(ROOT)))
    missing = {name: place for name, place in found.items() if name not in listed | NOT_READ}
    assert not missing, "add them to docs/environment.md"
    assert listed == set(found) - NOT_READ, "docs/environment.md names what nothing reads"
