"""Warnings, when they come and what ``strict`` makes of them; NaN and infinity; the model card."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import HIDDEN, INTER
from vllm_spense.format import Checkpoint, CheckpointError
from vllm_spense.format.manifest import check_manifest
from vllm_spense.pruning import PruneConfig, pipeline, prune
from vllm_spense.pruning.card import NOT_MEASURED, model_card, record_evaluation
from vllm_spense.pruning.layer import LayerPruner
from vllm_spense.pruning.resume import work_path
from vllm_spense.pruning.source import SourceModel
from vllm_spense.pruning.warnings import PruneWarning, warn, warn_about_calibration, warn_about_size
from vllm_spense.sources import BaseModel
from vllm_spense.text.windows import MAX_END, MIN_END, sample_windows, text_end

QUIET = {"dense_ratio": 0.75, "num_samples": 4, "seq_len": 64}
"""A run without warnings: 256 tokens for 208 columns, an eighth of zeros."""


def options(text: Path, **changes: Any) -> PruneConfig:
    return PruneConfig(**({"preset": "spensegpt+", "calibration": str(text)} | QUIET | changes))


def said(run) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if issubclass(w.category, PruneWarning)]


# -- strict --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dense_ratio": 0.5}, r"0\.44 million parameters are few for 25% zeros"),
        ({"num_samples": 3}, r"192 calibration tokens are fewer than the 208 inputs of .*0\.mlp\.down_proj"),
        ({"num_samples": 64}, r"64 windows of 64 tokens out of a text of 4000 tokens overlap heavily"),
    ],
)
def test_every_warning_is_an_error_under_strict(
    changes: dict[str, Any], words: str, dense_model: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{words}.*--strict"):
        prune(dense_model, tmp_path / "out", options(text_file, strict=True, **changes))
    assert not list(tmp_path.iterdir()), "nothing is left of a run that finished no layer"
    with pytest.warns(PruneWarning, match=words):
        prune(dense_model, tmp_path / "out", options(text_file, **changes))


def test_a_quiet_run_says_nothing(dense_model: Path, text_file: Path, tmp_path: Path) -> None:
    assert said(lambda: prune(dense_model, tmp_path / "a", options(text_file))) == []
    prune(dense_model, tmp_path / "b", options(text_file, strict=True))
    a, b = (sorted(p.read_bytes() for p in (tmp_path / name).iterdir()) for name in "ab")
    assert a == b


def test_a_late_warning_loses_nothing(
    dense_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers in front of it are kept, and the run can be continued without ``strict``."""
    out, plain = tmp_path / "out", LayerPruner.prune

    def warning(self: LayerPruner, index: int, layer):
        if index == 1:
            warn("something is not as it should be")
        return plain(self, index, layer)

    monkeypatch.setattr(LayerPruner, "prune", warning)
    with pytest.raises(ValueError, match=r"not as it should be.*--strict") as caught:
        prune(dense_model, out, options(text_file, strict=True))
    assert "1 finished layers are kept" in caught.value.__notes__[0]
    assert work_path(out).is_dir()
    assert not out.exists()
    with pytest.warns(PruneWarning, match="not as it should be"):
        prune(dense_model, out, options(text_file, resume=True))
    check_manifest(out)


# -- when ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "ratio", "expected"),
    [(999_999_999, 0.5, 1), (10**9, 0.5, 0), (10**8, 0.51, 0), (10**8, 0.0, 1), (10**8, 1.0, 0)],
)
def test_small_models_are_warned_about(parameters: int, ratio: float, expected: int) -> None:
    config = PruneConfig(calibration="x", dense_ratio=ratio)
    assert len(said(lambda: warn_about_size(parameters, config))) == expected


@pytest.mark.parametrize(
    ("tokens", "changes", "expected"),
    [
        (INTER - 1, {}, 1),
        (INTER, {}, 0),
        (HIDDEN, {"dense_ratio": 1}, 0),
        (HIDDEN, {"method": "wanda"}, 0),  # it needs the Hessian's diagonal alone
    ],
)
def test_short_calibration_is_warned_about(
    tokens: int, changes: dict[str, Any], expected: int, dense_model: Path
) -> None:
    layers = SourceModel(dense_model, torch.device("cpu")).layers
    config = PruneConfig(calibration="x", **changes)
    assert len(said(lambda: warn_about_calibration(tokens, layers, config))) == expected


