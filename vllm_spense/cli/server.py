"""Start vLLM's OpenAI-compatible server as a child process, wait for it, stop it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ServerError(RuntimeError):
    """The server stopped or is not ready; the end of its log follows in lines of their own."""


@dataclass(frozen=True)
class Server:
    """A running server: ``http://127.0.0.1:port``, its first process, and the time it took to be ready."""

    port: int
    pid: int
    start_seconds: float

    def post(self, path: str, body: dict[str, Any], timeout: float = 300) -> dict[str, Any]:
        """POST JSON and return the JSON answer; ``RuntimeError`` with the server's words on failure."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.code} {error.read().decode(errors='replace')}") from None


def free_port() -> int:
    """A TCP port that is free on the loopback interface now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(
    model: Path,
    log: Path,
    *,
    port: int = 0,
    arguments: Sequence[str] = (),
    timeout: float = 600,
    waiting: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Server]:
    """Run the server on ``model`` until the block ends; its output goes to ``log``.

    Raises :class:`ServerError` with the end of the log when it stops or is not ready in ``timeout`` seconds.
    """
    port = port or free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    started = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            while not _ready(port):
                waited = time.monotonic() - started
                if process.poll() is not None or waited > timeout:
                    state = "stopped" if process.poll() is not None else f"not ready after {timeout:.0f} s"
                    said = log.read_text(encoding="utf-8", errors="replace")
                    tail = "\n".join(said.splitlines()[-25:])
                    raise ServerError(f"the server {state}; end of {log}:\n{tail}")
                waiting(waited)
                time.sleep(1)
            yield Server(port, process.pid, time.monotonic() - started)
        finally:
            _stop(process)


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def _stop(process: subprocess.Popen) -> None:
    """Ask the whole process group to end, then insist: engine and workers are its children."""
    for how, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        if how == signal.SIGTERM:
            time.sleep(1)
