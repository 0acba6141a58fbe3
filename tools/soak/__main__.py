"""``make soak``: the OpenAI-compatible server on a Spense checkpoint under many clients for minutes.

Passes if no request failed that should not, the server's memory did not grow over the second half, and the
greedy answers were the same before, during and after. Then kills worker, engine and server (-9), one per
start: the next server must answer as before, and of the first two no process may stay behind (vLLM itself
leaves engine and worker when its server is killed). Writes what was counted as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.common.results import ROOT, provenance, write
from tools.soak.clients import Clients, Probe
from tools.soak.faults import failed_fault, kill_each
from vllm_spense.cli.server import serve

PROMPTS = (
    "The capital of France is",
    "Water is made of hydrogen and",
    "The first president of the United States was",
    "One, two, three, four,",
    "The opposite of hot is",
    "Albert Einstein was a German-born theoretical",
)
GROWTH = 0.02
"""Largest growth of memory over the second half, relative: allocators keep what a new peak needed."""
ARGUMENTS = ("--served-model-name", "spense", "--max-model-len", "1024", "--max-num-seqs", "16")


class Memory:
    """Resident bytes of this process's children and theirs, read twice a second."""

    def __init__(self) -> None:
        self.readings: list[tuple[float, int]] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        stop = threading.Event()

        def read() -> None:
            began = time.monotonic()
            while not stop.wait(0.5):
                self.readings.append((time.monotonic() - began, resident()))

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def growth(self) -> float:
        """Relative growth from the mean over the eighth behind the middle to that over the last."""
        values = [size for _, size in self.readings]
        eighth = max(1, len(values) // 8)
        middle = values[len(values) // 2 :][:eighth]
        return (sum(values[-eighth:]) / eighth) / (sum(middle) / len(middle)) - 1


def resident() -> int:
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


async def soak(port: int, count: int, seconds: float) -> tuple[Clients, list[Probe], list[str]]:
    """Probes asked one by one; then all clients; then the probes again: their answers afterwards."""
    first = Clients(port, [])
    probes = [Probe(prompt, await first.answer(prompt)) for prompt in PROMPTS]
    await first.http.aclose()
    clients = Clients(port, probes)
    await clients.run(count, seconds)
    last = Clients(port, [])
    after = [await last.answer(prompt) for prompt in PROMPTS]
    await last.http.aclose()
    return clients, probes, after


def main() -> None:
    parser = argparse.ArgumentParser("python -m tools.soak", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Spense checkpoint with a tokenizer")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--log", type=Path, default=ROOT / "build" / "soak.log")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "soak.json")
    parser.add_argument("server", nargs="*", help="more arguments of the server, behind --")
    options = parser.parse_args()
    options.log.parent.mkdir(parents=True, exist_ok=True)
    memory = Memory()
    with serve(options.model, options.log, arguments=(*ARGUMENTS, *options.server)) as server:
        print(f"server ready after {server.start_seconds:.0f} s; {options.clients} clients", flush=True)
        with memory.watch():
            clients, probes, after = asyncio.run(soak(server.port, options.clients, options.minutes * 60))
    faults = kill_each(options.model, options.log, (*ARGUMENTS, *options.server), probes)
    tally, growth = clients.tally, memory.growth()
    changed = [p.prompt for p, answer in zip(probes, after, strict=True) if p.answer != answer]
    result = {
        "minutes": options.minutes,
        "clients": options.clients,
        "requests": dict(tally.done),
        "streamed_chunks": tally.chunks,
        "errors": tally.errors[:20],
        "error_count": len(tally.errors),
        "memory_growth_second_half": growth,
        "memory_mib": [
            [round(t), size >> 20] for t, size in memory.readings[:: max(1, len(memory.readings) // 60)]
        ],
        "changed_answers": changed,
        "faults": faults,
        "provenance": provenance(),
    }
    write(options.results, result)
    print(json.dumps({k: v for k, v in result.items() if k not in ("memory_mib", "provenance")}, indent=2))
    failed = tally.errors or changed or growth > GROWTH or any(map(failed_fault, faults))
    print("FAILED" if failed else "passed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
