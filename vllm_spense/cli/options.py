"""Options of a command, made from the fields of the model that checks them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

Command = Callable[..., None]


def takes_options(
    model: type[BaseModel],
    *,
    first: Collection[str] = (),
    skip: Collection[str] = (),
    left_open: Collection[str] = (),
    types: dict[str, Any] | None = None,
) -> Callable[[Command], Command]:
    """A decorator: the command has an option for each field of ``model``, and gets those that have a value as
    its argument ``options``.

    They stand behind the command's own arguments that must be given and in front of the others, those in
    ``first`` at the top; ``skip`` are no options. Fields in ``left_open`` have no value unless they are
    given. ``types``: what the command line takes instead of a field's own type.
    """
    names = [*first, *(name for name in model.model_fields if name not in first)]
    fields = {name: model.model_fields[name] for name in names if name not in skip}
    made = [
        _parameter(name, field, name in left_open, (types or {}).get(name, field.annotation))
        for name, field in fields.items()
    ]

    def decorate(command: Command) -> Command:
        plain = signature(command, eval_str=True)
        own = [p for name, p in plain.parameters.items() if name != "options"]

        @wraps(command)
        def called(**values: Any) -> None:
            given = {name: values.pop(name) for name in fields}
            command(**values, options={name: v for name, v in given.items() if v is not None})

        needed = [p for p in own if p.default is Parameter.empty]
        shown = [*needed, *made, *(p for p in own if p.default is not Parameter.empty)]
        shown = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in shown]
        called.__dict__["__signature__"] = plain.replace(parameters=shown)
        called.__annotations__ = {p.name: p.annotation for p in shown}
        return called

    return decorate


def option(name: str, field: FieldInfo, default_text: str = "", **settings: Any) -> Any:
    """The typer option of a model's field, with its limits; a switch where it is false by default."""
    for limit in field.metadata:
        for theirs, ours in (("ge", "min"), ("le", "max")):
            if hasattr(limit, theirs):
                settings[ours] = getattr(limit, theirs)
    return typer.Option(flag(name), help=f"{field.description}{default_text}", **settings)


def flag(name: str) -> str:
    """The option of the field ``name``."""
    return f"--{name.replace('_', '-')}"


def _parameter(name: str, field: FieldInfo, left_open: bool, kind: Any) -> Parameter:
    text = ""
    if left_open:
        others = "" if name == "preset" else ", or the preset's"
        text = f" \\[default: {field.default}{others}]"
    default = Parameter.empty if field.is_required() else None if left_open else field.default
    if default is None:
        kind = kind | None
    shown = default is not None and not field.is_required()
    made = option(name, field, text, show_default=shown)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, made])
