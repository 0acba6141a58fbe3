"""``make fuzz``: build checkpoints, damage them thousands of times, report; exit code 1 on a violation."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
for _name, _value in {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}.items():
    os.environ.setdefault(_name, _value)


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", help="only these kinds of mutation")
    parser.add_argument("--found", type=Path, default=Path("build/fuzz"), help="where violations are saved")
    parser.add_argument("--replay", type=Path, help="judge one saved case")
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from fuzz import bases, campaign, serving
    from fuzz.edits import Case
    from fuzz.mutations import Base
    from fuzz.oracle import Oracle

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=campaign.MEMORY) as name:
        work = Path(name)
        directories = bases.build(work)
        with serving.vllm_process(work / "store"):
            oracle = Oracle(directories, work)
            print(
                f"{len(directories)} checkpoints ready after {time.perf_counter() - start:.0f} s", flush=True
            )
            if arguments.replay:
                print(oracle.judge(Case.parse(arguments.replay.read_text())))
                return 0
            known = [Base.read(n, d) for n, d in directories.items()]
            result = campaign.run(
                oracle,
                known,
                arguments.cases,
                arguments.seed,
                arguments.found,
                lambda line: print(line, flush=True),
                arguments.kind,
            )
    print(f"\n{result.table()}\n")
    time_taken = f"{result.seconds:.0f} s ({result.cpu_seconds:.0f} s of processor time)"
    print(f"{result.total} cases in {time_taken}, seed {arguments.seed}, {len(result.violations)} violations")
    return 1 if result.violations else 0


if __name__ == "__main__":
    sys.exit(main())
