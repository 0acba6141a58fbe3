"""Text of every kind that people bring: what is read is what is meant, or it is refused by file and row."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from transformers import AutoTokenizer

from tests.tiny import make_llama
from tests.tiny_text import add_tokenizer
from vllm_spense.evaluation import evaluate
from vllm_spense.format import Checkpoint
from vllm_spense.pruning import PruneConfig, prune
from vllm_spense.text import Beginning, TextRecord, find_sources
from vllm_spense.text.reading import Text
from vllm_spense.text.sources import Dataset, File

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [end]\n{% endfor %}"
FIRST, SECOND = "Rain “fell”.\nAll day.", "Sun."
WHOLE = f"{FIRST}\n\n{SECOND}"
ROWS = [{"text": FIRST}, {"text": SECOND}]
CHATS = [
    [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Yes."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sun?"}],
]
RENDERED = "[user] Rain? [end]\n[assistant] Yes. [end]\n[system] Be brief. [end]\n[user] Sun? [end]\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = AutoTokenizer.from_pretrained(add_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    found.chat_template = TEMPLATE
    return found


def read(given: Any, tokenizer: Any, column: str | None = None) -> tuple[str, TextRecord]:
    text = Text(find_sources(given), tokenizer, column)
    return "".join(text.chunks()), text.record()


def lines(rows: list[Any], end: str = "\n") -> str:
    return "".join(json.dumps(row) + end for row in rows)


def packed(rows: list[dict[str, Any]], **options: Any) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


PLAIN: dict[str, bytes] = {
    "a.txt": WHOLE.encode(),
    "crlf.txt": WHOLE.replace("\n", "\r\n").encode(),
    "cr.txt": WHOLE.replace("\n", "\r").encode(),
    "mark.txt": WHOLE.encode("utf-8-sig"),
    "mark-crlf.txt": WHOLE.replace("\n", "\r\n").encode("utf-8-sig"),
    "a.txt.gz": gzip.compress(WHOLE.encode(), mtime=0),
    "no-suffix": WHOLE.encode(),
    "packed-without-suffix": gzip.compress(WHOLE.encode(), mtime=0),
    "a.md": WHOLE.encode(),
}
FILES = PLAIN | {
    "a.jsonl": lines(ROWS).encode(),
    "a.ndjson": lines(ROWS).encode(),
    "A.JSONL": lines(ROWS).encode(),
    "no-end.jsonl": lines(ROWS).rstrip().encode(),
    "mark.jsonl": lines(ROWS, "\r\n").encode("utf-8-sig"),
    "blank.jsonl": (
        "\n" + lines([ROWS[0], {"text": ""}, {"text": " \n"}, {"text": None}], "\n\n") + lines(ROWS[1:])
    ).encode(),
    "a.jsonl.gz": gzip.compress(lines(ROWS).encode()),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "compact.json": json.dumps(ROWS).encode(),
    "mark.json": json.dumps(ROWS).encode("utf-8-sig"),
    "object.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "object-lines.json": json.dumps({"version": [1, 2], "data": ROWS}, indent=2).encode(),
    "lines.json": lines(ROWS).encode(),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows-without-suffix": lines(ROWS).encode(),
    "list-without-suffix": json.dumps(ROWS, indent=1).encode(),
    "a.parquet": packed(ROWS),
    "groups.parquet": packed([*ROWS[:1], {"text": None}, *ROWS[1:]], row_group_size=1),
    "columns.parquet": packed([{"id": i, "text": row["text"], "url": ""} for i, row in enumerate(ROWS)]),
    "train-00000-of-00001": packed(ROWS),
    "one-row.json": json.dumps({"text": WHOLE, "tags": [{"a": 1}]}).encode(),
}
"""Files that hold the same text."""


@pytest.mark.parametrize("name", FILES)
def test_the_same_text(name: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    text, record = read(path, tokenizer)
    assert text == WHOLE
    assert record.source == name
    assert record.sha256 == hashlib.sha256(FILES[name]).hexdigest()
    if name in PLAIN:
        assert record.dump() == {"source": name, "sha256": record.sha256}
    else:
        assert (record.column, record.documents) == ("text", 1 if "one-row" in name else 2)


@pytest.mark.parametrize("name", [name for name in FILES if "parquet" not in name and "00000" not in name])
@pytest.mark.parametrize("way", ["standard input", "pipe"])
def test_the_same_text_from_a_pipe(
    way: str, name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``-``, and what a shell makes of ``<(zcat text.gz)``; there is no suffix to go by."""
    if name in ("object.json", "compact.json", "object-lines.json", "one-row.json", "A.JSONL"):
        pass
    ours, theirs = os.pipe()

    def feed() -> None:
        with open(theirs, "wb") as pipe:
            pipe.write(FILES[name])

    thread = threading.Thread(target=feed)
    thread.start()
    if way == "standard input":
        with open(ours) as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            text, record = read("-", tokenizer)
        assert record.source == "-"
    else:
        text, record = read(f"/dev/fd/{ours}", tokenizer)
        os.close(ours)
    thread.join()
    assert text == WHOLE
    assert record.sha256 == hashlib.sha256(FILES[name]).hexdigest()


