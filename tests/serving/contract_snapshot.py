"""What the contract names in one vLLM wheel: ``python -m tests.serving.contract_snapshot WHEEL``.

Writes ``snapshots/vllm-VERSION.json`` beside this file: signatures, bases, attributes and call sites, no
code. The wheel is read, not installed. Get one, whatever this machine is, with::

    pip download --no-deps --only-binary=:all: --python-version 3.12 \\
        --platform manylinux_2_28_x86_64 vllm==0.33.0
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from tests.serving.contract_source import Sources
from tests.serving.contracts import CALLED, MARKS, OVERRIDES, USES, Called, Marks, Overrides, Uses

SNAPSHOTS = Path(__file__).parent / "snapshots"
Facts = dict[str, Any]


def facts(
    sources: Sources,
    uses: tuple[Uses, ...] = USES,
    overrides: tuple[Overrides, ...] = OVERRIDES,
    called: tuple[Called, ...] = CALLED,
    marks: tuple[Marks, ...] = MARKS,
) -> Facts:
    """What the sources say about every entry of the contract; a missing name is simply not there."""
    names: dict[str, Any] = {}
    for key in sorted({u.key for u in uses} | {o.base for o in overrides}):
        names |= sources.describe(*key.split(":"))
    calls: dict[str, list[dict[str, Any]]] = {}
    for entry in called:
        for module in entry.modules:
            sites = calls.setdefault(module, [])
            found = sources.calls(module, {entry.name})
            sites += [s for s in found if s["receiver"] in entry.receivers and s not in sites]
    found_marks = {f"{m.module}:{m.function}": sources.marks(m.module, m.function, m.patterns) for m in marks}
    return {"names": names, "calls": calls, "marks": found_marks}


def snapshot(wheel: Path) -> Facts:
    """The facts of one wheel, with its version, file name and SHA-256."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    version = wheel.name.split("-")[1]
    return {"version": version, "wheel": wheel.name, "sha256": digest} | facts(Sources.wheel(wheel))


def save(data: Facts, folder: Path = SNAPSHOTS) -> Path:
    """One line per name, call site and mark, so that a refresh shows as a readable diff."""
    lines = [f'"{key}": {json.dumps(data[key])}' for key in ("version", "wheel", "sha256")]
    for part in ("names", "calls", "marks"):
        entries = (f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(data[part].items()))
        lines.append(f'"{part}": {{\n' + ",\n".join(entries) + "\n}")
    path = folder / f"vllm-{data['version']}.json"
    folder.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("wheel", type=Path, nargs="+")
    for wheel in parser.parse_args().wheel:
        path = save(snapshot(wheel))
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
