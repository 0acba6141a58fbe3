"""``make fuzz``: damage checkpoints and source models thousands of times; exit code 1 on a violation."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

for _name, _value in {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}.items():
    os.environ.setdefault(_name, _value)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=6000, help="of checkpoints")
    parser.add_argument("--source-cases", type=int, default=3000, help="of source models' config.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", help="only these kinds of mutation")
    parser.add_argument("--found", type=Path, default=Path("build/fuzz"), help="where violations are saved")
    parser.add_argument("--replay", type=Path, help="judge one saved case")
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from tests.fuzz.edits import Case

    case = Case.parse(arguments.replay.read_text()) if arguments.replay else None
    parts = [part for part in (_checkpoints, _sources) if part(arguments, case)]
    return 1 if parts else 0


def _checkpoints(arguments: argparse.Namespace, case: Any) -> bool:
    """Whether damaged checkpoints went wrong."""
    from tests.fuzz import bases, campaign, serving
    from tests.fuzz.mutations import KINDS, Base, cases
    from tests.fuzz.oracle import Oracle

    kinds = [kind for kind in arguments.kind or KINDS if kind in KINDS]
    if not (case.base in bases.NAMES if case else kinds):
        return False
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=campaign.MEMORY) as name:
        work = Path(name)
        directories = bases.build(work)
        with serving.vllm_process(work / "store"):
            oracle = Oracle(directories, work)
            _ready(len(directories), "checkpoints", start)
            if case:
                print(oracle.judge(case))
                return False
            known = [Base.read(n, d) for n, d in directories.items()]
            return _run(arguments, oracle, known, kinds, arguments.cases, cases)


def _sources(arguments: argparse.Namespace, case: Any) -> bool:
    """Whether damaged source models went wrong."""
    from tests.fuzz import bases, campaign, sources

    kinds = [kind for kind in arguments.kind or sources.SOURCE_KINDS if kind in sources.SOURCE_KINDS]
    if not (case.base not in bases.NAMES if case else kinds):
        return False
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=campaign.MEMORY) as name:
        work = Path(name)
        directories = sources.build(work)
        oracle = sources.SourceOracle(directories, work)
        _ready(len(directories), "source models", start)
        if case:
            print(oracle.judge(case))
            return False
        known = sources.read_bases(directories)
        return _run(arguments, oracle, known, kinds, arguments.source_cases, sources.source_cases)


def _ready(number: int, what: str, start: float) -> None:
    print(f"{number} {what} ready after {time.perf_counter() - start:.0f} s", flush=True)


def _run(
    arguments: argparse.Namespace, oracle: Any, known: list[Any], kinds: list[str], number: int, strategy: Any
) -> bool:
    from tests.fuzz import campaign

    result = campaign.run(
        *(oracle, known, number, arguments.seed, arguments.found),
        progress=lambda line: print(line, flush=True),
        kinds=kinds,
        strategy=strategy,
    )
    print(f"\n{result.table()}\n")
    time_taken = f"{result.seconds:.0f} s ({result.cpu_seconds:.0f} s of processor time)"
    print(f"{result.total} cases in {time_taken}, seed {arguments.seed}, {len(result.violations)} violations")
    return bool(result.violations)


if __name__ == "__main__":
    sys.exit(main())
