"""lm_eval around our models: one error where it is missing, a real task where it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_llama, make_spense
from tests.tiny_text import add_tokenizer, write_text
from vllm_spense.evaluation import evaluate, load_model, load_tokenizer
from vllm_spense.evaluation.continuation import make_items, span_scores
from vllm_spense.evaluation.harness import Harness

TASK = """\
task: spans
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture(scope="module")
def spense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("harness")
    dense = add_tokenizer(make_llama(root / "dense"))
    config = dense / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": "w2"}))  # lm_eval needs one
    return make_spense(dense, root / "spense")


def write_task(directory: Path, count: int) -> tuple[Path, object]:
    """A task file over continuation items, and these items."""
    texts = [[(7 * i + j * j) % 11 for j in range(60)] for i in range(count)]
    items = make_items(texts, context=16, span=6)
    directory.mkdir()
    rows = []
    for context, spans, answer in zip(items.contexts, items.spans, items.answers, strict=True):
        choices = [" ".join(f"w{token}" for token in span) for span in spans.tolist()]
        text = " ".join(f"w{token}" for token in context.tolist())
        rows.append({"context": text, "choices": choices, "answer": int(answer)})
    data = directory / "items.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "spans.yaml").write_text(TASK.format(data=data))
    return directory, items


def test_without_lm_eval_there_is_one_clear_error(
    spense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"need the package lm_eval .* install vllm-spense\[eval\]"):
        Harness(["hellaswag"])
    text = write_text(tmp_path / "text.txt", 100)
    with pytest.raises(ImportError, match="lm_eval"):
        evaluate(spense, text, seq_len=32, tasks=["hellaswag"])


def test_without_lm_eval_the_command_says_how_to_install_it(spense: Path, tmp_path: Path) -> None:
    blocker = "import sys; sys.modules['lm_eval'] = None; from vllm_spense.cli.app import main; main()"
    arguments = ["eval", spense, "--text", write_text(tmp_path / "text.txt", 600), "--tasks", "a, b"]
    done = subprocess.run(
        [sys.executable, "-c", blocker, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "pip install vllm-spense[eval]" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_local_task_gives_the_accuracy_of_our_own_scores(spense: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    directory, items = write_task(tmp_path / "tasks", 20)
    model = load_model(spense)
    scores = Harness(["spans"], directory).run(model, load_tokenizer(spense))
    right = span_scores(model, items).argmax(-1) == items.answers
    assert scores["spans"]["acc"] == pytest.approx(float(right.double().mean()))
    assert set(scores["spans"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    result = evaluate(
        spense,
        write_text(tmp_path / "text.txt", 100),
        seq_len=32,
        tasks=["spans"],
        include_path=directory,
        limit=5,
    )
    assert result.tasks is not None
    assert result.tasks["spans"]["acc"] == pytest.approx(float(right[:5].double().mean()))


def test_unknown_tasks_and_missing_data(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match="no task no_such_task"):
        Harness(["no_such_task"])
    directory, _ = write_task(tmp_path / "tasks", 20)
    (directory / "items.jsonl").unlink()
    with pytest.raises(ValueError, match="the data of task spans cannot be had"):
        Harness(["spans"], directory)
