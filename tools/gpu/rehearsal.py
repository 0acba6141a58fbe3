"""Rehearse `make gpu` without a GPU: does everything run, and does a quarter of an hour suffice?

usage: python -m tools.gpu.rehearsal [--short]

Two parts, neither of which says anything about a GPU's results or speed.

The clock is simulated: the real stages with their real limits in three calls, with stand-ins for every child.
How long a child takes is a guess (as planned, twice as long, never ending, silent, stuck in the driver); that
the calls end in time, whatever the children do, is not. Ends with an error unless MARGIN seconds remain.

The faults are real: first light with its cases on the emulated kernel (`--short`: on the definition), then
with a hang, a crash and a wrong result in it; the core tests with the definition in the kernel's place, and
with a crash in them. Processes are real, and are really killed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.common.results import ROOT, program, read, write
from benchmarks.common.supervise import Ended, supervise
from tools.gpu.first_light import CORE_IS_WRONG
from tools.gpu.groups import GROUPS, Group, run_groups
from tools.gpu.run import FILES, Run
from tools.gpu.stages import STAGES, Stage, run_stages

SITTING, MARGIN = 900.0, 90.0
"""Seconds of the machine, and how many of them must remain."""
CALLS = (210.0, 210.0, 270.0)
"""Budgets of three calls; the third has vLLM."""
START, BETWEEN = 100.0, 10.0
"""Until the first call runs, and between two of them: transfers. Guesses."""
PREPARING = 25.0
"""A call's own imports and wheels. A guess."""
KILLED, STUCK = 3.0, 23.0
"""Seconds to end a child, and one that does not die (supervise.py)."""
IMPORTS = 10.0
"""Seconds of a child before its budget counts. A guess."""
GROUP_SECONDS = 5.0
FIRST_LIGHT, COUNTERS = "tools.gpu.first_light", "benchmarks.kernels.counters"
PLANNED = {
    FIRST_LIGHT: 22.0,
    "benchmarks.kernels.spense_linear": 45.0,
    COUNTERS: 45.0,
    "tools.gpu.tune_layers": 60.0,
    "benchmarks.kernels.decode_stack": 60.0,
    "benchmarks.serving.decode": 200.0,
}
"""Seconds of each child when all goes well: guesses."""
ENDLESS = 1e9
COMPLETE = ("0 of them left", "all rows measured")
"""Last lines of children that have done everything."""


@dataclass
class Scenario:
    """What the children do: how long they take, how first light ends, and which cannot be killed."""

    name: str
    seconds: Mapping[str, float]
    group: float = GROUP_SECONDS
    verdict: str = "passed"
    stuck: tuple[str, ...] = ()
    now: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    """By child: what earlier calls have done of it."""

    def child(
        self,
        command: list[str],
        *,
        limit: float,
        idle: float | None = None,
        on_line: Callable[[str], None] = print,
        **_: Any,
    ) -> Ended:
        """Takes its time on the simulated clock and leaves what the real child leaves."""
        module, options = command[2], command[3:]
        budget, start = float(options[options.index("--budget") + 1]), self.now
        needs = self.seconds[module] - self.spent.get(module, 0.0)
        # An endless child does not heed its budget either; any other stops there by itself.
        if self.seconds[module] >= ENDLESS:
            stuck = module in self.stuck
            self.now += limit + (STUCK if stuck else KILLED)
            reason = f"killed: over its limit of {limit:.0f} s{', and does not die' if stuck else ''}"
            return Ended(None, reason, self.now - start, "")
        took = min(needs, budget + IMPORTS, limit)
        self.spent[module] = self.spent.get(module, 0.0) + took
        self.now += took
        complete = took >= needs
        if module == FIRST_LIGHT:
            verdict = self.verdict if complete else "failed"
            summary = {"event": "summary", "state": verdict, "reason": "simulated", "banned": {}}
            path = Path(options[options.index("--results") + 1])
            path.write_text(json.dumps(summary | {"seconds": took}) + "\n")
            return Ended(CORE_IS_WRONG if verdict == "failed" else 0, "", took, "")
        if module == COUNTERS:
            write(Path(options[options.index("--results") + 1]), {"kernels": {"simulated": {}}})
        for line in COMPLETE if complete else ("7 points left",):
            on_line(line)
        return Ended(0, "", took, "")

    def test_group(self, group: Group, *, left: Callable[[], float], **_: Any) -> dict[str, Any]:
        took = min(self.group, left())
        self.now += took + (KILLED if took < self.group else 0)
        state = "passed" if took == self.group else "not run"
        return {"state": state, "passed": 1, "seconds": took, "reason": "simulated"}


