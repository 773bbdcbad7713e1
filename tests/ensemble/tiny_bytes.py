"""Tiny tokenizers over a few bytes, and byte probabilities by direct enumeration of token sequences."""

import functools
import math

import numpy as np
import torch
from tiny_members import llama
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from graft.ensemble.byte_level.byte_model import EXACT, ByteModel
from graft.ensemble.byte_level.forest import Forest
from graft.ensemble.model import ensemble_of

SPECIAL = ("<pad>", "<bos>", "<eos>")


def tokenizer(letters, merges=(), order=None):
    """A BPE tokenizer; `order` permutes the ids of what stands behind the special tokens."""
    words = [*letters, *(a + b for a, b in merges)]
    words = [*SPECIAL, *(words if order is None else [words[place] for place in order])]
    inner = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=list(merges)))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


LEFT = tokenizer("abc", [("a", "b"), ("b", "c"), ("ab", "c"), ("c", "a")])
RIGHT = tokenizer("cba", [("b", "a"), ("c", "b"), ("a", "b")])


def size(words):
    return len(words.get_vocab())


def member(seed, words, more=0, **settings):
    """A random model of these tokens, `more` rows that no token uses."""
    return llama(seed, tokens=size(words) + more, **settings)


def spelt(words):
    return {place: word.encode() for word, place in words.get_vocab().items() if word not in SPECIAL}


def brute(model, words):
    """p(text begins with these bytes) and p(text is these bytes), summed over every sequence of tokens."""
    tokens = spelt(words)

    @functools.cache
    def after(sequence):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[1, *sequence]])).logits[0, -1].double()
        allowed = [2, *tokens]
        return dict(zip(allowed, logits[allowed].softmax(-1).tolist(), strict=True))

    def begins(text, sequence=(), done=b""):
        if done.startswith(text):
            return 1.0
        fitting = {
            t: done + own for t, own in tokens.items() if (done + own).startswith(text) or text.startswith(done + own)
        }
        return math.fsum(after(sequence)[t] * begins(text, (*sequence, t), new) for t, new in fitting.items())

    def ends(text, sequence=(), done=b""):
        fitting = {t: done + own for t, own in tokens.items() if text.startswith(done + own)}
        here = after(sequence)[2] if done == text else 0.0
        return here + math.fsum(after(sequence)[t] * ends(text, (*sequence, t), new) for t, new in fitting.items())

    return begins, ends


def by_hand(model, words, text):
    """[257] probabilities of the next byte and of the end behind a text."""
    begins, ends = brute(model, words)
    whole = begins(text)
    found = torch.zeros(257, dtype=torch.double)
    for byte in {each[0] for each in spelt(words).values()} | {b for each in spelt(words).values() for b in each}:
        found[byte] = begins(text + bytes([byte])) / whole
    found[256] = ends(text) / whole
    return found


def told(model, words, text, cover=EXACT, **options):
    """[len(text) + 1, 257]: the same of the model over bytes, before each byte and behind the last."""
    reader = ByteModel(model, words, cover, **options)
    forest = Forest(reader.reader, 1)
    (state,) = reader.begin(forest, [0])
    nexts = [state.next]
    (last,) = reader.follow(forest, [state], [text], [lambda place, state: nexts.append(state.next)])
    return torch.tensor(np.stack(nexts)), last


def stepwise(reader, text):
    """The state behind a text, byte by byte."""
    forest = Forest(reader.reader, 1)
    (state,) = reader.begin(forest, [0])
    for byte in text:
        (state,) = reader.advance(forest, [state], [byte])
    return state


def pair(cover=EXACT, combine="linear", weights=(0.6, 0.4), **options):
    """An ensemble over bytes of two models whose tokens differ."""
    models_ = {"left": member(1, LEFT, 2), "right": member(5, RIGHT)}
    return ensemble_of(models_, list(weights), combine, tokenizers=[LEFT, RIGHT], cover=cover, **options)
