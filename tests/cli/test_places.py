"""Where people keep their files: nothing of theirs is lost, and every name, mount and locale works.

All commands run here on one tiny model, in this process where that shows the same.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vllm_spense
from tests.mounts import run_with_mount
from tests.tiny import make_llama
from tests.tiny_text import add_tokenizer, write_text
from vllm_spense import verify
from vllm_spense.cli.app import main
from vllm_spense.format.manifest import read_manifest
from vllm_spense.pruning import PruneConfig, PruneProgress, prune

SIZES = ("--num-samples", "4", "--seq-len", "64", "--preset", "spensegpt+")
TEMPLATE = "additional_chat_templates/tool_use.jinja"
POOLING = "1_Pooling/config.json"

Spense = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with folders of its own, a text, and what a run makes of them."""
    root = tmp_path_factory.mktemp("places")
    dense = add_tokenizer(make_llama(root / "dense"))
    for name in (TEMPLATE, POOLING):
        (dense / name).parent.mkdir()
        (dense / name).write_text(f"{{{name}}}")
    write_text(root / "text.txt")
    prune(dense, root / "pruned", options(root))
    return root


def options(root: Path, **changes: Any) -> PruneConfig:
    usual = {"preset": "spensegpt+", "calibration": str(root / "text.txt"), "num_samples": 4, "seq_len": 64}
    return PruneConfig(**(usual | changes))