def sharegpt(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in chat]


CHAT_FILES: dict[str, tuple[bytes, str]] = {
    "messages.jsonl": (lines([{"id": 1, "messages": chat} for chat in CHATS]).encode(), "messages"),
    "messages.parquet": (packed([{"messages": chat, "id": 1} for chat in CHATS]), "messages"),
    "empty.jsonl": (lines([{"messages": m} for m in ([], CHATS[0], None, CHATS[1])]).encode(), "messages"),
    "sharegpt.json": (
        json.dumps([{"conversations": sharegpt(chat)} for chat in CHATS]).encode(),
        "conversations",
    ),
    "pairs.jsonl": (
        lines([{"prompt": chat[:1], "completion": chat[1:]} for chat in CHATS]).encode(),
        "prompt+completion",
    ),
}


@pytest.mark.parametrize("name", CHAT_FILES)
def test_chats_are_what_the_template_makes_of_them(name: str, tokenizer: Any, tmp_path: Path) -> None:
    content, column = CHAT_FILES[name]
    (tmp_path / name).write_bytes(content)
    text, record = read(tmp_path / name, tokenizer)
    assert text == RENDERED == "".join(tokenizer.apply_chat_template(c, tokenize=False) for c in CHATS)
    assert record.dump() == {
        "source": name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "column": column,
        "documents": 2,
    }
    assert Beginning(tmp_path / name, tokenizer).documents() == [
        tokenizer.apply_chat_template(c, tokenize=False) for c in CHATS
    ]


def test_prompts_and_completions_as_plain_text(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        lines([{"prompt": "2 + 2 =", "completion": " 4", "k": 1}, {"prompt": "a", "completion": "b"}])
    )
    assert read(path, tokenizer)[0] == "2 + 2 = 4\n\nab"


def test_the_column_can_be_chosen(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"text": "x", "messages": CHATS[0], "answer": "y", "dialogue": CHATS[0]}]))
    assert read(path, tokenizer)[0] == "x"
    assert read(path, tokenizer, "answer")[0] == "y"
    for chat in ("messages", "dialogue"):
        assert read(path, tokenizer, chat)[0] == tokenizer.apply_chat_template(CHATS[0], tokenize=False)
    assert read(path, tokenizer, "answer")[1].column == "answer"


def test_several_files_and_folders(tokenizer: Any, tmp_path: Path) -> None:
    """In the order given, and by name within a folder; hidden files and README.md are no text."""
    folder = tmp_path / "data"
    (folder / "deep" / ".cache").mkdir(parents=True)
    for name, content in {
        "b.txt": "B\n",
        "a.jsonl": lines([{"text": "A1"}, {"text": "A2"}]),
        "deep/c.json": json.dumps([{"messages": CHATS[0]}]),
        "deep/d.jsonl": lines([{"messages": CHATS[1]}]),
        "README.md": "no",
        ".gitattributes": "no",
        "deep/.cache/x.txt": "no",
    }.items():
        (folder / name).write_text(content)
    (tmp_path / "last.txt").write_text("Z")
    text, record = read((folder, tmp_path / "last.txt"), tokenizer)
    assert text == f"A1\n\nA2\n\nB\n\n\n{RENDERED}\n\nZ"
    names = ["a.jsonl", "b.txt", "c.json", "d.jsonl", "last.txt"]
    content = b"".join(sorted(folder.rglob(n))[0].read_bytes() for n in names[:4]) + b"Z"
    assert record == TextRecord(names, hashlib.sha256(content).hexdigest(), "text, messages", 6)
    assert record.names == "a.jsonl, b.txt, c.json, d.jsonl, … (5 files)"


def test_long_rows_and_long_lines(tokenizer: Any, tmp_path: Path) -> None:
    """Longer than what is read at once, with characters of several bytes across the borders."""
    long = "w1 “é” 🌧 " * 300_000
    for name, content in {"a.txt": long, "a.jsonl": lines([{"text": long}])}.items():
        (tmp_path / name).write_text(content)
        assert read(tmp_path / name, tokenizer)[0] == long


