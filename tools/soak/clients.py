"""Clients of the soak test: streams of mixed lengths, aborted ones, malformed bodies, greedy probes."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

WORDS = ("the", "river", "city", "was", "built", "in", "1890", "and", "its", "people", "light", "music", "of")
MALFORMED: tuple[tuple[bytes, str], ...] = (
    (b"{", "not JSON"),
    (b"[]", "no object"),
    (b"\xff\xfe\x00", "not UTF-8"),
    (b'{"model": 3}', "model is a number"),
    (b'{"model": "nowhere", "prompt": "x"}', "another model"),
    (b'{"model": "spense", "prompt": "x", "max_tokens": -1}', "negative length"),
    (b'{"model": "spense", "prompt": "x", "temperature": "hot"}', "text for a number"),
    (b'{"model": "spense", "prompt": "' + b"a b " * 4000 + b'"}', "longer than the context"),
    (b'{"model": "spense", "prompt": [0, -1]}', "negative token"),
    (b'{"model": "spense", "prompt": [99999999]}', "token outside of the vocabulary"),
    (b'{"model": "spense", "prompt": "x", "n": 100000}', "far too many answers"),
    (b'{"model": "spense", "prompt": "x", "stop": {"a": 1}}', "object for a list"),
)
"""Bodies that a server must refuse with 4xx, and why."""


@dataclass
class Tally:
    """What happened so far. ``errors``: everything that no client asked for, with its circumstances."""

    done: Counter[str] = field(default_factory=Counter)
    chunks: int = 0
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Probe:
    """A prompt whose greedy answer is known."""

    prompt: str
    answer: str


class Clients:
    """Requests to ``http://127.0.0.1:port`` by model name ``spense``, counted in ``tally``."""

    def __init__(self, port: int, probes: list[Probe], seed: int = 0) -> None:
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300, limits=limits)
        self.probes = probes
        self.random = random.Random(seed)
        self.tally = Tally()

    async def run(self, count: int, seconds: float) -> None:
        """``count`` clients, each one request after the other, until the time is over."""
        end = asyncio.get_running_loop().time() + seconds
        await asyncio.gather(*(self._client(end) for _ in range(count)))
        await self.http.aclose()

    async def _client(self, end: float) -> None:
        kinds = {"stream": 12, "abort": 4, "malformed": 2, "probe": 2}
        while asyncio.get_running_loop().time() < end:
            (kind,) = self.random.choices(list(kinds), list(kinds.values()))
            try:
                await getattr(self, kind)()
                self.tally.done[kind] += 1
            except Exception as error:  # whatever it is: it is what this test looks for
                self.tally.errors.append(f"{kind}: {type(error).__name__}: {str(error)[:300]}")

    # -- kinds of requests -----------------------------------------------------------------------

    async def stream(self) -> None:
        """Prompt and answer of mixed lengths; a complete stream has its last chunk and at least one token."""
        body = self._body(max_tokens=self.random.choice((1, 4, 16, 64)))
        chunks = [chunk async for chunk in self._stream(body)]
        self.tally.chunks += len(chunks)
        finish = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
        if not finish or finish[-1] not in ("length", "stop"):
            raise AssertionError(f"the stream ended without a reason: {finish[-3:]}")

    async def abort(self) -> None:
        """Hang up in the middle of a long answer."""
        wanted, seen = self.random.randrange(4), 0
        async for _ in self._stream(self._body(max_tokens=200, ignore_eos=True)):
            seen += 1
            if seen > wanted:
                return
        raise AssertionError(f"the answer was over after {seen} chunks")

    async def malformed(self) -> None:
        body, what = self.random.choice(MALFORMED)
        answer = await self.http.post(
            "/v1/completions", content=body, headers={"Content-Type": "application/json"}
        )
        if not 400 <= answer.status_code < 500:
            raise AssertionError(f"{what}: status {answer.status_code}: {answer.text[:200]}")

    async def probe(self) -> None:
        probe = self.random.choice(self.probes)
        answer = await self.answer(probe.prompt)
        if answer != probe.answer:
            raise AssertionError(f"{probe.prompt!r}: {answer!r} instead of {probe.answer!r}")

    async def answer(self, prompt: str) -> str:
        """The greedy answer to ``prompt``, 12 tokens."""
        body = {"model": "spense", "prompt": prompt, "temperature": 0, "max_tokens": 12}
        answer = await self.http.post("/v1/completions", json=body)
        answer.raise_for_status()
        return answer.json()["choices"][0]["text"]

    def _body(self, **more: Any) -> dict[str, Any]:
        words = self.random.choices(WORDS, k=self.random.choice((1, 8, 40, 150)))
        sampled = {"temperature": 0.8, "seed": self.random.randrange(1 << 30)}
        return {"model": "spense", "prompt": " ".join(words), "stream": True} | sampled | more

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise AssertionError(f"status {answer.status_code}: {(await answer.aread())[:200]!r}")
            async for line in answer.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data: "))
