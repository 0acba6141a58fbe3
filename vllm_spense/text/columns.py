"""A row of a table as the text that a model reads."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vllm_spense.format.errors import one_line

_CHOICES = (("text",), ("messages",), ("conversations",), ("prompt", "completion"))
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
"""ShareGPT's names of who speaks; others are the template's own."""


def choose(names: Collection[str], wanted: str | None) -> tuple[str, ...]:
    """The columns that make up the text of a row: ``wanted``, or else the first of the known ones.

    Raises ``ValueError`` when there are none.
    """
    if wanted is not None:
        if wanted not in names:
            raise ValueError(f"there is no column {wanted!r} (--text-column) but {_listed(names)}")
        return (wanted,)
    for choice in _CHOICES:
        if set(choice) <= set(names):
            return choice
    raise ValueError(
        f"there is no column text, messages, conversations or prompt and completion, but {_listed(names)}; "
        "name the one that holds the text (--text-column)"
    )


def row_text(row: dict[str, Any], columns: tuple[str, ...], tokenizer: Any) -> tuple[str, bool]:
    """The text of ``row``, and whether it is a chat: then it is what the model's template makes of it.

    Blank for rows without a value. Raises ``ValueError`` for values that are neither text nor a chat.
    """
    values: list[Any] = [row.get(column) for column in columns]
    if any(value is None for value in values):
        return "", False
    if all(isinstance(value, str) for value in values):
        return "".join(values), False
    if all(isinstance(value, list) for value in values):
        messages = [message for value in values for message in value]
        return (_chat(messages, tokenizer), True) if messages else ("", True)
    kinds = " and ".join(type(value).__name__ for value in values)
    raise ValueError(f"column {' and '.join(columns)}: text or a list of messages was expected, not {kinds}")


def _chat(messages: list[Any], tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):  # Mistral's own tokenizers have none
        raise ValueError("this is a chat, and the model has no chat template; give a column of plain text")
    turns = [_turn(message) for message in messages]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # the template is a program of the model's own
        reason = one_line(str(error) or type(error).__name__, 200)
        raise ValueError(f"the model's chat template does not take this chat ({reason})") from None


def _turn(message: Any) -> dict[str, Any]:
    """``message`` with ``role`` and ``content``, from ShareGPT's ``from`` and ``value``, too."""
    if isinstance(message, dict):
        if isinstance(message.get("role"), str) and "content" in message:
            return {name: value for name, value in message.items() if value is not None or name == "content"}
        if isinstance(message.get("from"), str) and isinstance(message.get("value"), str):
            return {"role": _ROLES.get(message["from"], message["from"]), "content": message["value"]}
    raise ValueError("a message needs role and content (or from and value)")


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(str, names)) or "none at all"