REFUSED: list[tuple[str, bytes, str]] = [
    ("a.csv", b"text,label\nRain,1\n", r"\.csv files are not read as text; give \.txt, \.jsonl"),
    ("a.tsv.gz", b"", r"\.tsv files are not read"),
    (
        "a.jsonl",
        lines([{"text": "a"}, {"question": "b", "answer": "c"}]).encode(),
        r"row 2: .*question, answer.*--text-column",
    ),
    ("a.jsonl", b'{"text": "a"}\n\n["text"]\n', "row 3: an object with columns"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b\n', "row 2: this is no JSON"),
    ("a.jsonl", b"Rain fell all day.\n", "row 1: this is no JSON"),
    ("a.jsonl", b'{"text": 3}\n', "row 1: column text: text or a list of messages was expected, not int"),
    ("a.jsonl", b'{"text": ["a", "b"]}\n', "row 1: a message needs role and content"),
    ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', "row 1: a message needs role and content"),
    ("a.jsonl", b'{"text": "\\ud83c"}\n', "row 1: half a surrogate pair"),
    ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
    ("a.jsonl", b"[" * 100_000, "this is no JSON"),
    (
        "config.json",
        json.dumps({"architectures": ["X"], "hidden_size": 4}).encode(),
        "row 1: .*architectures, hidden_size",
    ),
    ("a.json", b'{"data": [{"text": "a"}]', "this is no JSON"),
    ("a.json", b'"text"', "holds no rows"),
    ("a.json", b'["a", "b"]', "row 1: an object with columns"),
    ("a.json", json.dumps({"train": ROWS, "test": ROWS}).encode(), "row 1: .*train, test"),
    ("a.json", b"", "this is no JSON"),
    ("tokenizer", b'{"version": "1.0", "truncation": null', r"this is no JSON .*needs the suffix \.txt"),
    ("a.bin", bytes(range(256)), "not UTF-8"),
    ("a.bin", b"abc\0def", "binary file"),
    ("a.txt", WHOLE.encode("utf-16"), "not UTF-8.*UTF-16"),
    ("a.txt", "Straße".encode("latin-1"), "not UTF-8"),
    ("a.txt.gz", gzip.compress(WHOLE.encode(), mtime=0)[:-9], "the gzip file is damaged"),
    ("a.gz", gzip.compress(WHOLE.encode() * 9, mtime=0)[:20] + b"x" * 30, "the gzip file is damaged"),
    ("a.parquet", b"PAR1 and no more", "the parquet file cannot be read"),
    ("a.parquet", packed([{"question": "a"}]), r"a\.parquet: there is no column text.*question"),
    ("a.zip", b"PK\x03\x04\0\0", "binary file"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_what_is_refused(name: str, content: bytes, message: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(path, tokenizer)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_chats_need_a_template_that_takes_them(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"messages": CHATS[0]}, {"messages": CHATS[1]}]))
    bare = AutoTokenizer.from_pretrained(add_tokenizer(tmp_path / "bare"))
    with pytest.raises(ValueError, match=r"row 1: .*no chat template; give a column of plain text"):
        read(path, bare)
    bare.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    )
    with pytest.raises(ValueError, match=r"row 2: .*chat template does not take this chat \(no system\)"):
        read(path, bare)
    with pytest.raises(ValueError, match=r"row 1: there is no column 'chat' .*--text-column.* messages"):
        read(path, tokenizer, "chat")


def test_places_that_hold_no_text(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    for given, message in (
        (tmp_path / "missing", "missing: no such text file"),
        ("", "no such text file"),
        (tmp_path / "empty", "the folder holds no text"),
        (tmp_path / "model", r"model\.safetensors: of a folder only"),
        (("-", "-"), "only once"),
        ((), "no text is given"),
    ):
        with pytest.raises(ValueError, match=message):
            find_sources(given)


def test_parquet_does_not_come_through_a_pipe(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(packed(ROWS))))
    with pytest.raises(ValueError, match="standard input: parquet cannot be read from a pipe"):
        read("-", tokenizer)


