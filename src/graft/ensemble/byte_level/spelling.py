"""How a tokenizer's tokens are spelt: the bytes that each adds to a text, read off the tokenizer's own decoder."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graft.errors import CannotCombine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Step = Callable[[str | bytes, bool], "str | bytes"]
"""One decoder on one token; the flag says whether the token is the first of the text."""


@dataclass(frozen=True)
class Spelling:
    """Bytes of every token id as the first of a text and later on; None: no text (special tokens). `ends`: ids that end
    a text, `start`: the id that stands before it."""

    first: tuple[bytes | None, ...]
    later: tuple[bytes | None, ...]
    ends: tuple[int, ...]
    start: int


def spelling_of(tokenizer: PreTrainedTokenizerFast, ends: Sequence[int] = (), name: str = "the model") -> Spelling:
    """The spelling of a tokenizer's tokens; `ends` are further ids that end a text (a model may have several).

    Special tokens are spelt by nothing. Raises CannotCombine, naming the model, for a decoder whose tokens have no
    bytes of their own, and for a tokenizer without start or end token.
    """
    try:
        return _spelling_of(tokenizer, ends)
    except CannotCombine as error:
        raise CannotCombine(f"{name}: {error}") from None


def _spelling_of(tokenizer: PreTrainedTokenizerFast, ends: Sequence[int]) -> Spelling:
    steps = _steps(tokenizer)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    names = tokenizer.convert_ids_to_tokens(list(range(max(tokenizer.get_vocab().values()) + 1)))
    plain = [None if name is None or i in special else str(name) for i, name in enumerate(names)]
    first = tuple(None if name is None else _spelt(name, steps, True) for name in plain)
    later = tuple(None if name is None else _spelt(name, steps, False) or None for name in plain)
    found = Spelling(first, later, tuple(sorted({*ends, *_known(tokenizer.eos_token_id)})), _start(tokenizer))
    _check(tokenizer, found)
    return found


def _known(token: int | None) -> tuple[int, ...]:
    return () if token is None else (int(token),)


def _start(tokenizer: PreTrainedTokenizerFast) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id):
        if token is not None:
            return int(token)
    raise CannotCombine("bytes need tokenizers with a start or end token, found one that has neither")


def _spelt(token: str, steps: Sequence[Step], first: bool) -> bytes:
    text: str | bytes = token
    for step in steps:
        text = step(text, first)
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text


def _steps(tokenizer: PreTrainedTokenizerFast) -> list[Step]:
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    if decoder is None:
        return [lambda text, first: text if first else f" {text}"]
    chain = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    fused = False
    steps = []
    for each in chain:
        steps.append(_step(each, fused))
        fused = fused or each["type"] == "Fuse"
    return steps


def _step(raw: dict[str, Any], fused: bool) -> Step:
    """A decoder as a function of single tokens. Raises CannotCombine where what one adds depends on its neighbours."""
    kind = raw["type"]
    if kind == "Strip" and raw["stop"] == 0 and raw["start"] <= 1:
        return _strip(raw["content"], raw["start"], fused)
    step = _text_step(kind, raw)
    return lambda text, first: step(text, first) if isinstance(text, str) else text


def _text_step(kind: str, raw: dict[str, Any]) -> Callable[[str, bool], str | bytes]:
    """A decoder that leaves alone what is bytes already."""
    if kind == "ByteLevel":
        return _byte_level
    if kind == "ByteFallback":
        return _byte_fallback
    if kind == "Fuse":
        return lambda text, first: text
    if kind == "Replace" and "String" in raw["pattern"]:
        old, new = raw["pattern"]["String"], raw["content"]
        return lambda text, first: text.replace(old, new)
    if kind == "Metaspace":
        mark, drops = raw["replacement"], raw.get("prepend_scheme", "always") != "never"
        return lambda text, first: text.replace(mark, "" if first and drops else " ")
    if kind == "WordPiece":
        return _word_piece(raw["prefix"], raw["cleanup"])
    raise CannotCombine(
        f"what a token of this tokenizer adds to a text depends on its neighbours (decoder {kind}): bytes need one of "
        "ByteLevel, ByteFallback, Metaspace, Replace, Strip (at most one letter at the start), Fuse, WordPiece"
    )


def _letters() -> dict[str, int]:
    """The byte that each printable letter of byte-level tokenizers stands for (GPT-2, Radford et al. 2019)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


LETTERS = _letters()


def _byte_level(text: str, first: bool) -> str | bytes:
    """A token with a letter that stands for no byte is its own text (added tokens are)."""
    known = [LETTERS.get(letter) for letter in text]
    return text.encode() if None in known else bytes(byte for byte in known if byte is not None)


def _byte_fallback(token: str, first: bool) -> str | bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return token
    return token


def _strip(letter: str, count: int, fused: bool) -> Step:
    """Behind Fuse the whole text is stripped, which is its first token; without it, every token is."""

    def strip(text: str | bytes, first: bool) -> str | bytes:
        if not count or (fused and not first):
            return text
        return text.removeprefix(letter) if isinstance(text, str) else text.removeprefix(letter.encode())

    return strip


def _word_piece(prefix: str, cleanup: bool) -> Callable[[str, bool], str]:
    tidied = (
        (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
        (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
    )  # fmt: skip

    def read(token: str, first: bool) -> str:
        if not first:
            token = token.removeprefix(prefix) if token.startswith(prefix) else " " + token
        for old, new in tidied if cleanup else ():
            token = token.replace(old, new)
        return token

    return read


def _check(tokenizer: PreTrainedTokenizerFast, found: Spelling) -> None:
    """Compare with what the tokenizer decodes itself, for pairs of tokens drawn at random."""
    draw = random.Random(0)
    firsts = [i for i, each in enumerate(found.first) if each is not None]
    laters = [i for i, each in enumerate(found.later) if each is not None]
    if not laters:
        raise CannotCombine("bytes need a tokenizer whose tokens write text, found only special tokens")
    for _ in range(200):
        pair = draw.choice(firsts), draw.choice(laters)
        spelt = (found.first[pair[0]] or b"") + (found.later[pair[1]] or b"")
        try:
            text = spelt.decode()
        except UnicodeDecodeError:
            continue
        own = tokenizer.backend_tokenizer.decode(list(pair), skip_special_tokens=False)
        if own != text:
            raise CannotCombine(
                f"tokens {pair} should write {text!r} but this tokenizer decodes {own!r}: bytes need a tokenizer whose "
                "tokens each add their own bytes"
            )
