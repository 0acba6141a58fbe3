"""Start real vLLM in processes of its own and collect its greedy tokens."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 400
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}


def token_prompts(count: int = 6, vocab: int = 512, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab) for _ in range(rng.randrange(3, 20))] for _ in range(count)]


@dataclass(frozen=True)
class Run:
    """Outcome of one vLLM process: per prompt the tokens and their logprobs, or what it printed."""

    outputs: list[dict[str, Any]] | None
    log: str

    @property
    def tokens(self) -> list[list[int]]:
        assert self.outputs is not None, self.log[-6000:]
        return [o["tokens"] for o in self.outputs]

    @property
    def first_logprobs(self) -> list[float]:
        assert self.outputs is not None, self.log[-6000:]
        return [o["logprobs"][0] for o in self.outputs]


def generate(
    work: Path, name: str, request: dict[str, Any], environment: dict[str, str] | None = None
) -> Run:
    """Run one request to completion; a failing engine is an outcome, not an exception."""
    asked, answered = work / f"{name}.request.json", work / f"{name}.response.json"
    asked.write_text(json.dumps({"prompts": token_prompts(), "max_tokens": 24, **request}))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "vllm_generate.py"), str(asked), str(answered)],
        env={**os.environ, **ENVIRONMENT, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    outputs = json.loads(answered.read_text()) if answered.exists() and done.returncode == 0 else None
    return Run(outputs, done.stdout)


class Pool:
    """Runs named requests, two at a time: the start-up of one engine keeps one core busy.

    A run starts when a test first asks for it or for its partner, so `pytest -k tp2` starts two engines.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.executor = ThreadPoolExecutor(max_workers=2)
        self.requests: dict[str, tuple[dict[str, Any], dict[str, str] | None]] = {}
        self.partners: dict[str, tuple[str, ...]] = {}
        self.futures: dict[str, Future[Run]] = {}

    def add(self, name: str, request: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        """Declare a run: ``vllm_generate.py``'s request and additions to the environment."""
        self.requests[name] = (request, environment)

    def together(self, *names: str) -> None:
        """These runs are started at the same time."""
        self.partners |= dict.fromkeys(names, names)

    def __getitem__(self, name: str) -> Run:
        for each in self.partners.get(name, (name,)):
            if each not in self.futures:
                self.futures[each] = self.executor.submit(generate, self.work, each, *self.requests[each])
        return self.futures[name].result()
