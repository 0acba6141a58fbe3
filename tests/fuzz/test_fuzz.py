"""A slice of the fuzzing campaign, the corpus of what earlier campaigns found, and proof that it can fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm_spense.format import Codecs

pytest.importorskip("vllm")
from tests.fuzz import bases, campaign, serving
from tests.fuzz.edits import Case, dump, make
from tests.fuzz.limits import ViolationError
from tests.fuzz.mutations import KINDS, Base
from tests.fuzz.oracle import ALLOWED, Oracle
from tests.fuzz.reading import e4m3

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.json"))
GATE = "model.layers.0.mlp.gate_proj"


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    work = tmp_path_factory.mktemp("fuzz")
    with serving.vllm_process(work / "store"):
        yield Oracle(bases.build(work), work)


@pytest.fixture(scope="module")
def known(oracle: Oracle) -> list[Base]:
    return [Base.read(name, directory) for name, directory in oracle.bases.items()]


@pytest.mark.parametrize("path", CORPUS, ids=lambda p: p.stem)
def test_what_was_found_stays_mended(path: Path, oracle: Oracle) -> None:
    assert oracle.judge(Case.parse(path.read_text())) in ALLOWED


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_of_every_kind(kind: str, oracle: Oracle, known: list[Base], tmp_path: Path) -> None:
    result = campaign.run(oracle, known, 16, 0, tmp_path, kinds=[kind])
    assert not result.violations, result.violations[0][0]
    assert result.total >= 8
    assert {outcome for _, outcome in result.counts} <= set(ALLOWED)


def test_the_same_seed_gives_the_same_cases(oracle: Oracle, known: list[Base], tmp_path: Path) -> None:
    seen: list[list[str]] = []
    for seed in (3, 3, 4):
        texts: list[str] = []
        judge = oracle.judge
        oracle.judge = lambda case, texts=texts: texts.append(case.text()) or "refused"  # type: ignore
        try:
            campaign.run(oracle, known, 40, seed, tmp_path, kinds=["together"])
        finally:
            oracle.judge = judge  # type: ignore
        seen.append(texts)
    assert seen[0] == seen[1] != seen[2]


# -- each of these breaks one check of the product, and the campaign must notice --------------------------


def skip_values(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The plugin and the tools no longer look at the values of one kind of tensor."""
    from vllm_spense.format import validate

    plain = validate.illegal_value

    def blind(short: str, tensor: torch.Tensor, codecs: Codecs) -> Any:
        return None if short == name else plain(short, tensor, codecs)

    monkeypatch.setattr(validate, "illegal_value", blind)


def skip_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_spense.format import manifest

    monkeypatch.setattr(manifest, "_raise_if_any", lambda *_: None)


def swap_nibbles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decompression that is wrong for one pattern of two values."""
    from vllm_spense.format.codecs import base

    plain = base.decompress

    def wrong(values: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
        return plain(values, torch.where(meta == 0x44, 0x48, meta))

    monkeypatch.setattr(base, "decompress", wrong)


def forget_json_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    from vllm_spense.format import checkpoint

    monkeypatch.setattr(checkpoint, "read_json", lambda path: json.loads(path.read_bytes()))


@pytest.mark.parametrize(
    ("kind", "breakage"),
    [
        ("payload sparse_meta", lambda m: skip_values(m, "sparse_meta")),
        ("payload sparse_values", lambda m: skip_values(m, "sparse_values")),
        ("payload dense_weight", skip_hashes),
        ("payload sparse_meta", swap_nibbles),
        ("JSON text", forget_json_errors),
    ],
    ids=lambda x: x if isinstance(x, str) else getattr(x, "__name__", ""),
)
def test_it_finds_a_check_that_is_missing(
    kind: str,
    breakage: Any,
    oracle: Oracle,
    known: list[Base],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    breakage(monkeypatch)
    result = campaign.run(oracle, known, 150, 0, tmp_path, kinds=[kind], shrink=False)
    [(_, saved)] = result.violations
    case = Case.parse(saved.read_text())
    with pytest.raises(ViolationError):
        oracle.judge(case)
    monkeypatch.undo()
    assert oracle.judge(case) in ALLOWED


# -- the tools themselves --------------------------------------------------------------------------------


def test_the_slow_reader_knows_every_fp8_value() -> None:
    ours = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(e4m3(), ours)


def test_text_that_json_has_no_value_for() -> None:
    assert dump({"a": {"@raw": ["[", 3, "]"]}, "b@twice@": 1, "b": 2}) == '{"a": [[[]]], "b": 1, "b": 2}'


def test_a_rewritten_manifest_fits_the_damage(oracle: Oracle, tmp_path: Path) -> None:
    from vllm_spense.format.manifest import check_manifest

    edit = ["payload", "model.safetensors", f"{GATE}.sparse_values", 3, "38", 1]
    make(Case("fp8", "", "rewritten", [edit]), oracle.bases["fp8"], tmp_path / "rewritten")
    check_manifest(tmp_path / "rewritten")
    make(Case("fp8", "", "kept", [edit]), oracle.bases["fp8"], tmp_path / "kept")
    with pytest.raises(ValueError, match="SHA-256 differs"):
        check_manifest(tmp_path / "kept")
