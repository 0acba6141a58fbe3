"""Kill -9 of one process of a running server: all of them end, and a restarted server answers as before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tools.soak.clients import Clients, Probe
from vllm_spense.cli.server import Server, serve

VICTIMS = {"worker": "VLLM::Worker", "engine": "VLLM::EngineCore", "server": ""}
"""What to kill, by the beginning of its process title; the server is the root of them all."""
PATIENCE = 60.0
"""Seconds in which all processes must have ended by themselves."""


Fault = dict[str, Any]


def kill_each(model: Path, log: Path, arguments: Sequence[str], probes: Sequence[Probe]) -> list[Fault]:
    """Start, ask, kill, and start again, once per victim. One entry each.

    ``survivors``: processes still there after :data:`PATIENCE`, ended then as their process group, the way a
    container or systemd does; ``changed``: prompts with another answer from the server started after that.
    """
    faults: list[Fault] = []
    for victim in (*VICTIMS, None):
        with serve(model, log, arguments=arguments) as server:
            answers = asyncio.run(ask(server, probes))
            if faults:
                changed = [p.prompt for p, answer in zip(probes, answers, strict=True) if answer != p.answer]
                faults[-1]["changed"] = changed
            if victim is not None:
                faults.append({"victim": victim} | kill(server, VICTIMS[victim]))
                print(faults[-1], flush=True)
    return faults


def failed_fault(fault: Fault) -> bool:
    """Another answer afterwards, or processes left by the death of a worker or engine.

    What the death of the server leaves is vLLM's doing, with any model.
    """
    return bool(fault["changed"] or (fault["survivors"] and fault["victim"] != "server"))


async def ask(server: Server, probes: Sequence[Probe]) -> list[str]:
    clients = Clients(server.port, [])
    answers = [await clients.answer(probe.prompt) for probe in probes]
    await clients.http.aclose()
    return answers


def kill(server: Server, title: str) -> Fault:
    """SIGKILL to the process with this title below the server, or to the server itself without one."""
    root = psutil.Process(server.pid)
    family = [root, *root.children(recursive=True)]
    victim = next(p for p in family if title in _title(p)) if title else root
    began = time.monotonic()
    victim.kill()
    _, alive = psutil.wait_procs(family, timeout=PATIENCE)
    survivors = [_title(p) for p in alive if p.is_running()]
    return {"seconds_until_all_ended": round(time.monotonic() - began, 1), "survivors": survivors}


def _title(process: psutil.Process) -> str:
    """The command without the directory of its program, or what the process calls itself."""
    program, *arguments = process.cmdline() or [""]
    return " ".join([Path(program).name, *arguments]).strip()[:80]