def test_no_standard_input(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a desktop or a service; of a terminal the same is said."""
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="no file and no pipe"):
        read("-", tokenizer)


def test_without_pyarrow_the_error_says_how_to_get_it(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(packed(ROWS))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a\.parquet: .*pip install vllm-spense\[data\]"):
        read(tmp_path / "a.parquet", tokenizer)


# -- hub -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "config", "split"),
    [
        ("org/name", None, "train"),
        ("org/name:en", "en", "train"),
        ("org/name:en:test", "en", "test"),
        ("org/name::test[:10%]", None, "test[:10%]"),
    ],
)
def test_datasets_of_the_hub(given: str, config: str | None, split: str) -> None:
    assert find_sources(given) == [Dataset(given, "org/name", config, split)]


def test_a_dataset_without_the_package(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"org/name:en: .*needs the package datasets"):
        read("org/name:en", tokenizer)


def test_rows_of_a_dataset(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package takes a folder for a dataset of the hub, so this needs no network."""
    pytest.importorskip("datasets")
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(lines([{**row, "id": 1} for row in ROWS]))
    (folder / "test.jsonl").write_text(lines([{"messages": chat} for chat in CHATS]))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files: [{split: train, path: train.jsonl}]\n"
        "- config_name: chat\n  data_files: [{split: test, path: test.jsonl}]\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    for config, split, expected in (("en", "train", WHOLE), ("chat", "test", RENDERED)):
        text = Text([Dataset(f"org/name:{config}:{split}", "org/name", config, split)], tokenizer)
        assert "".join(text.chunks()) == expected
        record = text.record()
        assert record.sha256 == hashlib.sha256(expected.encode()).hexdigest()
        assert record.documents == 2
    with pytest.raises(ValueError, match="org/name:no: no such file, and not readable as a dataset"):
        "".join(Text([Dataset("org/name:no", "org/name", "no", "train")], tokenizer).chunks())


# -- commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = add_tokenizer(make_llama(tmp_path_factory.mktemp("reading") / "dense"))
    found = AutoTokenizer.from_pretrained(made)
    found.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    found.save_pretrained(made)
    return made


def chat_rows() -> list[dict[str, Any]]:
    said = [" ".join(f"w{(13 * i * j + j) % 512}" for j in range(1, 60)) for i in range(1, 21)]
    return [{"messages": [{"role": "user", "content": s}, {"role": "assistant", "content": s}]} for s in said]


def test_pruning_on_chats_equals_pruning_on_their_text(dense: Path, tmp_path: Path) -> None:
    rows = chat_rows()
    (tmp_path / "a.jsonl").write_text(lines(rows[:10]))
    (tmp_path / "b.jsonl").write_text(lines(rows[10:]))
    (tmp_path / "text.txt").write_text("".join(m["content"] + " " for row in rows for m in row["messages"]))
    options: dict[str, Any] = {"preset": "wanda", "num_samples": 8, "seq_len": 64, "dense_ratio": 0.75}
    given = {
        "chat": (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")),
        "text": str(tmp_path / "text.txt"),
    }
    for name, calibration in given.items():
        prune(dense, tmp_path / name, PruneConfig(calibration=calibration, **options))
    one, other = (Checkpoint(tmp_path / name) for name in given)
    assert sorted(one.tensors) == sorted(other.tensors)
    for name in one.tensors:
        assert one.load(name).view(torch.uint8).equal(other.load(name).view(torch.uint8))
    assert one.require_spense().provenance["calibration"]["documents"] == 20
    card = (tmp_path / "chat" / "README.md").read_text()
    assert "from a.jsonl, b.jsonl (SHA-256" in card
    assert "calibration=['a.jsonl', 'b.jsonl']" in card


def spense(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_spense.cli.app", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_eval_reads_standard_input_once(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, the reference's windows and the continuation task all come from what was read once."""
    (tmp_path / "chats.jsonl").write_text(lines(chat_rows()))
    options: dict[str, Any] = {
        "seq_len": 64,
        "max_tokens": 256,
        "reference": dense,
        "with_continuation": True,
    }
    named = evaluate(dense, tmp_path / "chats.jsonl", **options)
    with (tmp_path / "chats.jsonl").open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        piped = evaluate(dense, "-", **options)
    assert (piped.nll, piped.agreement, piped.continuation) == (
        named.nll,
        named.agreement,
        named.continuation,
    )


def test_the_command_refuses_in_one_line_before_any_work(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(lines([*chat_rows(), {"question": "a"}]))
    done = spense(
        *("prune", dense, "-o", tmp_path / "out", "--calibration", tmp_path / "bad.jsonl", "--seq-len", 64)
    )
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if not line.startswith("warning:")] == [
        f"error: {tmp_path / 'bad.jsonl'}, row 21: there is no column text, messages, conversations or "
        "prompt and completion, but question; name the one that holds the text (--text-column)"
    ]
    assert not (tmp_path / "out").exists()


def test_names_are_those_of_files() -> None:
    assert find_sources("-") == [File(None)]
    assert find_sources(__file__) == [File(Path(__file__))]
