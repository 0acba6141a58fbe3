"""`make gpu` in short: calls end in time whatever their children do (simulated clock), and faults are found
(real processes, the definition in the kernel's place). Nothing here says anything about a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.gpu import rehearsal
from tools.gpu.first_light import CORE_IS_WRONG
from tools.gpu.run import FILES
from tools.gpu.stages import STAGES

SCENARIOS = {scenario.name: scenario for scenario in rehearsal.scenarios()}


@pytest.mark.parametrize("name", SCENARIOS)
def test_three_calls_leave_the_margin_whatever_their_children_do(name: str, tmp_path: Path) -> None:
    calls = rehearsal.simulate(SCENARIOS[name], tmp_path)
    assert calls[-1]["end"] <= rehearsal.SITTING - rehearsal.MARGIN
    for call in calls:
        assert call["end"] - call["begin"] <= call["budget"] + rehearsal.STUCK
    assert len([path for path in tmp_path.iterdir() if path.is_file()]) <= FILES


def test_as_planned_everything_is_done_and_decode_comes_by_minute_three(tmp_path: Path) -> None:
    calls = rehearsal.simulate(SCENARIOS["as planned"], tmp_path)
    done = {stage.name for stage in STAGES if stage.default} - {"build"}
    assert done <= set(calls[-1]["done"])
    first = calls[0]["marks"]
    assert first["speed"] < 180 - 15
    assert first["test"] < 300
    assert calls[-1]["end"] < 14 * 60


def test_a_wrong_core_ends_the_first_call_at_once(tmp_path: Path) -> None:
    calls = rehearsal.simulate(SCENARIOS["the core is wrong"], tmp_path)
    assert [call["code"] for call in calls] == [CORE_IS_WRONG]
    assert list(calls[0]["marks"]) == ["build", "first"]
    assert calls[0]["end"] < 150


def test_a_child_that_never_ends_costs_itself_only(tmp_path: Path) -> None:
    calls = rehearsal.simulate(SCENARIOS["tools.gpu.tune_layers never ends"], tmp_path)
    done = set(calls[-1]["done"])
    assert {"speed", "test", "counters", "stack", "serving"} <= done
    assert "tune" not in done


@pytest.mark.parametrize("name", ["without a fault", "a hang in F6", "a crash in F5", "a wrong result in F2"])
def test_first_light_ends_as_it_must_with_a_fault_in_it(name: str) -> None:
    assert rehearsal.real_faults("definition", silent=3.0, names=[name])
