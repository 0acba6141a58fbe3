"""Start real vLLM engines in processes of their own and collect their greedy tokens."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.asset_paths import ASSETS

TIMEOUT, TIMEOUT_PER_ENGINE = 500, 40
"""Seconds that no run comes near on two free cores; machines are busy at times."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The engine runs where its caller does: the next one starts in two seconds instead of fifteen."""


def token_prompts(count: int = 6, vocab: int = 512, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab) for _ in range(rng.randrange(3, 20))] for _ in range(count)]


def torchvision() -> dict[str, str]:
    """The environment of a process that can import torchvision."""
    if importlib.util.find_spec("torchvision") is not None:
        return {}
    found = ASSETS.parent / "torchvision"
    if not found.is_dir():
        pytest.fail(f"{found} is missing: run `make setup`")
    before = os.environ.get("PYTHONPATH", "")
    return {
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent / "torchvision_on_cpus"), str(found), before]
        )
    }


@dataclass(frozen=True)
class Run:
    """Outcome of one engine: what ``vllm_generate.py`` answered, None if it failed; and what it printed."""

    answer: dict[str, Any] | None
    log: str

    @property
    def failed(self) -> bool:
        return self.answer is None

    @property
    def outputs(self) -> list[dict[str, Any]]:
        """Tokens and logprobs of each prompt. Two engines that failed are not equal: each is an error."""
        assert self.answer is not None, self.log[-6000:]
        return self.answer["outputs"]

    @property
    def tokens(self) -> list[list[int]]:
        return [o["tokens"] for o in self.outputs]

    @property
    def first_logprobs(self) -> list[float]:
        return [o["logprobs"][0] for o in self.outputs]


Request = dict[str, Any]


def generate(
    work: Path, requests: dict[str, Request], environment: dict[str, str] | None = None
) -> dict[str, Run]:
    """Run all requests in one process; a failing engine is an outcome, not an exception."""
    asked = work / f"{'+'.join(requests)[:100]}.requests.json"
    complete = {name: {"prompts": token_prompts(), "max_tokens": 24, **r} for name, r in requests.items()}
    asked.write_text(json.dumps(complete))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "vllm_generate.py"), str(asked), str(work)],
        env={**os.environ, **ENVIRONMENT, **ONE_PROCESS, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT + TIMEOUT_PER_ENGINE * len(requests),
    )

    def outcome(name: str) -> Run:
        answer, log = work / f"{name}.json", work / f"{name}.log"
        printed = done.stdout + (log.read_text() if log.exists() else "")
        return Run(json.loads(answer.read_text()) if answer.exists() else None, printed)

    return {name: outcome(name) for name in requests}


class Pool:
    """Runs named requests, those of a group one after another in one process, and two groups at a time (one
    where other tests run beside this one).

    A group starts when a test first asks for one of its runs: `pytest -k tp2` starts the engines of one.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        beside_others = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) > 1
        self.executor = ThreadPoolExecutor(max_workers=1 if beside_others else 2)
        self.groups: dict[str, dict[str, Request]] = {}
        self.environments: dict[str, dict[str, str]] = {}
        self.futures: dict[str, Future[dict[str, Run]]] = {}

    def add(self, group: str, name: str, request: Request) -> None:
        """Declare a run: ``vllm_generate.py``'s request."""
        assert all(name not in requests for requests in self.groups.values())
        self.groups.setdefault(group, {})[name] = request

    def environment(self, group: str, **variables: str) -> None:
        """Additions to the environment of a group's process."""
        self.environments[group] = variables

    def start(self, *groups: str) -> None:
        """Begin with these groups already now."""
        for group in groups:
            if group not in self.futures:
                arguments = (self.work, self.groups[group], self.environments.get(group))
                self.futures[group] = self.executor.submit(generate, *arguments)

    def __getitem__(self, name: str) -> Run:
        group = next(group for group, requests in self.groups.items() if name in requests)
        self.start(group)
        return self.futures[group].result()[name]
