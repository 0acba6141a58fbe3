"""`spense inspect --plot`: a PNG whose numbers are the report's, per decoder layer."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.tiny import INTER, LINEARS, SPARSE
from vllm_spense.cli.app import app
from vllm_spense.cli.plot import layer_series, plot_layers
from vllm_spense.format.report import CheckpointReport, ModuleReport, inspect
from vllm_spense.format.schema import ModuleSpec

PNG = b"\x89PNG\r\n\x1a\n"


def module(name: str, dense: int, loss: float | None = None, rows: int = 64) -> ModuleReport:
    spec = ModuleSpec(
        split="output", out_features=rows, in_features=16, sparse=rows - dense, dense=dense, bias=False
    )
    return ModuleReport(name, spec, (rows - dense) / rows / 2, 1, 1, loss)


def report(*modules: ModuleReport) -> CheckpointReport:
    return CheckpointReport(Path("x"), "float8_e4m3fn", [1], list(modules), 1, {})


@pytest.fixture
def with_losses(tiny_spense: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "copy"
    shutil.copytree(tiny_spense, directory)
    config = json.loads((directory / "config.json").read_text())
    losses = {f"model.layers.{i}.mlp.{name}": (i + 1) / 8 for i in (0, 1) for name in LINEARS[-3:]}
    config["quantization_config"]["provenance"] = {"losses": losses}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_the_numbers_are_the_reports(with_losses: Path) -> None:
    series = layer_series(inspect(with_losses))
    assert series.mlp == {i: pytest.approx(1 - SPARSE / INTER) for i in (0, 1)}
    assert series.attention == {}
    assert series.losses == {f"mlp.{name}": {0: 0.125, 1: 0.25} for name in LINEARS[-3:]}


def test_a_layers_dense_ratio_is_that_of_its_weights() -> None:
    """Twice as many rows count twice; all-dense layers count, attention stands by itself."""
    series = layer_series(
        report(
            module("model.layers.3.mlp.fc1", 32, 0.5, rows=128),
            module("model.layers.3.mlp.fc2", 64, rows=64),
            module("model.layers.3.self_attn.o_proj", 16),
            module("model.layers.7.mlp.fc1", 64),
            module("model.layers.7.self_attn.o_proj", 64),
            module("model.projection", 0),
        )
    )
    assert series.mlp == {3: pytest.approx((32 + 64) / (128 + 64)), 7: 1.0}
    assert series.attention == {3: pytest.approx(0.25), 7: 1.0}
    assert series.losses == {"mlp.fc1": {3: 0.5}}


def drawn(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


def test_inspect_draws_a_picture(with_losses: Path, tiny_spense: Path, tmp_path: Path) -> None:
    """Also into a new directory, and of a checkpoint that records no losses."""
    out, other = tmp_path / "new" / "layers.png", tmp_path / "none.png"
    assert "Wrote" in drawn(with_losses, "--plot", out)
    drawn(tiny_spense, "--plot", other, "--json")
    assert out.read_bytes()[:8] == other.read_bytes()[:8] == PNG
    assert out.read_bytes() != other.read_bytes()


def test_attention_is_drawn_where_it_is_pruned(tmp_path: Path) -> None:
    modules = [module(f"model.layers.{i}.{name}", 32) for i in (0, 1) for name in ("mlp.up", "self_attn.o")]
    plot_layers(report(*modules), tmp_path / "a.png")
    plot_layers(report(*modules[::2]), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_without_matplotlib_one_line_says_what_to_do(
    tiny_spense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm_spense.cli.app import main

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(
        sys, "argv", ["spense", "inspect", str(tiny_spense), "--plot", str(tmp_path / "p.png")]
    )
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 1
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    assert "the plot needs matplotlib. Fix: pip install matplotlib" in message
    assert not list(tmp_path.iterdir())
