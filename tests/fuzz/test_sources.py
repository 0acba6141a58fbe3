"""A slice of the fuzzing of source models, and proof that it can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fuzz import campaign, sources
from tests.fuzz.edits import Case
from tests.fuzz.limits import ViolationError
from tests.fuzz.sources import OUTCOMES, SOURCE_KINDS, SourceBase, SourceOracle, source_cases

CORPUS = sorted((Path(__file__).parent / "corpus" / "sources").glob("*.json"))


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> SourceOracle:
    work = tmp_path_factory.mktemp("sources")
    return SourceOracle(sources.build(work), work)


@pytest.fixture(scope="module")
def known(oracle: SourceOracle) -> list[SourceBase]:
    return sources.read_bases(oracle.bases)


def test_undamaged_models_are_planned(oracle: SourceOracle) -> None:
    for name in oracle.bases:
        assert oracle.judge(Case(name, "", "kept", [])) == "planned", name


@pytest.mark.parametrize("path", CORPUS, ids=lambda p: p.stem)
def test_what_was_found_stays_mended(path: Path, oracle: SourceOracle) -> None:
    assert oracle.judge(Case.parse(path.read_text())) == "refused"


@pytest.mark.parametrize("kind", SOURCE_KINDS)
def test_a_slice_of_every_kind(
    kind: str, oracle: SourceOracle, known: list[SourceBase], tmp_path: Path
) -> None:
    result = campaign.run(oracle, known, 16, 0, tmp_path, kinds=[kind], strategy=source_cases)
    assert not result.violations, result.violations[0][0]
    assert result.total >= 8
    assert {outcome for _, outcome in result.counts} <= set(OUTCOMES)


def forget_what_transformers_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    from vllm_spense.pruning import source
    from vllm_spense.sources import architecture

    for module in (architecture, source):
        monkeypatch.setattr(module, "building", lambda _: nullcontext())


def forget_where_a_size_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_spense.pruning import admission
    from vllm_spense.pruning.targets import find_targets

    monkeypatch.setattr(admission, "check_layouts", lambda layers, config, _: find_targets(layers, config))


@pytest.mark.parametrize(
    ("kind", "breakage"),
    [("types", forget_what_transformers_raises), ("numbers", forget_where_a_size_stands)],
)
def test_it_finds_a_check_that_is_missing(
    kind: str,
    breakage: Any,
    oracle: SourceOracle,
    known: list[SourceBase],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    breakage(monkeypatch)
    options: dict[str, Any] = {"kinds": [kind], "shrink": False, "strategy": source_cases}
    result = campaign.run(oracle, known, 150, 0, tmp_path, **options)
    [(_, saved)] = result.violations
    case = Case.parse(saved.read_text())
    with pytest.raises(ViolationError):
        oracle.judge(case)
    monkeypatch.undo()
    assert oracle.judge(case) in OUTCOMES
