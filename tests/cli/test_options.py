"""One description of each option: the model's, which the command line and docs/pruning.md repeat."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from vllm_spense.cli.app import app
from vllm_spense.cli.options import flag, takes_options
from vllm_spense.pruning.config import PRESETS, PruneConfig
from vllm_spense.recovery.config import RecoveryConfig
from vllm_spense.sparsify.config import SparsifyConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pruning.md"
UNOFFERED = {"damping", "block_size", "alignment"}
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def option_table() -> str:
    """The table of docs/pruning.md."""
    lines = ["| option | default | what |", "|---|---|---|"]
    for name, field in PruneConfig.model_fields.items():
        option = f"`{flag(name)}`" if name not in UNOFFERED else f"`{name}` (Python only)"
        usual = "" if field.default in (None, False) else f"`{field.default}`"
        lines.append(f"| {option} | {usual} | {field.description} |")
    return "\n".join(lines)


def test_the_page_has_the_models_descriptions() -> None:
    table = PAGE.read_text().partition("<!-- options:begin -->\n")[2].partition("\n<!-- options:end -->")[0]
    assert table == option_table(), f"docs/pruning.md between the markers should be:\n{option_table()}"


@pytest.mark.parametrize(
    ("command", "model"),
    [("prune", PruneConfig), ("recover", RecoveryConfig), ("sparsify", SparsifyConfig)],
)
def test_commands_have_the_models_options(command: str, model: type[BaseModel]) -> None:
    options = {option: p for p in COMMANDS[command].params for option in p.opts}
    for name, field in model.model_fields.items():
        if name in UNOFFERED:
            assert flag(name) not in options
            continue
        option = options[flag(name)]
        assert option.help.startswith(field.description)
        assert option.required == field.is_required()
        if not field.is_required():
            assert option.default in (field.default, None)
    for preset in PRESETS.values():
        for name in preset if model is PruneConfig else ():
            assert options[flag(name)].default is None, "the preset's"


def run_with(model: type[BaseModel], *arguments: str, **settings: Any) -> tuple[int, str, dict[str, Any]]:
    seen: dict[str, Any] = {}
    own = typer.Typer(add_completion=False, rich_markup_mode=None)

    @own.command()
    @takes_options(model, **settings)
    def command(place: str, options: dict[str, Any], loud: bool = False) -> None:
        """Does it."""
        seen.update(options, place=place, loud=loud)

    done = CliRunner().invoke(own, list(arguments))
    return done.exit_code, done.output, seen


class Sizes(BaseModel):
    width: int = Field(default=3, ge=1, le=9, description="How wide")
    depth: float | None = Field(default=None, description="How deep")
    kind: Literal["round", "square"] = Field(default="round", description="Which form")
    fast: bool = Field(default=False, description="Hurry")
    hidden: int = Field(default=7, description="Nobody's business")


def test_what_is_given_and_what_is_not() -> None:
    settings = {"skip": ("hidden",), "left_open": ("width",)}
    usual = {"place": "here", "loud": False, "kind": "round", "fast": False}
    assert run_with(Sizes, "here", **settings)[2] == usual
    options = ("--width", "4", "--depth", "0.5", "--fast", "--loud", "--kind", "square")
    given = run_with(Sizes, "here", *options, **settings)[2]
    assert given == {"place": "here", "loud": True, "width": 4, "depth": 0.5, "fast": True, "kind": "square"}
    assert run_with(Sizes, "here", skip=("hidden",))[2]["width"] == 3
    for wrong in (("--width", "10"), ("--hidden", "1"), ("--no-fast",), ("--kind", "oval")):
        code, said, seen = run_with(Sizes, "here", *wrong, **settings)
        assert code == 2, said
        assert not seen


def test_help_says_what_the_model_says() -> None:
    said = " ".join(run_with(Sizes, "--help", left_open=("width",))[1].split())
    limited = r"How wide \[default: 3, or the preset's] [1<=x<=9]"  # the bracket escaped, for rich
    for words in ("Does it.", limited, "How deep", "Which form [default: round]", "Hurry"):
        assert words in said
    assert "options" not in inspect.signature(takes_options(Sizes)(lambda options: None)).parameters
