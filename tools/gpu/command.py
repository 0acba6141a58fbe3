"""All evidence from one GPU machine by one command, most wanted first. `make gpu` runs it.

usage: python -m tools.gpu [STAGE …] [--budget S] [--out DIR] [--plan]

Made for a machine that one may use for a quarter of an hour, without network: a call ends by itself within
its budget, the next one goes on where it stopped, and longer budgets do more. Results are written from the
first second, into eight files at most: in benchmarks/results/gpu, or in DIR, which then starts from what the
repository holds. What was measured with other kernels is done again. Configurations that fail first light or
a test are not timed. Ends at once with exit code 3 when the kernel's core is wrong.

Stages, in this order; the last four only when named:
{stages}

The extension and wheels that `make gpu-bundle` put into .gpu/ are used where they fit; else the extension is
compiled if nvcc and the CUTLASS headers are there. Needs Python 3.11 or later, torch with CUDA, safetensors,
numpy and pytest. `--plan` shows what would run and what is missing, and needs no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.common.results import RESULTS, ROOT, read
from tools.find_cuda import find_cutlass, find_nvcc
from tools.gpu import build as gpu_build
from tools.gpu import bundle_vllm as gpu_bundle_vllm
from tools.gpu.build import HEADERS, LIBRARY, NEEDED, WANTED, missing_packages
from tools.gpu.run import FILES, Run
from tools.gpu.stages import ALL_LAYERS, STAGES, Stage, limit_of, run_stages

BUDGET = 210.0
NAMES = [stage.name for stage in STAGES]


def to_bring() -> str:
    """One line: what a machine without network must be given to run this checkout."""
    packages = f"Python packages {', '.join(NEEDED[1:])}"
    if gpu_build.carried():
        return f".gpu/, which `make gpu-bundle` made of these sources (nothing is compiled), and {packages}"
    fits = gpu_build.library_fits(read(RESULTS / "state.json").get("build", {}))
    if fits and gpu_build.ask_extension()[0] is None:
        return f"{LIBRARY.relative_to(ROOT)} ({fits}; nothing is compiled then) and {packages}"
    found = find_cutlass()
    where = f"here in {found}" if found else HEADERS
    return (
        f".gpu/ from `make gpu-bundle`, or the CUTLASS headers ({where}) or a built "
        f"{LIBRARY.relative_to(ROOT)}; and {packages}"
    )


def show_plan(run: Run, stages: list[Stage]) -> None:
    """What would run, with limits, without touching a GPU."""
    from benchmarks.kernels import spense_linear as kernels
    from benchmarks.kernels.counters import find_ncu
    from tools.gpu.groups import GROUPS, find_sanitizer
    from tools.gpu.tune_layers import planned

    print(f"to bring: {to_bring()}")
    absent = [f"{name} ({why})" for name, why in WANTED.items() if not importlib.util.find_spec(name)]
    print(f"missing here: {', '.join(missing_packages() + absent) or 'nothing'}")
    print(f"nvcc: {find_nvcc() or 'none'}; ncu: {find_ncu() or 'none'}", end="; ")
    print(f"compute-sanitizer: {find_sanitizer() or 'none'}")
    for stage in stages:
        state = run.state(stage.name).get("state", "not run yet")
        print(f"\n{stage.name}: up to {limit_of(stage, run, stages):.0f} s, {state}; {stage.about}")
        if stage.name in ("test", "tests"):
            for group in (g for g in GROUPS if g.core or stage.name == "tests"):
                needs = f", needs {', '.join(group.needs)}" if group.needs else ""
                print(f"  {group.name:14s} {group.limit:4.0f} s  {', '.join(group.tests)}{needs}")
        if stage.name == "tune":
            print(f"  {planned(core=limit_of(stage, run, stages) < ALL_LAYERS)}")
        if stage.name in ("speed", "kernels"):
            kernels.dry_run(kernels.select(run.only, stage.name == "speed"), kernels.Device.here())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    stages = "\n".join(f"  {stage.name:9s} {stage.about}" for stage in STAGES)
    parser = argparse.ArgumentParser(
        "python -m tools.gpu",
        description=(__doc__ or "").replace("{stages}", stages),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(NAMES))
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--fresh", action="store_true", help="ignore what earlier calls left")
    parser.add_argument("--jobs", type=int, default=max(1, min(4, (os.cpu_count() or 2) // 3)))
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="rows of the benchmark")
    parser.add_argument("--plan", action="store_true")
    options = parser.parse_args(arguments)
    if unknown := set(options.stages) - set(NAMES):
        parser.error(f"no such stage: {', '.join(sorted(unknown))} (known: {', '.join(NAMES)})")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # running children are ended on the way out
    stages = [s for s in STAGES if (s.name in options.stages if options.stages else s.default)]
    run = Run(
        options.out.resolve(), options.budget, fresh=options.fresh, jobs=options.jobs, only=options.only
    )
    if options.plan:
        show_plan(run, stages)
        return 0
    run.seed()
    if run.fresh:
        run.forget([stage.name for stage in stages])
    if problem := gpu_build.install_wheels():
        run.say(f"FAIL the wheels of .gpu/wheels cannot be installed: {problem}")
        return 2
    gpu_bundle_vllm.unpack()
    if missing := missing_packages():
        run.say(f"FAIL missing Python packages: {', '.join(missing)}; to bring: {to_bring()}")
        return 2
    if {s.name for s in stages} - {"build", "cutlass"} and not import_module("torch").cuda.is_available():
        run.say(f"FAIL {sys.executable}: no CUDA device, or torch without CUDA; --plan shows what would run")
        return 2
    code = run_stages(run, stages)
    if (count := sum(path.is_file() for path in run.results.iterdir())) > FILES:
        run.say(f"NOTE {run.results} holds {count} files, more than {FILES}")
    return code


if __name__ == "__main__":
    sys.exit(main())