@pytest.fixture
def spense(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Spense:
    """Run the command as its entry point does: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["spense", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        return code, *capsys.readouterr()

    return run


def tree(directory: Path) -> dict[str, bytes]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in found}


# -- nothing is lost -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("prune {root}/dense -o {root}/dense --calibration {root}/text.txt", "dense is an input"),
        (
            "prune {root}/dense -o {root} --calibration {root}/text.txt",
            "holds {root}/dense, an input of this",
        ),
        ("prune {root}/dense -o {root}/texts --calibration {root}/texts/a.txt", "holds {root}/texts/a.txt"),
        (
            "prune {root}/dense -o {root}/mine --calibration {root}/text.txt",
            "no checkpoint that Spense",
        ),
        ("export {root}/pruned -o {root}/pruned", "pruned is an input of this command"),
        ("export {root}/pruned -o {root}", "holds {root}/pruned, an input of this command"),
        ("export {root}/pruned -o {root}/mine", "no checkpoint that Spense"),
        ("recover {root}/pruned -o {root}/pruned {more}", "pruned is an input of this command"),
        ("recover {root}/pruned -o {root}/dense {more}", "dense is an input of this command"),
        ("recover {root}/pruned -o {root}/mine {more}", "no checkpoint that Spense"),
        ("sparsify {root}/dense -o {root}/dense --calibration {root}/text.txt", "dense is an input"),
        ("sparsify {root}/dense -o {root}/mine --calibration {root}/text.txt", "no checkpoint that Spense"),
    ],
)
def test_overwrite_replaces_only_checkpoints_of_ours(
    root: Path, spense: Spense, arguments: str, words: str
) -> None:
    (root / "mine").mkdir(exist_ok=True)
    (root / "mine" / "thesis.tex").write_text("years of work")
    (root / "texts").mkdir(exist_ok=True)
    write_text(root / "texts" / "a.txt")
    more = f"--dense {root}/dense --calibration {root}/text.txt"
    before = tree(root)
    code, _, said = spense(*arguments.format(root=root, more=more).split(), "--overwrite")
    assert code == 1
    assert words.format(root=root) in said
    assert "choose another output directory" in said
    assert len(said.splitlines()) == 1
    assert tree(root) == before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("picture.png", b"\x89PNG\r\n\x1a\n my holidays", "was not drawn by this command"),
        ("config.json", b"{}", "choose a name that ends with .png"),
    ],
)
def test_a_plot_replaces_only_plots_of_ours(
    root: Path, tmp_path: Path, spense: Spense, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    for command in ("inspect", "plan"):
        code, _, said = spense(command, root / "pruned", "--plot", tmp_path / name)
        assert code == 1
        assert words in said
        assert tree(tmp_path) == {name: content}
        for _ in range(2):  # the second replaces the first
            assert spense(command, root / "pruned", "--plot", tmp_path / f"{command}.png")[0] == 0
        assert set(tree(tmp_path)) == {name, f"{command}.png"}
        (tmp_path / f"{command}.png").unlink()


# -- nothing is left behind ----------------------------------------------------------------------


def test_folders_that_serving_needs_come_along(root: Path, tmp_path: Path, spense: Spense) -> None:
    """Through every command that writes a checkpoint, and the manifest knows them."""
    more = f"--dense {root}/dense --calibration {root}/text.txt --steps 1 --seq-len 32".split()
    assert spense("export", root / "pruned", "-o", tmp_path / "export")[0] == 0
    assert spense("recover", root / "pruned", "-o", tmp_path / "recovered", *more)[0] == 0
    for directory in (root / "pruned", tmp_path / "export", tmp_path / "recovered"):
        for name in (TEMPLATE, POOLING):
            assert (directory / name).read_text() == f"{{{name}}}"
        assert {TEMPLATE, POOLING} < set(read_manifest(directory))
    (tmp_path / "recovered" / TEMPLATE).write_text("damaged")
    code, _, said = spense("verify", tmp_path / "recovered")
    assert code == 1
    assert TEMPLATE in said


def test_they_come_from_the_hub_as_well(
    root: Path, tmp_path: Path, spense: Spense, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is not reached from here: its client's own filter chooses among the files of a model."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    hub, cache = root / "dense", tmp_path / "snapshot"
    others = ["LICENSE", "vocab.tiktoken", "pytorch_model.bin", "modeling_evil.py", "original/params.pth"]

    def download(name: str, **patterns: Any) -> str:
        for file in filter_repo_objects([*tree(hub), *others], **patterns):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            (cache / file).write_bytes((hub / file).read_bytes() if (hub / file).exists() else b"x")
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    text = ("--calibration", root / "text.txt")
    code, _, errors = spense("prune", "org/model", "-o", tmp_path / "out", *text, *SIZES, "--no-check")
    assert code == 0, errors
    assert set(tree(tmp_path / "out")) == {*tree(root / "pruned"), "LICENSE", "vocab.tiktoken"}
    assert set(tree(cache)) == {*tree(hub), "LICENSE", "vocab.tiktoken"}


# -- what would fail at the end fails at the start -----------------------------------------------


def steps_until_refused(root: Path, out: Path, match: str, **changes: Any) -> int:
    """Layers that were pruned before the error."""
    steps: list[PruneProgress] = []
    with pytest.raises((OSError, ValueError), match=match):
        prune(root / "dense", out, options(root, **changes), steps.append)
    return len(steps)


def test_a_file_that_cannot_be_copied(root: Path, tmp_path: Path) -> None:
    lost = root / "dense" / "additional_chat_templates" / "lost.jinja"
    lost.symlink_to(root / "gone")
    try:
        assert steps_until_refused(root, tmp_path / "out", r"lost\.jinja: the file cannot be read") == 0
    finally:
        lost.unlink()
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_renames_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "rename", refuse)
    match = r"out cannot be written \(Operation not permitted\)"
    assert steps_until_refused(root, tmp_path / "out", match) == 0
    assert not list(tmp_path.iterdir())


def test_a_description_that_cannot_be_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise ValueError("no card for this model")

    monkeypatch.setattr("vllm_spense.pruning.output.model_card", fail)
    assert steps_until_refused(root, tmp_path / "out", "no card for this model") == 0
    assert not list(tmp_path.iterdir())


def test_recovery_writes_what_it_can_before_it_trains(
    root: Path, tmp_path: Path, spense: Spense, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise ValueError("no card for this model")

    monkeypatch.setattr("vllm_spense.recovery.output._card", fail)
    monkeypatch.setattr("vllm_spense.recovery.pipeline.train", lambda *_: pytest.fail("it trained"))
    more = f"--dense {root}/dense --calibration {root}/text.txt --steps 1 --seq-len 32".split()
    code, _, said = spense("recover", root / "pruned", "-o", tmp_path / "out", *more)
    assert (code, "no card for this model" in said) == (1, True)
    assert not list(tmp_path.iterdir())


# -- any name ------------------------------------------------------------------------------------

NAMES = ["out[red] :smile: [bold]", "m[/]x $\\alpha_$ {0}", "it's -1 %s (ünï…×)"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_as_they_are(root: Path, tmp_path: Path, spense: Spense, name: str) -> None:
    """Brackets are no markup, colons no emoji, dollars no formulas, and no width breaks a path."""
    place = tmp_path / ("deep/" * 20) / name
    place.mkdir(parents=True)
    dense, text, out = place / "dense", place / f"{place.name}.txt", place / "out"
    dense.symlink_to(root / "dense")
    text.write_bytes((root / "text.txt").read_bytes())
    for command in (
        ("prune", dense, "-o", out, "--calibration", text, *SIZES),
        ("inspect", out),
        ("export", out, "-o", place / "export"),
    ):
        code, said, errors = spense(*command)
        assert code == 0, errors
        assert str(command[-1] if command[0] == "inspect" else command[command.index("-o") + 1]) in said
    assert text.name in (out / "README.md").read_text(encoding="utf-8")
    assert spense("verify", out)[0] == 0
    more = ("--dense", dense, "--calibration", text, "--steps", "1", "--seq-len", "32")
    code, said, errors = spense("recover", out, "-o", place / "recovered", *more)
    assert code == 0, errors
    assert str(place / "recovered") in said
    code, said, errors = spense("eval", out, "--text", text, "--seq-len", "64", "--max-tokens", "128")
    assert code == 0, errors
    code, said, errors = spense("tune", out, "--dry-run", "--tokens", "16")
    assert code == 0, errors
    for command, plot in (("inspect", out), ("plan", place / "out")):
        code, said, errors = spense(command, plot, "--plot", place / f"{command}.png")
        assert code == 0, errors
        assert str(place / f"{command}.png") in errors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "NAME"),
        ("verify", "NAME"),
        ("export", "NAME", "-o", "OUT"),
        ("eval", "NAME", "--text", "TEXT"),
        ("eval", "DENSE", "--text", "NAME"),
        ("recover", "NAME", "--calibration", "TEXT", "-o", "OUT"),
        ("prune", "NAME", "--calibration", "TEXT", "-o", "OUT"),
        ("prune", "DENSE", "--calibration", "NAME", "-o", "OUT"),
        ("plan", "NAME"),
        ("tune", "NAME", "--dry-run"),
    ],
)
def test_names_in_errors(
    root: Path, tmp_path: Path, spense: Spense, arguments: tuple[str, ...], name: str
) -> None:
    missing = tmp_path / name
    places = {"NAME": missing, "DENSE": root / "dense", "TEXT": root / "text.txt", "OUT": tmp_path / "out"}
    code, _, said = spense(*(places.get(word, word) for word in arguments))
    assert code == 1
    assert str(missing) in said.replace("\\\\", "\\")  # Python doubles them in some messages
    assert len(said.strip().splitlines()) == 1


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path, spense: Spense) -> None:
    code, _, said = spense("inspect", tmp_path / "a\nb\x1b[31mc\x07")
    assert code == 1
    assert len(said.splitlines()) == 1
    assert not {"\x1b", "\x07"} & set(said)
    code, _, said = spense("prune", "dense", "-o", "out", "--preset", "a[/]b")  # the parser's own error
    assert code == 2
    assert "a[/]b" in said


# -- any locale ----------------------------------------------------------------------------------

RUN = """
import json, sys
from vllm_spense.cli.app import main

for command in json.loads(sys.argv[1]):
    sys.argv = ["spense", *command]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""


def in_turn(*commands: tuple[object, ...]) -> list[str]:
    """One process for several commands: starting it takes longer than they do."""
    words = [[str(word) for word in command] for command in commands]
    return [sys.executable, "-c", RUN, json.dumps(words, ensure_ascii=False)]


def ascii_run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    return subprocess.run(command, capture_output=True, timeout=300, env=os.environ | locale)


def test_a_locale_without_utf_8(root: Path, tmp_path: Path) -> None:
    """All commands; what is in the files is what it is elsewhere."""
    dense, out, text = root / "dense", tmp_path / "out", tmp_path / "tëxt.txt"
    words = (root / "text.txt").read_text()
    text.write_text("\n\n".join([words, *["w1 w2 é… w3 " * 60] * 20]), "utf-8")
    few = ("--seq-len", 64, "--max-tokens", 128)
    # a rate that changes nothing: whether a step helps a random model depends on the CPU
    more = ("--dense", dense, "--calibration", text, "--steps", 1, "--seq-len", 32, "--learning-rate", 1e-9)
    done = ascii_run(
        in_turn(
            ("prune", dense, "-o", out, "--calibration", text, *SIZES),
            ("inspect", out),
            ("verify", out),
            ("eval", out, "--text", text, *few, "--continuation"),
            ("export", out, "-o", tmp_path / "export"),
            ("recover", out, "-o", tmp_path / "recovered", *more),
            ("verify", tmp_path / "recovered"),
            ("plan", out),
            ("plan", dense),
            ("prune", dense, "-o", tmp_path / "none", "--calibration", text, *SIZES, "--dry-run"),
        )
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    here = prune(dense, tmp_path / "here", options(root, calibration=str(text))).directory
    told = ("README.md", "spense_manifest.json")  # the card has an evaluation there
    assert {n: b for n, b in tree(out).items() if n not in told} == {
        n: b for n, b in tree(here).items() if n not in told
    }
    assert "from tëxt.txt (SHA-256" in (out / "README.md").read_text(encoding="utf-8")


def test_every_text_file_is_utf_8() -> None:
    """No call takes the locale's encoding."""
    for path in Path(vllm_spense.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", "open" if getattr(node.func, "id", "") == "open" else None)
            owner = getattr(getattr(node.func, "value", None), "id", None)
            binary = {"rb", "wb"} & {getattr(a, "value", None) for a in node.args}
            if name in ("open", "read_text", "write_text") and owner not in ("os", "self", "writer"):
                assert binary or "encoding" in [k.arg for k in node.keywords], f"{path}:{node.lineno}"


def test_a_model_whose_name_the_locale_cannot_read(root: Path, tmp_path: Path) -> None:
    """The tokenizer's library takes no such names, so that is said before any work."""
    dense = tmp_path / "modèle"
    dense.symlink_to(root / "dense")
    command = ("prune", dense, "-o", tmp_path / "out", "--calibration", root / "text.txt", *SIZES)
    done = ascii_run([sys.executable, "-m", "vllm_spense.cli.app", *map(str, command)])
    assert done.returncode == 1
    assert b"LC_ALL=C.UTF-8" in done.stderr.splitlines()[-1]
    assert b"layer" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["modèle"]


# -- mount points --------------------------------------------------------------------------------


def test_out_is_a_mount_point(root: Path, tmp_path: Path) -> None:
    """``docker run -v DATA:/out``: the bytes are those of any place, and nothing hidden stays in DATA."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    out.mkdir()
    text = ("--calibration", root / "text.txt")
    done = run_with_mount(
        *(data, out),
        in_turn(
            ("export", root / "pruned", "-o", out),
            ("prune", root / "dense", "-o", out, *text, *SIZES, "--no-check", "--overwrite"),
        ),
    )
    assert done.returncode == 0, done.stderr
    assert tree(data) == tree(root / "pruned")
    assert not [name for name in os.listdir(data) if name.startswith(".")]
    assert list(out.iterdir()) == []
    verify(data)
