"""Damaged checkpoints of bitsandbytes are refused in one line, whatever bytes they hold."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.format.bitsandbytes_damage import CASES, STATE
from tests.format.corruption_tools import CONFIG, GATE, WEIGHTS
from vllm_spense import export, inspect, verify
from vllm_spense.evaluation import load_model
from vllm_spense.format import CheckpointError
from vllm_spense.format.bitsandbytes import open_checkpoint, parse_state

FLIPS = 400


@pytest.fixture
def copy(tiny_bitsandbytes: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bitsandbytes, tmp_path / "copy")


def refused(run: Callable[..., object], *arguments: object, **options: object) -> bool:
    """Whether it is, in one printable line; any other error is this test's."""
    try:
        run(*arguments, **options)
    except CheckpointError as error:
        said = str(error)
    else:
        return False
    assert said.isprintable()
    return True


def test_the_undamaged_one_is_accepted(copy: Path) -> None:
    report = verify(copy)
    assert (report.modules, report.hashes_checked, report.architecture_checked) == (14, False, True)


@pytest.mark.parametrize("name", CASES)
def test_verify_refuses(name: str, copy: Path) -> None:
    case = CASES[name]
    case.damage(copy)
    with pytest.raises(CheckpointError, match=case.message) as caught:
        verify(copy)
    said = str(caught.value)
    assert re.search(case.where, said), said
    assert ". Fix: " in said
    assert said.isprintable()
    assert len(said) < 2000


@pytest.mark.parametrize("name", CASES)
def test_nobody_else_falls_over_it(name: str, copy: Path, tmp_path: Path) -> None:
    """What is no mistake to one of them may be let through, but nothing raises another error."""
    CASES[name].damage(copy)
    for run in (inspect, load_model, lambda directory: export(directory, tmp_path / "out")):
        refused(run, copy)


def test_there_are_many_distinct_cases() -> None:
    assert len(CASES) >= 100
    assert len({case.message for case in CASES.values()}) >= 60


def test_a_flipped_byte_of_a_state_is_refused_or_another_state(tiny_bitsandbytes: Path) -> None:
    checkpoint = open_checkpoint(tiny_bitsandbytes)
    good = checkpoint.load(f"{GATE}.weight.{STATE}")
    dice, count = random.Random(0), 0
    for _ in range(FLIPS):
        bad = good.clone()
        bad[dice.randrange(len(bad))] ^= dice.randrange(1, 256)
        count += refused(parse_state, bad, module=GATE)
    assert count > 0.8 * FLIPS


def test_a_flipped_byte_of_a_header_is_refused_or_changes_nothing_that_counts(copy: Path) -> None:
    path = copy / WEIGHTS
    good = path.read_bytes()
    length = 8 + int.from_bytes(good[:8], "little")
    dice, count = random.Random(1), 0
    for _ in range(FLIPS):
        place = dice.randrange(length)
        bad = bytes([good[place] ^ dice.randrange(1, 256)])
        path.write_bytes(good[:place] + bad + good[place + 1 :])
        count += refused(open_checkpoint, copy)
    assert count > 0.8 * FLIPS


def test_a_flipped_byte_of_config_json(copy: Path) -> None:
    path = copy / CONFIG
    good = json.dumps(json.loads(path.read_text())["quantization_config"]).encode()
    dice = random.Random(2)
    for _ in range(FLIPS):
        place = dice.randrange(len(good))
        bad = good[:place] + bytes([good[place] ^ dice.randrange(1, 256)]) + good[place + 1 :]
        path.write_bytes(b'{"model_type": "llama", "quantization_config": ' + bad + b"}")
        refused(open_checkpoint, copy)


def test_flipped_codes_are_other_codes(copy: Path) -> None:
    """Of codes every byte is legal: without a manifest nobody can tell."""
    before = open_checkpoint(copy).module_weight(GATE)
    path = copy / WEIGHTS
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    data[8 + length + json.loads(data[8 : 8 + length])[f"{GATE}.weight"]["data_offsets"][0]] ^= 0xFF
    path.write_bytes(data)
    verify(copy)
    assert int((open_checkpoint(copy).module_weight(GATE) != before).sum()) == 2
    assert torch.isfinite(before).all()
