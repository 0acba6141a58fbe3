"""A run that is killed at any moment and resumed gives the bytes of a run that was not."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_text import add_tokenizer, write_text
from vllm_spense.format.manifest import MANIFEST_NAME, check_manifest, write_manifest
from vllm_spense.pruning import PruneConfig, PruneProgress, pipeline, prune
from vllm_spense.pruning.layer import LayerPruner
from vllm_spense.pruning.resume import ResumeError, WorkDirectory, work_path

LAYERS = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        mlp_bias=True,
        attention_bias=True,
    )
    torch.manual_seed(0)
    network = LlamaForCausalLM(config)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
        else:
            torch.nn.init.normal_(parameter, 0, 2.5 * parameter.shape[1] ** -0.5)
    out = tmp_path_factory.mktemp("source") / "model"
    network.to(torch.bfloat16).save_pretrained(out)
    return add_tokenizer(out)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def options(text: Path | None, **changes: Any) -> PruneConfig:
    calibration = None if text is None else str(text)
    return PruneConfig(**({"calibration": calibration, "num_samples": 8, "seq_len": 96} | changes))


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of an uninterrupted run, with the default preset: its costs have to survive, too."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prune(model, out, options(text))
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    return files(out)


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def differing(out: Path, whole: dict[str, bytes]) -> list[str]:
    found = files(out)
    return sorted(n for n in found.keys() | whole.keys() if found.get(n) != whole.get(n))


def assert_same(out: Path, whole: dict[str, bytes]) -> None:
    assert differing(out, whole) == []
    assert [p.name for p in out.parent.iterdir()] == [out.name], "nothing but OUT is left"
    check_manifest(out)


def stop_after(layer: int, stage: str = "layers") -> Callable[[PruneProgress], None]:
    def stop(event: PruneProgress) -> None:
        if (event.stage, event.layer) == (stage, layer):
            raise KeyboardInterrupt

    return stop


def interrupt(model: Path, out: Path, config: PruneConfig, after: int) -> None:
    """Run until layer ``after`` is finished, then Ctrl-C."""

    with pytest.raises(KeyboardInterrupt) as caught:
        prune(model, out, config, stop_after(after))
    assert f"{after} finished layers are kept" in caught.value.__notes__[0]
    assert "--resume" in caught.value.__notes__[0]
    assert not out.exists()


# -- SIGKILL -------------------------------------------------------------------------------------


SLOWLY = """
import os, runpy, time
sync = os.fsync
os.fsync = lambda handle: (sync(handle), time.sleep(0.2))
runpy.run_module("vllm_spense.cli.app", run_name="__main__", alter_sys=True)
"""
"""The command, which pauses behind each file that has reached the disk: so a signal comes in time."""


def command(model: Path, out: Path, text: Path, *more: str) -> list[str]:
    options = ("--num-samples", "8", "--seq-len", "96", "--no-check")
    arguments = ("prune", model, "-o", out, "--calibration", text, *options, *more)
    return [sys.executable, "-c", SLOWLY, *map(str, arguments)]


def start_and_signal(arguments: list[str], when: Callable[[], bool], number: int) -> tuple[int, str]:
    """Exit status and errors of a command that gets a signal as soon as ``when()``."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not when():
        time.sleep(0.002)  # not a whole core: the process needs it
        assert process.poll() is None, f"it ended by itself: {process.communicate()[1]}"
        assert time.monotonic() < deadline
    process.send_signal(number)
    return process.wait(60), process.communicate()[1]