def simulated_stages(vllm: bool) -> list[Stage]:
    """The default stages; the library is there, as it was carried."""
    replaced = {"build": lambda run, limit: True, "counters": None}
    stages = [replace(s, needs="") for s in STAGES if s.default and (vllm or s.name != "serving")]
    return [replace(s, action=replaced.get(s.name) or s.action) for s in stages]


def scenarios() -> list[Scenario]:
    endless = dict.fromkeys(PLANNED, ENDLESS)
    found = [
        Scenario("as planned", PLANNED),
        Scenario("everything twice as slow", {k: 2 * v for k, v in PLANNED.items()}, 2 * GROUP_SECONDS),
        Scenario("no child ever ends", endless | {FIRST_LIGHT: 22.0}, ENDLESS),
        Scenario("none ends or dies", endless | {FIRST_LIGHT: 22.0}, ENDLESS, stuck=tuple(PLANNED)),
        Scenario("the core is wrong", PLANNED, verdict="failed"),
        Scenario("first light never ends", PLANNED | {FIRST_LIGHT: ENDLESS}),
    ]
    for module in list(PLANNED)[1:]:
        slow = PLANNED | {module: ENDLESS}
        found.append(Scenario(f"{module} never ends", slow))
        found.append(Scenario(f"{module} is stuck in the driver", slow, stuck=(module,)))
    return found


def simulate(scenario: Scenario, folder: Path, calls: tuple[float, ...] = CALLS) -> list[dict[str, Any]]:
    """Run the calls on the scenario's clock; when each began and ended, and the stages that are done."""
    scenario.now, found = START, []
    for i, budget in enumerate(calls):
        begin = scenario.now
        run = Run(
            folder,
            budget,
            clock=lambda: scenario.now,
            child=scenario.child,
            group=scenario.test_group,
            profiler=lambda: "ncu",
        )
        marks: dict[str, float] = {}

        def say(line: str, marks: dict[str, float] = marks) -> None:
            if line.startswith("=== "):
                marks[line[4:].partition(":")[0]] = round(scenario.now)

        run.say = say  # type: ignore[method-assign]
        scenario.now += PREPARING
        code = run_stages(run, simulated_stages(vllm=i == len(calls) - 1))
        state = read(folder / "state.json") | {"test": read(folder / "test.json")}
        done = [stage.name for stage in STAGES if state.get(stage.name, {}).get("state") == "done"]
        call = {"budget": budget, "begin": begin, "end": scenario.now, "marks": marks}
        found.append(call | {"code": code, "done": done})
        if code == CORE_IS_WRONG:
            break
        scenario.now += BETWEEN
    return found


