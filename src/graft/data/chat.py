"""What the assistant says in a chat, as a template writes it: found without any marks in the template.

Where a chat up to a turn is a prefix of the whole chat, the turn is what comes behind the generation prompt. Some
templates rewrite earlier turns once others follow (they take out reasoning, say). There the turn is what changes when
its content is exchanged for another, with the end-of-turn mark that follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, str]]
STRANGER = "\ue000"
"""Stands for other content; from the private use area, so no content begins or ends with it."""


def chat_text(messages: Messages, tokenizer: PreTrainedTokenizerFast) -> str:
    """The chat as the template writes it. Raises DataError where there is no template or it refuses the messages."""
    if not tokenizer.chat_template:
        raise DataError("chat data needs a tokenizer with a chat template; this one has none")
    from jinja2 import TemplateError

    try:
        return _written(messages, tokenizer)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the chat template refuses a chat with the roles {roles} ({error})") from None


def assistant_spans(messages: Messages, tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, int]]:
    """(first, last) characters of what the assistant says in the written chat, its end-of-turn mark included.

    Raises DataError for a template that leaves out what the assistant says.
    """
    whole = chat_text(messages, tokenizer)
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    return [
        _by_prefix(messages, turn, whole, tokenizer) or _by_exchange(messages, turn, whole, tokenizer) for turn in turns
    ]


def _written(messages: Messages, tokenizer: PreTrainedTokenizerFast, prompt: bool = False) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))


def _by_prefix(messages: Messages, turn: int, whole: str, tokenizer: PreTrainedTokenizerFast) -> tuple[int, int] | None:
    """From the end of the prompt for this turn to the end of the chat up to it; None where these are no prefixes."""
    if turn == 0:  # transformers writes no chat without messages
        return None
    from jinja2 import TemplateError

    try:
        before = _written(messages[:turn], tokenizer, prompt=True)
        after = _written(messages[: turn + 1], tokenizer)
    except TemplateError:
        return None
    after = after if whole.startswith(after) else after.rstrip()
    good = after.startswith(before) and whole.startswith(after) and len(after) > len(before)
    return (len(before), len(after)) if good else None


def _by_exchange(messages: Messages, turn: int, whole: str, tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """What is different in the chat when the turn has other content, and the mark behind it."""
    said = messages[turn]
    other = chat_text([*messages[:turn], {**said, "content": STRANGER}, *messages[turn + 1 :]], tokenizer)
    first = _alike(whole, other)
    last = len(whole) - _alike(whole[first:][::-1], other[first:][::-1])
    if other == whole or (first == last and said["content"].strip()):
        raise DataError(
            f"the chat template leaves out turn {turn + 1}, which the assistant says: {said['content'][:60]!r}"
        )
    return first, _behind_mark(whole, last, tokenizer)


def _alike(one: str, other: str) -> int:
    """How many characters at the beginning are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))


def _behind_mark(whole: str, last: int, tokenizer: PreTrainedTokenizerFast) -> int:
    """The place behind the special token that follows `last` (spaces may stand between), or `last` without one."""
    rest = whole[last:].lstrip()
    marks = [token for token in map(str, tokenizer.get_added_vocab()) if rest.startswith(token)]
    return len(whole) - len(rest) + len(max(marks, key=len)) if marks else last