@pytest.mark.parametrize("changes", [{"preset": "guided"}, {"method": "wanda"}, {"dense_ratio": 1}])
def test_a_layer_that_overflows_is_named(
    changes: dict[str, Any], dense_model: Path, text_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(dense_model, tmp_path / "in")
    state = load_file(tmp_path / "in" / "model.safetensors")
    state["model.layers.1.mlp.down_proj.bias"] += 3e38
    state["model.layers.1.self_attn.o_proj.bias"] += 3e38
    save_file(state, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\b.*NaN or infinity"):
        prune(tmp_path / "in", tmp_path / "out", options(text_file, **changes))
    assert not (tmp_path / "out").exists()


# -- the end of the text -------------------------------------------------------------------------


@pytest.mark.parametrize("n", [100, 400, 5000, 60_000])
@pytest.mark.parametrize("seed", range(5))
def test_the_end_of_the_text_is_not_in_a_window_or_says_so(n: int, seed: int) -> None:
    ids = torch.arange(n)
    end = text_end(ids, 8, 50, seed)
    last = int(sample_windows(ids, 8, 50, seed).max())
    assert torch.equal(end.ids, ids[-len(end.ids) :])
    assert len(end.ids) <= MAX_END
    assert end.calibrated == (n - 1 - last < MIN_END)
    if not end.calibrated:
        assert int(end.ids.min()) > last
        assert len(end.ids) == min(MAX_END, n - 1 - last)


# -- card ----------------------------------------------------------------------------------------


def card(config: PruneConfig, losses: dict[str, float], damping: dict[str, float]) -> str:
    provenance = {
        "calibration": {"source": "train.txt", "sha256": "0" * 64},
        "versions": {"vllm-spense": "1", "torch": "2", "transformers": "5"},
        "raised_damping": damping,
        "joint_left_out": [],
    }
    return model_card(BaseModel("org/model"), config, 0.25, [1, 2, 4], losses, provenance)


def test_card_of_a_plain_mlp() -> None:
    layers = "model.decoder.layers"
    losses = {f"{layers}.{i}.fc{j}": 0.125 * i + j / 100 for i in range(2) for j in (1, 2)}
    text = card(PruneConfig(calibration="/home/me/train.txt"), losses, {f"{layers}.0.fc2": 0.1})
    assert "| layer | fc1 | fc2 |" in text
    assert f"| {layers}.1 | 0.1350 | 0.1450 |" in text
    for part in (
        "## Creation",
        "## Deployment",
        "`import vllm_spense` comes first",
        "## Evaluation",
        NOT_MEASURED,
        "spense eval",
        "N is one of 1, 2, 4",
    ):
        assert part in text
    assert f"{layers}.0.fc2 (0.1)" in text
    assert "/home/me" not in text
    assert "needed more damping" not in card(PruneConfig(calibration="x"), losses, {})


@pytest.mark.parametrize(
    "options",
    [{}, {"preset": "sparsegpt", "seed": 3}, {"method": "wanda", "damping": 0.1}, {"refine": 2, "max_tp": 4}],
)
def test_the_call_in_the_card_makes_the_same(options: dict[str, Any]) -> None:
    config = PruneConfig(calibration="/home/me/train.txt", overwrite=True, strict=True, **options)
    line = next(line for line in card(config, {}, {}).splitlines() if line.startswith("prune("))
    called: list[Any] = []
    eval(line, {"prune": lambda *arguments: called.extend(arguments), "PruneConfig": PruneConfig})
    assert called[0] == "org/model"
    assert called[2].decisive() == config.decisive()
    assert called[2].calibration == "train.txt"


def test_what_was_measured_goes_into_card_and_manifest(
    dense_model: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prune(dense_model, out, options(text_file))
    record_evaluation(out, "Perplexity 12.")
    text = (out / "README.md").read_text()
    assert "Perplexity 12." in text
    assert NOT_MEASURED not in text
    check_manifest(out)
    assert not [p for p in out.iterdir() if "partial" in p.name]
    assert pipeline._report_of(out, options(text_file), 0.0).layers == 2
    assert Checkpoint(out).require_spense().provenance["calibration"]["source"] == text_file.name
