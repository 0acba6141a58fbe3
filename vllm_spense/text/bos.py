"""The tokens that a model expects at the start of everything it reads: its BOS token, if it uses one.

Models trained with such a token (Gemma, Llama 3, Mistral) are other models without it. Serving puts it there;
windows of text have to start with it as well.
"""

from __future__ import annotations

from typing import Any, Literal

Bos = Literal["auto", "always", "never"]


def opening(tokenizer: Any, bos: Bos = "auto") -> tuple[int, ...]:
    """Token ids with which every window starts; empty for models that use none.

    ``auto``: what serving puts there. These are the special tokens that the tokenizer sets in front of any
    text, or else its BOS token if the chat template begins with it. ``always``: the same, or else the BOS
    token itself. ``never``: none. Raises ``ValueError`` for ``always`` where there is no BOS token.
    """
    if bos == "never":
        return ()
    found = added_in_front(tokenizer)
    if found:
        return found
    token = tokenizer.bos_token_id
    if bos == "always":
        if token is None:
            raise ValueError("--bos always: the model's tokenizer has no BOS token; give --bos auto or never")
        return (token,)
    return (token,) if token is not None and _template_begins_with_bos(tokenizer) else ()


def opening_text(tokenizer: Any, ids: tuple[int, ...]) -> str | None:
    """The tokens ``ids`` as they stand in the vocabulary, to say which they are; None for none."""
    return "".join(tokenizer.convert_ids_to_tokens(list(ids))) or None


def added_in_front(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the special tokens that ``tokenizer`` itself sets in front of any text."""
    whole, plain = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return tuple(whole[:at])
    return ()


def _template_begins_with_bos(tokenizer: Any) -> bool:
    """Whether a chat has the BOS token at its start and nowhere else.

    Where each turn begins with it, as in ChatML with ``<|im_start|>``, it is the mark of a turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        return False
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # the template is a program of the model's own, and may not take this chat
        return False
    return text.startswith(tokenizer.bos_token) and text.count(tokenizer.bos_token) == 1
