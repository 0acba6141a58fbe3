"""What ``spense prune`` does after writing: it runs the checkpoint and says what it saw."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import warnings
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.tiny import make_llama, make_spense
from tests.tiny_text import add_tokenizer, write_text
from vllm_spense.cli.progress import one_line_warnings
from vllm_spense.cli.trial import try_checkpoint
from vllm_spense.evaluation import load_model, trial
from vllm_spense.format.manifest import check_manifest
from vllm_spense.pruning import PruneConfig, PruneReport, prune
from vllm_spense.pruning.card import NOT_MEASURED
from vllm_spense.pruning.warnings import PruneWarning
from vllm_spense.text import TextEnd

OPTIONS: dict[str, Any] = {"dense_ratio": 0.75, "num_samples": 4, "seq_len": 64}
"""Of runs that have nothing to warn of."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make_llama(tmp_path_factory.mktemp("trial") / "dense"))


@pytest.fixture(scope="module")
def text(dense: Path) -> Path:
    return write_text(dense.parent / "text.txt")


@pytest.fixture
def report(dense: Path, text: Path, tmp_path: Path) -> PruneReport:
    return prune(dense, tmp_path / "out", PruneConfig(preset="spensegpt+", calibration=str(text), **OPTIONS))


def tried(report: PruneReport) -> str:
    """What is printed; warnings are left out."""
    output = StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruneWarning)
        try_checkpoint(report, Console(file=output))
    return output.getvalue()


def card(report: PruneReport) -> str:
    return (report.directory / "README.md").read_text()


@torch.inference_mode()
def test_perplexity_of_the_end_and_a_generation(report: PruneReport, text: Path) -> None:
    said = tried(report)
    assert report.text_end is not None
    ids = torch.tensor([int(word[1:]) for word in text.read_text().split()])
    end = ids[-len(report.text_end.ids) :]
    windows = end[: len(end) // 256 * 256].view(-1, 256)  # the model has no more positions
    model = load_model(report.directory)
    scores = model(windows).logits[:, :-1].double().log_softmax(-1)
    nll = -scores.gather(-1, windows[:, 1:, None]).mean()
    found = re.match(r"Perplexity ([\d.]+) on (\d+) tokens", said)
    assert found is not None
    assert float(found[1]) == pytest.approx(math.exp(nll), rel=1e-4)
    assert int(found[2]) == 255 * len(windows)
    assert "calibration has not seen" in said
    assert trial.PROMPT in said
    for line in said.splitlines():
        assert line in card(report)
    assert NOT_MEASURED not in card(report)
    check_manifest(report.directory)


def test_greedy_tokens_by_hand(report: PruneReport) -> None:
    model = load_model(report.directory)
    ids = torch.zeros(1, 5, dtype=torch.long)  # the words of the prompt are not in the vocabulary
    for _ in range(trial.NEW_TOKENS):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        if int(ids[0, -1]) == model.config.eos_token_id:
            break
    words = [f"w{i}" for i in ids[0, 5:].tolist()]
    assert (trial.try_out(report.directory).text or "").split() == words


def test_a_text_that_was_sampled_from_is_called_so(report: PruneReport) -> None:
    seen = PruneReport(**{**vars(report), "text_end": TextEnd(torch.arange(100), True)})
    assert "on 99 tokens at the end of the calibration text, parts of which calibration has used" in tried(
        seen
    )


def test_without_text_and_without_tokenizer(dense: Path, text: Path, tmp_path: Path) -> None:
    for name in ("free", "mute"):
        report = prune(dense, tmp_path / name, PruneConfig(preset="magnitude", dense_ratio=0.75))
        if name == "mute":
            for path in report.directory.glob("tokenizer*"):
                path.unlink()
        said = tried(report)
        assert "Perplexity" not in said
        assert ("Greedy" in said) == (name == "free")


def test_worse_than_guessing_is_a_warning_and_an_error_under_strict(report: PruneReport) -> None:
    """Random weights that are large are as sure as they are wrong."""
    with pytest.warns(PruneWarning, match=r"perplexity .* above that of guessing blindly among 512 tokens"):
        try_checkpoint(report, Console(file=StringIO()))
    strict = report.config.model_copy(update={"strict": True})
    with pytest.raises(ValueError, match=r"guessing blindly.*--strict"):
        try_checkpoint(PruneReport(**{**vars(report), "config": strict}), Console(file=StringIO()))
    check_manifest(report.directory)


@pytest.mark.parametrize("with_text", [True, False])
def test_numbers_that_are_not_finite(with_text: bool, dense: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = make_llama(tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state["lm_head.weight"][7, 3] = float("nan")
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    spense = make_spense(add_tokenizer(broken), tmp_path / "spense")
    with pytest.raises(RuntimeError, match="not finite" if with_text else "NaN or infinity"):
        trial.try_out(spense, torch.arange(64) if with_text else None)


def test_too_big_for_this_machine(report: PruneReport, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = sum(t.numel() for t in load_model(report.directory).state_dict().values())
    needed = trial.memory_needed(report.directory)
    assert 4 * parameters < needed < 8 * parameters
    assert trial.memory_available() > 100e6
    monkeypatch.setattr(trial, "memory_available", lambda: needed - 1)
    monkeypatch.setattr(trial, "try_out", lambda *_: pytest.fail("it was loaded"))
    assert "Not checked by running it: that takes 0.0 GB" in tried(report)
    assert NOT_MEASURED in card(report)


def test_warnings_are_lines_without_source_code() -> None:
    output = StringIO()
    with one_line_warnings(Console(file=output)):
        warnings.simplefilter("always")
        warnings.warn("the text is [short]", PruneWarning, stacklevel=1)
    assert output.getvalue() == "warning: the text is [short]\n"


def test_the_command(dense: Path, text: Path, tmp_path: Path) -> None:
    """Checked unless it is told not to; under --strict one line and exit code 1, and OUT is there."""
    sizes = ("--num-samples", "4", "--seq-len", "64", "--dense-ratio", "0.75", "--preset", "spensegpt+")

    def spense(out: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = ["prune", dense, "-o", tmp_path / out, "--calibration", text, *sizes, *more]
        arguments = [sys.executable, "-m", "vllm_spense.cli.app", *map(str, command)]
        return subprocess.run(arguments, capture_output=True, text=True, timeout=300)

    done = spense("quiet", "--no-check", "--strict")
    assert done.returncode == 0, done.stderr
    assert "Perplexity" not in done.stdout
    assert NOT_MEASURED in (tmp_path / "quiet" / "README.md").read_text()
    done = spense("strict", "--strict")
    assert done.returncode == 1
    assert "Perplexity" in done.stdout
    assert "guessing blindly" in done.stderr
    assert "Traceback" not in done.stderr
    check_manifest(tmp_path / "strict")
