"""Tokenizers that no text can make write a special token: the end of a document that a text speaks of does not end it.

In a sealed copy every special token is spelt with SEAL in the place of its first letter, in the tokens that are looked
for in a text and in the vocabulary, so that what a text says is cut like any other text. What a chat template writes is
sealed where it writes special tokens, and so is read as them; characters keep their places.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graft.data.chat import Messages, chat_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SEAL, HIDDEN = "\U0010ffff", "\U0010fffe"
"""Noncharacters, which Unicode keeps free for such use and which no text holds."""


@dataclass(frozen=True)
class Sealed:
    """The copy, `special` (finds special tokens as the original spells them) and how many tokens that had."""

    backend: Tokenizer
    special: re.Pattern[str]
    size: int


_made: weakref.WeakKeyDictionary[PreTrainedTokenizerFast, Sealed] = weakref.WeakKeyDictionary()
"""Copies made before: one takes a second where there are many tokens."""


def sealed(tokenizer: PreTrainedTokenizerFast) -> Sealed:
    """The copy of a tokenizer, without truncation, padding and what it puts around a text."""
    made = _made.get(tokenizer)
    if made is None or made.size != len(tokenizer):
        made = _made[tokenizer] = _sealed(tokenizer)
    return made


def sealed_chats(chats: Sequence[Messages], texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """`texts`, as the template writes `chats`, with the special tokens sealed that the template has put there.

    Those that a message speaks of are not. A template that looks for them itself (to take out reasoning, say) and so
    writes another text without them has their message's ones taken for its own.
    """
    special = sealed(tokenizer).special
    return [_sealed_chat(chat, text, special, tokenizer) for chat, text in zip(chats, texts, strict=True)]


def _sealed_chat(chat: Messages, text: str, special: re.Pattern[str], tokenizer: PreTrainedTokenizerFast) -> str:
    written = text
    if any(special.search(message["content"]) for message in chat):
        hidden = [{**m, "content": special.sub(lambda found: HIDDEN + found[0][1:], m["content"])} for m in chat]
        written = chat_text(hidden, tokenizer)
        if len(written) != len(text) or any(a not in (b, HIDDEN) for a, b in zip(written, text, strict=True)):
            written = text
    marked = special.sub(lambda found: _seal(found[0]), written)
    return "".join(b if a == HIDDEN else a for a, b in zip(marked, text, strict=True)) if HIDDEN in marked else marked


def _sealed(tokenizer: PreTrainedTokenizerFast) -> Sealed:
    backend = tokenizer.backend_tokenizer
    plain = json.loads(backend.to_str()) | {"truncation": None, "padding": None, "post_processor": None}
    names = {token["content"] for token in plain["added_tokens"] if token["special"]}
    for token in plain["added_tokens"]:
        if token["content"] in names:
            token["content"] = _seal(token["content"])
    _seal_model(plain["model"], names)
    return Sealed(type(backend).from_str(json.dumps(plain)), _pattern(names), len(tokenizer))


def _seal_model(model: dict[str, Any], names: set[str]) -> None:
    """In place. A merge that makes a special token goes."""
    if isinstance(model["vocab"], dict):
        model["vocab"] = {_seal(t) if t in names else t: number for t, number in model["vocab"].items()}
    else:
        model["vocab"] = [[_seal(t) if t in names else t, score] for t, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = _seal(model["unk_token"])
    if "merges" in model:
        pairs = ((m.split(" ") if isinstance(m, str) else m, m) for m in model["merges"])
        model["merges"] = [m for pair, m in pairs if not names & {*pair, "".join(pair)}]


def _seal(token: str) -> str:
    return SEAL + token[1:]


def _pattern(tokens: Collection[str]) -> re.Pattern[str]:
    """Finds the longest of the tokens at a place, as tokenizers do; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")