def test_the_command_survives_sigkill_and_ctrl_c(
    model: Path, text: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    work = work_path(out)
    code, _ = start_and_signal(command(model, out, text), (work / "state.json").exists, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (work / "choice.safetensors").exists(), "killed in the gradient pass"
    records = [work / f"layer-{i:05d}.json" for i in range(LAYERS)]
    resume = command(model, out, text, "--resume")
    code, _ = start_and_signal(command(model, out, text), records[0].exists, signal.SIGKILL)
    assert code == -signal.SIGKILL
    following = next(record for record in records if not record.exists())
    code, said = start_and_signal(resume, following.exists, signal.SIGINT)
    assert code == 130, said
    assert "--resume" in said
    assert "Traceback" not in said
    code, _ = start_and_signal(resume, (work / "checkpoint").exists, signal.SIGKILL)
    assert code == -signal.SIGKILL
    done = subprocess.run(resume, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "done before" in done.stdout
    assert_same(out, whole)


SERVER = multiprocessing.get_context("forkserver")  # children start in milliseconds


def child(model: Path, out: Path, text: Path, kill_at_sync: int) -> None:
    """One resumed run; it kills itself in front of its ``kill_at_sync``-th fsync (0: never)."""
    os.environ["OMP_NUM_THREADS"] = "1"
    fsync, calls = os.fsync, 0

    def deadly(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == kill_at_sync:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    os.fsync = deadly
    prune(model, out, options(text, resume=True))
    (out.parent.parent / "steps").write_text(str(calls))


def run_child(model: Path, out: Path, text: Path, kill_at_sync: int = 0, delay: float | None = None) -> int:
    SERVER.set_forkserver_preload(["transformers.models.llama.modeling_llama", "vllm_spense.pruning"])
    process = SERVER.Process(target=child, args=(model, out, text, kill_at_sync))
    process.start()
    process.join(delay)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode


def test_killed_at_random_moments(model: Path, text: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    generator = random.Random(0)
    for name in ("warm", "timed"):
        started = time.monotonic()
        assert run_child(model, tmp_path / name / "out", text) == 0
    usual = time.monotonic() - started
    kills = 0
    for i in range(12):  # fewer, unless the machine has become much faster since
        out = tmp_path / str(i) / "out"
        delays = (generator.uniform(0.2, 1) * usual for _ in range(2))  # the second one resumes
        kills += sum(run_child(model, out, text, delay=delay) != 0 for delay in delays if not out.exists())
        if work_path(out).exists() or not out.exists():
            assert run_child(model, out, text) == 0
        assert_same(out, whole)
        if kills > 3:
            break
    assert kills > 1


def test_killed_in_front_of_every_fifth_step_to_the_disk(
    model: Path, text: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Layers, records, assembling, the rename of OUT and what follows it: all are marked by an fsync."""
    assert run_child(model, tmp_path / "whole" / "out", text) == 0
    last = int((tmp_path / "steps").read_text())
    assert last > 4 * LAYERS
    for step in (3, *range(1, last, 5), last):  # 3: the costs of the gradient pass are half written
        out = tmp_path / str(step) / "out"
        assert run_child(model, out, text, kill_at_sync=step) == -signal.SIGKILL
        assert out.exists() == (step == last), "the last step is behind the rename"
        assert run_child(model, out, text) == 0
        assert_same(out, whole)


# -- going on ------------------------------------------------------------------------------------


def test_finished_layers_are_not_pruned_again(
    model: Path, text: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(model, out, options(text), after=3)
    pruned: list[int] = []
    plain = LayerPruner.prune
    monkeypatch.setattr(LayerPruner, "prune", lambda s, i, layer: pruned.append(i) or plain(s, i, layer))
    steps: list[PruneProgress] = []
    report = prune(model, out, options(text, resume=True), steps.append)
    assert pruned == [3, 4]
    assert [s.restored for s in steps] == [True] * 3 + [False] * 2
    assert steps[0].remaining > 0
    assert len(report.losses) == 3 * LAYERS
    assert_same(out, whole)


@pytest.mark.parametrize("step", [2, LAYERS + 3])
def test_ctrl_c_in_the_gradient_pass_leaves_nothing(
    step: int, model: Path, text: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        prune(model, tmp_path / "out", options(text), stop_after(step, "gradient"))
    assert not list(tmp_path.iterdir())
    prune(model, tmp_path / "out", options(text, resume=True))
    assert_same(tmp_path / "out", whole)


def test_the_comparison_sees_layers_that_were_not_restored(
    model: Path, text: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mutation: the later layers are calibrated behind the source's weights."""
    out = tmp_path / "out"
    interrupt(model, out, options(text), after=3)
    monkeypatch.setattr(pipeline, "restore_layer", lambda *_: None)
    prune(model, out, options(text, resume=True))
    changed = differing(out, whole)
    assert f"model-00004-of-0000{LAYERS + 1}.safetensors" in changed
    assert f"model-00003-of-0000{LAYERS + 1}.safetensors" not in changed


def test_bf16_checkpoints_and_data_free_runs(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"preset": "magnitude", "dense_ratio": 0.5}
    for name, config in (
        ("bf16", options(text, weight_dtype="bf16")),
        ("free", options(None, **free)),
    ):
        prune(model, tmp_path / f"{name}-whole", config)
        interrupt(model, tmp_path / name, config, after=2)
        prune(model, tmp_path / name, config.model_copy(update={"resume": True}))
        assert differing(tmp_path / name, files(tmp_path / f"{name}-whole")) == []


def test_activations_on_disk_change_nothing(
    model: Path, text: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(model, out, options(text, cache_activations="disk"), after=2)
    assert not list(work_path(out).glob("activations*")), "the files have no names"
    prune(model, out, options(text, resume=True))
    assert_same(out, whole)


def test_resume_with_nothing_to_resume_and_restart(
    model: Path, text: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    prune(model, tmp_path / "a" / "out", options(text, resume=True))
    assert_same(tmp_path / "a" / "out", whole)
    out = tmp_path / "b" / "out"
    interrupt(model, out, options(text, seed=1), after=2)
    prune(model, out, options(text, restart=True))
    assert_same(out, whole)
    with pytest.raises(ValueError, match="choose one"):
        options(text, resume=True, restart=True)


def test_an_old_checkpoint_stays_until_the_new_one_is_there(
    model: Path, text: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    write_manifest(out)
    with pytest.raises(KeyboardInterrupt):
        prune(model, out, options(text, overwrite=True), stop_after(2))
    assert sorted(p.name for p in out.iterdir()) == ["old", MANIFEST_NAME]
    with pytest.raises(FileExistsError, match="not empty"):
        prune(model, out, options(text, resume=True))
    prune(model, out, options(text, resume=True, overwrite=True))
    assert_same(out, whole)


def test_a_directory_of_somebodys_own_in_place_of_ours(model: Path, text: Path, tmp_path: Path) -> None:
    """Whatever it holds stays, also with --restart."""
    out = tmp_path / "out"
    work_path(out).mkdir()
    (work_path(out) / "diary.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(ResumeError, match=r"diary\.txt is not of an unfinished run"):
            prune(model, out, options(text, restart=restart))
    assert files(work_path(out)) == {"diary.txt": b"mine"}


def test_a_work_directory_on_another_disk(
    model: Path, text: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """A link that somebody put there for the space."""
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    out = tmp_path / "out"
    with tempfile.TemporaryDirectory(dir=shm) as other:
        work_path(out).symlink_to(other)
        prune(model, out, options(text))
        work_path(out).unlink()
    assert_same(out, whole)


# -- refusals ------------------------------------------------------------------------------------


def test_an_unfinished_run_is_not_thrown_away(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(model, out, options(text), after=2)
    with pytest.raises(ResumeError, match=r"2 finished layers.*--resume to continue.*--restart"):
        prune(model, out, options(text))
    with pytest.raises(ValueError, match="no such text file"):
        prune(model, out, options(tmp_path / "missing"))
    with WorkDirectory(out) as work:
        assert work.finished() == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, r"options\.seed was 0, is 1"),
        ({"dense_ratio": 0.25}, r"options\.dense_ratio was 0\.5, is 0\.25"),
        ({"num_samples": 4}, r"options\.num_samples was 8, is 4"),
        ("text", r"calibration\.sha256 was"),
        ("config", r"source\.config\.json was"),
        ("weights", r"source\.model\.safetensors\.mtime was"),
    ],
)
def test_other_inputs_are_named(
    change: str | dict[str, Any], named: str, model: Path, text: Path, tmp_path: Path
) -> None:
    source, words = tmp_path / "model", tmp_path / text.name
    source.mkdir()
    for path in model.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    words.write_bytes(text.read_bytes())
    out = tmp_path / "out"
    interrupt(source, out, options(words), after=1)
    if change == "text":
        words.write_text(words.read_text() + " w1")
    elif change == "config":
        (source / "config.json").write_text((source / "config.json").read_text() + "\n")
    elif change == "weights":
        os.utime(source / "model.safetensors", (1, 1))
    changes = change if isinstance(change, dict) else {}
    with pytest.raises(ResumeError, match=named + ".*--restart"):
        prune(source, out, options(words, resume=True, **changes))
    assert work_path(out).is_dir(), "the finished layer is still there"


def test_a_run_with_options_that_are_gone_is_not_continued(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(model, out, options(text), after=1)
    path = work_path(out) / "state.json"
    state = json.loads(path.read_text())
    assert state["fingerprint"]["options"]["rounding"] == "nearest"
    state["fingerprint"]["options"] |= {"rounding": "refit", "search_damping": True}
    path.write_text(json.dumps(state))
    named = r"options\.search_damping was True, is False; options\.rounding was refit, is nearest"
    with pytest.raises(ResumeError, match=named):
        prune(model, out, options(text, resume=True))


def test_two_runs_into_one_directory(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with WorkDirectory(out), pytest.raises(ResumeError, match="another process is pruning into"):
        prune(model, out, options(text))
    prune(model, out, options(text))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
