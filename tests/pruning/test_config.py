"""What PruneConfig refuses, and what it puts on record."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pruning.problems import options
from vllm_spense.pruning.config import PRESETS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"regroup": -1}, "regroup"),
        ({"order": "random"}, "order"),
        ({"search_damping": True}, "search_damping\n  Extra inputs are not permitted"),
        ({"method": "wanda", "regroup": 2}, "regroup: only for method 'obs', not 'wanda'"),
        ({"method": "wanda", "order": "energy"}, "order: only for method 'obs'"),
        ({"method": "magnitude", "joint": 1}, "joint: only for method 'obs', not 'magnitude'"),
    ],
)
def test_contradictions_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**given)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "guided"])
def test_paper_presets_use_none_of_them(preset: str) -> None:
    config = options(preset=preset)
    assert (config.regroup, config.order, config.joint) == (0, "natural", 0)


def test_records_are_those_of_before_options_were_retired() -> None:
    """Names, values and order: config.json and fingerprints of equal runs have equal bytes."""
    assert list(options().decisive().items()) == [
        ("preset", "guided"),
        ("method", "obs"),
        ("selection", "consensus"),
        ("allocation", "bytes"),
        ("refit", 4),
        ("refine", 4),
        ("regroup", 4),
        ("order", "energy"),
        ("search_damping", False),
        ("asymmetric", 0.0),
        ("joint", 2),
        ("rounding", "nearest"),
        ("gradient_samples", 16),
        ("pilot_samples", 8),
        ("dense_ratio", 0.5),
        ("targets", "mlp"),
        ("attention_dense_ratio", None),
        ("num_samples", 64),
        ("seq_len", 512),
        ("seed", 0),
        ("weight_dtype", "fp8"),
        ("damping", 0.01),
        ("block_size", 128),
        ("alignment", 64),
        ("max_tp", 8),
    ]