def simulated_clock() -> bool:
    """Print every scenario; whether all of them leave the margin."""
    good = True
    print(f"simulated clock: {SITTING:.0f} s, of which {MARGIN:.0f} must remain")
    for scenario in scenarios():
        with tempfile.TemporaryDirectory() as folder:
            calls = simulate(scenario, Path(folder))
            files = len([p for p in Path(folder).iterdir() if p.is_file()])
        left = SITTING - calls[-1]["end"]
        good = good and left >= MARGIN and files <= FILES
        ends = ", ".join(f"{call['end']:.0f}" for call in calls)
        done = ", ".join(calls[-1]["done"]) or "nothing"
        print(f"{'PASS' if left >= MARGIN else 'FAIL'} {scenario.name}: calls end at {ends} s; done: {done}")
        if scenario.name == "as planned":
            for call in calls:
                begins = ", ".join(f"{name} {at:.0f}" for name, at in call["marks"].items())
                print(f"  a call of {call['budget']:.0f} s begins at {call['begin']:.0f} s: {begins}")
    return good


# --- real processes, real faults ----------------------------------------------------------------------------

FAULTS: dict[str, tuple[list[str], int, str, list[str]]] = {
    "without a fault": ([], 0, "passed", []),
    "a hang in F6": (["--fault", "F6=hang"], 0, "partly", ["F6"]),
    "a crash in F5": (["--fault", "F5=crash"], 0, "partly", ["F5"]),
    "a wrong result in F2": (["--fault", "F2=wrong"], CORE_IS_WRONG, "failed", ["F2"]),
    "a hang in F3": (["--fault", "F3=hang"], CORE_IS_WRONG, "failed", ["F3"]),
    "wrong in F6 and F8": (
        ["--fault", "F6=wrong", "--fault", "F8=wrong"],
        CORE_IS_WRONG,
        "failed",
        ["F6", "F8"],
    ),
}
"""Options, exit code, verdict and wrong families."""


def real_faults(stand_in: str, silent: float, names: list[str] | None = None) -> bool:
    """First light with a stand-in, in real processes; whether each fault ends as it must."""
    good = True
    for name, (options, code, state, wrong) in FAULTS.items():
        if names and name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "first_light.jsonl"
            # An emulated case takes seconds where a GPU takes milliseconds: only the faults get short limits.
            limit = silent if options else 60.0
            ended = supervise(
                [
                    *(*program(FIRST_LIGHT), "--stand-in", stand_in),
                    *("--results", str(path), "--budget", "400", "--silent", str(limit), *options),
                ],
                limit=500,
                cwd=ROOT,
            )
            verdict = json.loads(path.read_text().splitlines()[-1])
        right = (ended.returncode, verdict["state"], verdict["wrong"]) == (code, state, wrong)
        good = good and right
        print(
            f"{'PASS' if right else 'FAIL'} first light, {stand_in}, {name}: {verdict['state']}", flush=True
        )
    return good


def real_tests(how: str, names: tuple[str, ...]) -> bool:
    """Groups of tests in their own processes, the definition in the kernel's place."""
    os.environ["SPENSE_GPU_REHEARSAL"] = how
    entries = run_groups(
        [replace(group, needs=(), silent=120.0) for group in GROUPS if group.name in names],
        {},
        left=lambda: 900.0,
        save=lambda entries: None,
        say=lambda line: print(f"  {line.splitlines()[0]}", flush=True),
        jobs=1,
        thin=True,
    )
    del os.environ["SPENSE_GPU_REHEARSAL"]
    states = {name: entry["state"] for name, entry in entries.items()}
    broke = {label for entry in entries.values() for label in entry.get("broke", ())}
    right = set(states.values()) == {"passed"} if how == "1" else broke == {"sm90-64x16-c2"}
    print(
        f"{'PASS' if right else 'FAIL'} tests, {how}: {states}, broke: {sorted(broke) or 'none'}", flush=True
    )
    return right


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a minute: no emulator, no tests")
    options = parser.parse_args()
    good = simulated_clock()
    good = real_faults("definition", silent=3.0) and good
    if not options.short:
        good = real_faults("emulator", silent=20.0, names=["without a fault"]) and good
        good = real_tests("1", tuple(group.name for group in GROUPS if group.core and group.thin)) and good
        good = real_tests("crash", ("split_k",)) and good
    print("rehearsed: this says nothing about a GPU" if good else "the rehearsal failed")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
