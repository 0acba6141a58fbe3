"""The schema of checkpoints whose layers skip small inputs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_spense.format.errors import CheckpointError
from vllm_spense.format.twell_config import TwellCheckpointConfig, is_twell, parse_twell_config

DOWN = "model.layers.0.mlp.down_proj"
GOOD: dict[str, Any] = {"quant_method": "twell", "version": 1, "inputs": {DOWN: 0.0123}}


def test_what_is_written_is_read() -> None:
    config = TwellCheckpointConfig(inputs={DOWN: 0.5}, density={DOWN: 0.25}, provenance={"text": "wiki"})
    assert parse_twell_config(json.loads(json.dumps(config.model_dump()))) == config
    assert parse_twell_config(GOOD).inputs == {DOWN: 0.0123}
    assert parse_twell_config(GOOD | {"inputs": {DOWN: 0}}).inputs == {DOWN: 0.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2 of twell is not supported"),
        ({"version": True}, "version True"),
        ({"inputs": {}}, "quantization_config.inputs: Dictionary should have at least 1 item"),
        ({"inputs": {DOWN: -0.1}}, f"quantization_config.inputs.{DOWN}"),
        ({"inputs": {DOWN: float("nan")}}, f"quantization_config.inputs.{DOWN}"),
        ({"inputs": {DOWN: float("inf")}}, f"quantization_config.inputs.{DOWN}"),
        ({"inputs": {DOWN: "0.1"}}, f"quantization_config.inputs.{DOWN}"),
        ({"inputs": {DOWN: True}}, f"quantization_config.inputs.{DOWN}"),
        ({"inputs": {"../x\n": 0.1}}, "should match pattern"),
        ({"inputs": None}, "quantization_config.inputs"),
        ({"density": {DOWN: 1.5}}, f"quantization_config.density.{DOWN}"),
        ({"density": {"lm_head": 0.5}}, "density names lm_head, which is not among inputs"),
        ({"extra": 1}, "quantization_config.extra: Extra inputs are not permitted"),
        ({"quant_method": "spense"}, "quant_method 'twell'"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_twell_config(GOOD | change)
    assert words in str(caught.value)
    assert "Fix: " in str(caught.value)


def test_deep_provenance_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(20):
        deep = {"deeper": deep}
    with pytest.raises(CheckpointError, match="nested more than 16 deep"):
        parse_twell_config(GOOD | {"provenance": deep})


def test_which_checkpoints_are_meant() -> None:
    assert is_twell({"quantization_config": GOOD})
    assert not is_twell({})
    assert not is_twell({"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(CheckpointError, match="must be an object"):
        parse_twell_config(["twell"])
