"""The first seconds of the Hopper kernel on a GPU: is it right, and what must not be tried further?

usage: python -m tools.gpu.first_light --library _C.abi3.so [--results FILE.jsonl] [--budget S]

Some 250 small cases (tools/gpu/first_light_cases.py) in families F0 to F8, simplest first, one line of JSON
each. torch is imported once; a child takes the cases, and another one goes on behind a case that hangs or
crashes. Such a case bans its kind (multicast, split K) and a wrong one its configuration, for the tests and
the timing that follow. Ends at once with exit code 3 when the core is wrong: one of F1 to F4, or any two
families. Use a library built with SPENSE_TRAP=1: a kernel that waits for seconds says where and stops.

`--stand-in emulator` (or `definition`) runs on a CPU instead, reduced; `--fault F6=hang` (crash, wrong) puts
a fault into a family.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.common.results import RESULTS, ROOT
from tools.gpu.first_light_cases import ALONE, CHECKS, CORE, FAMILIES, Case, Machine, cases, layer_of
from tools.gpu.stand_ins import FAULTS, STAND_INS, Faulty, Gpu
from vllm_spense.ops.linear.configs import KernelConfig, label

SILENT = 12.0
"""Seconds without an event after which a case hangs: none takes one."""
STARTING = 40.0
"""Seconds that a child may take for CUDA and the library."""
SHOWN = 4
"""Cases of a family whose fault is printed: the file has all."""
CORE_IS_WRONG = 3
NO_TIME = "no time left"
CONTEXT_LOST = 86
Result = dict[str, Any]


def kind(config: KernelConfig) -> str:
    """What is banned when a configuration hangs."""
    if config.multicast:
        return "multicast"
    return "split K" if config.cluster > 1 else label(config)


# --- the child ----------------------------------------------------------------------------------------------


def work(
    events: Connection,
    todo: list[Case],
    make: Callable[[], Machine],
    reduced: bool,
    faults: Mapping[str, str],
) -> None:
    """Runs the cases and tells when each begins and how it ended."""
    try:
        machine = make()
    except Exception as error:
        events.send(("failed", _short(error)))
        return
    events.send(("ready", ""))
    for case in todo:
        events.send(("begin", case.key))
        start = time.monotonic()
        result: Result = {"state": "right", "message": ""}
        fault = faults.get(case.family)
        try:
            check = CHECKS[case.check]
            spec = layer_of(case.layer, reduced)
            problem = check(Faulty(machine, fault) if fault else machine, case, spec)
            if problem:
                result = {"state": "wrong", "message": problem}
            elif case.check == "clusters":
                result["clusters"] = machine.clusters(case.config)
            machine.synchronize()
        except Exception as error:
            result = {"state": "error", "message": _short(error)}
        try:
            machine.synchronize()
        except Exception as error:
            events.send(("end", result | {"state": "crash", "message": _short(error)}))
            os._exit(CONTEXT_LOST)
        events.send(("end", result | {"seconds": round(time.monotonic() - start, 3)}))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]


# --- the parent ---------------------------------------------------------------------------------------------


class FirstLight:
    """Hands cases to children, watches them, and knows what is wrong so far."""

    def __init__(
        self,
        target: Callable[..., None],
        *,
        record: Callable[[Result], None],
        left: Callable[[], float],
        silent: float = SILENT,
        starting: float = STARTING,
    ) -> None:
        self.target, self.record, self.left = target, record, left
        self.silent, self.starting = silent, starting
        self.how = "fork"  # from here, with torch there at once; CUDA starts in the child only, as it must
        self.results: dict[str, Result] = {}
        self.banned: dict[str, str] = {}
        """By kind or label: why."""

    def run(self, todo: Iterable[Case]) -> str | None:
        """Run the cases; None at the end of them, else why it stopped."""
        waiting = list(todo)
        while waiting:
            alone = waiting[0].family in ALONE
            batch = [case for case in waiting if (case.family in ALONE) == alone]
            stop = self.run_batch(batch)
            waiting = [case for case in waiting if case.key not in self.results]
            if stop:
                return stop
        return None

    def run_batch(self, batch: list[Case]) -> str | None:
        """One child for as long as it lives."""
        for case in batch:
            name = kind(case.config)
            if reason := self.banned.get(name) or self.banned.get(label(case.config)):
                self.add(case, {"state": "banned", "message": reason})
        batch = [case for case in batch if case.key not in self.results]
        if not batch:
            return None
        context: Any = multiprocessing.get_context(self.how)
        events, sender = context.Pipe(duplex=False)
        child = context.Process(target=self.target, args=(sender, batch), daemon=True)
        child.start()
        sender.close()
        try:
            return self.watch(events, batch)
        finally:
            child.join(2 if self.results else 0)
            child.kill()
            child.join(5)  # one that is stuck in the driver is left behind

    def watch(self, events: Connection, batch: list[Case]) -> str | None:
        cases_left, current, patience = list(batch), None, self.starting
        while True:
            limit = min(patience, self.left())
            if limit <= 0 or not events.poll(limit):
                if self.left() <= 0.1:
                    return NO_TIME
                return self.broke(current, "hang", f"silent for {patience:.0f} s")
            try:
                event, content = events.recv()
            except EOFError:
                if current is None:
                    return None if not cases_left else "the child ended by itself"
                return self.broke(current, "crash", "the process died")
            patience = self.silent
            if event == "failed" and "forked subprocess" in content and self.how == "fork":
                self.how = "spawn"  # something has started CUDA here: children import torch themselves
                return None
            if event == "failed":
                return f"it cannot start: {content}"
            if event == "begin":
                current = cases_left.pop(0)
            if event == "end" and current is not None:
                if content["state"] == "crash":
                    return self.broke(current, "crash", content["message"])
                self.add(current, content)
                case, current = current, None
                ends = not cases_left or cases_left[0].family != case.family
                if ends and (reason := self.hopeless()) and not self.more_core(cases_left):
                    return reason
                if content["state"] != "right" and kind(case.config) not in self.banned:
                    self.banned[label(case.config)] = f"{content['state']} in {case.key}"

    def broke(self, case: Case | None, state: str, message: str) -> str | None:
        """A case took its process along."""
        if case is None:
            return f"{message} before its first case"
        self.banned[kind(case.config)] = f"{state} in {case.key}"
        self.add(case, {"state": state, "message": message})
        return self.hopeless()

    def add(self, case: Case, result: Result) -> None:
        entry = {"key": case.key, "family": case.family, "config": label(case.config)} | result
        self.results[case.key] = entry
        self.record(entry)

    def more_core(self, waiting: list[Case]) -> bool:
        """Whether the core goes on: all of it, so that its pattern shows, takes a second."""
        return bool(waiting) and waiting[0].family in CORE

    def wrong_families(self) -> list[str]:
        return [
            family
            for family in FAMILIES
            if any(
                r["family"] == family and r["state"] not in ("right", "banned") for r in self.results.values()
            )
        ]

    def hopeless(self) -> str | None:
        """Why nothing that follows would mean anything."""
        wrong = self.wrong_families()
        core = [family for family in wrong if family in CORE]
        if core or len(wrong) > 1:
            names = "; ".join(f"{family} ({FAMILIES[family]})" for family in wrong)
            return f"the {'core is' if core else 'kernel is'} wrong: {names}"
        return None


def summary(light: FirstLight, stopped: str | None, seconds: float) -> Result:
    """What the next stages need to know."""
    families = {family: {"right": 0, "not right": 0} for family in FAMILIES}
    for result in light.results.values():
        families[result["family"]]["right" if result["state"] == "right" else "not right"] += 1
    wrong, every = light.wrong_families(), cases()
    labels = {
        label(case.config): reason
        for case in every
        if (reason := light.banned.get(kind(case.config)) or light.banned.get(label(case.config)))
    }
    tried = {key for key, result in light.results.items() if result["state"] != "banned"}
    core_tried = all(case.key in tried for case in every if case.family in CORE)
    state = "passed" if len(tried) == len(every) and not wrong else "partly"
    if stopped and not (stopped == NO_TIME and core_tried):
        state = "failed"
    clusters = {r["config"]: r["clusters"] for r in light.results.values() if "clusters" in r}
    return {
        "event": "summary",
        "state": state,
        "reason": stopped or "",
        "families": families,
        "wrong": wrong,
        "banned": labels,
        "clusters": clusters,
        "seconds": round(seconds, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", type=Path, default=ROOT / "vllm_spense" / "_C.abi3.so")
    parser.add_argument("--results", type=Path, default=RESULTS / "first_light.jsonl")
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--stand-in", choices=STAND_INS)
    parser.add_argument("--fault", action="append", default=[], metavar="FAMILY=FAULT")
    parser.add_argument("--silent", type=float, default=SILENT, help="seconds after which a case hangs")
    options = parser.parse_args(arguments)
    faults = dict(fault.partition("=")[::2] for fault in options.fault)
    if any(family not in FAMILIES or fault not in FAULTS for family, fault in faults.items()):
        parser.error(f"--fault takes one of {', '.join(FAMILIES)}, = and one of {', '.join(FAULTS)}")
    start, shown = time.monotonic(), Counter[str]()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with options.results.open("w", buffering=1) as file:

        def record(entry: Result) -> None:
            file.write(json.dumps(entry) + "\n")
            if entry["state"] in ("right", "banned"):
                return
            shown[entry["family"]] += 1
            if shown[entry["family"]] <= SHOWN:
                print(f"FAIL {entry['key']}: {entry['state']}: {entry['message']}", flush=True)

        gpu = partial(Gpu, options.library)
        make: Callable[[], Any] = STAND_INS[options.stand_in] if options.stand_in else gpu
        target = partial(work, make=make, reduced=bool(options.stand_in), faults=faults)
        light = FirstLight(
            target,
            record=record,
            left=lambda: options.budget - (time.monotonic() - start),
            silent=options.silent,
        )
        stopped = light.run(cases())
        verdict = summary(light, stopped, time.monotonic() - start)
        file.write(json.dumps(verdict) + "\n")
    right = sum(family["right"] for family in verdict["families"].values())
    print(
        f"first light: {verdict['state']}, {right} of {len(cases())} cases right in {verdict['seconds']} s"
        f"{', wrong: ' + ', '.join(verdict['wrong']) if verdict['wrong'] else ''}"
        f"{', banned: ' + ', '.join(verdict['banned']) if verdict['banned'] else ''}",
        flush=True,
    )
    if verdict["state"] == "failed":
        print(f"STOP first light: {stopped}", flush=True)
        return CORE_IS_WRONG
    return 0


if __name__ == "__main__":
    sys.exit(main())
