"""Training tokenizers. Whatever the algorithm, every text encodes and decodes exactly, words never seen included.

All three work on bytes: the text's UTF-8 bytes are written as 256 printable letters first (as GPT-2 does) and all of
these are in the vocabulary, so that nothing is ever unknown.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from graft.data.amount import text_bytes
from graft.data.corpus import AnyCorpus, text_of
from graft.data.encode import encode
from graft.data.render import ends
from graft.errors import Problem, SettingsError
from graft.progress import Progress, say

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

Algorithm = Literal["bpe", "unigram", "wordpiece"]

BOS, EOS, PAD, MASK = "<s>", "</s>", "<pad>", "<mask>"
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(100))
"""Stand for the spans that span corruption takes out (T5's names)."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

CONTINUES = "▁"
"""Starts a WordPiece token that goes on inside a word. Unlike `##` it is no letter of the byte alphabet, so that a
text which holds it still decodes exactly."""


def train_tokenizer(
    corpus: AnyCorpus, algorithm: Algorithm, size: int, *, sentinels: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `size` tokens trained on the train split; the same corpus gives the same tokenizer.

    `sentinels` adds the hundred tokens that span corruption needs. Raises SettingsError for a size that cannot hold
    every byte.
    """
    from tokenizers import decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if said := too_small(algorithm, size, sentinels=sentinels):
        raise SettingsError([Problem(("tokenizer", "size"), said)])
    special = [PAD, BOS, EOS, MASK, *(SENTINELS if sentinels else ())]
    tokenizer = _trained(corpus, algorithm, size, special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = (
        decoders.Sequence([decoders.Replace(CONTINUES, ""), decoders.ByteLevel()])
        if algorithm == "wordpiece"
        else decoders.ByteLevel()
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        mask_token=MASK,
        additional_special_tokens=list(SENTINELS) if sentinels else None,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def too_small(algorithm: Algorithm, size: int, *, sentinels: bool) -> str:
    """What is wrong with a size that cannot hold every byte and the special tokens; empty where nothing is."""
    special = 4 + (len(SENTINELS) if sentinels else 0)
    least = special + (512 if algorithm == "wordpiece" else 256)
    if size >= least:
        return ""
    twice = ", each at the start of a word and inside of one" if algorithm == "wordpiece" else ""
    named = f"all bytes{twice}, and {special} special tokens"
    return f"expected at least {least} tokens for {named}, found {size}: raise `tokenizer.size`"


def put_ends(tokenizer: PreTrainedTokenizerFast, architecture: str) -> None:
    """Let a tokenizer put around a text by itself, in place, what training puts there, for whoever reads with it.

    For a decoder the start token (it writes the end itself), for an encoder the start and the end, for the encoder of
    an encoder-decoder the end. A tokenizer that does so already stays as it is, and so does what offsets it gives.
    """
    from tokenizers import processors

    start, end = ends(tokenizer)
    front, behind = start if architecture != "encoder-decoder" else [], end if architecture != "decoder" else []
    if tokenizer("a")["input_ids"] == [*front, *encode(["a"], tokenizer)[0], *behind]:
        return
    backend = tokenizer.backend_tokenizer
    before, after = (tokenizer.convert_ids_to_tokens(ids) for ids in (front, behind))
    special = list(zip([*before, *after], [*front, *behind], strict=True))
    template = processors.TemplateProcessing(
        single=[*before, "$A", *after], pair=[*before, "$A", "$B", *after], special_tokens=special
    )
    offsets = (
        [processors.ByteLevel(trim_offsets=False)] if isinstance(backend.post_processor, processors.ByteLevel) else []
    )
    backend.post_processor = processors.Sequence([*offsets, template]) if offsets else template


def _trained(corpus: AnyCorpus, algorithm: Algorithm, size: int, special: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    common: dict[str, Any] = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer, trainer = {
        "bpe": lambda: (Tokenizer(models.BPE()), trainers.BpeTrainer(vocab_size=size, **common)),
        "unigram": lambda: (Tokenizer(models.Unigram()), trainers.UnigramTrainer(vocab_size=size, **common)),
        "wordpiece": lambda: (
            Tokenizer(models.WordPiece(unk_token=PAD, max_input_chars_per_word=10**6)),
            trainers.WordPieceTrainer(
                vocab_size=size,
                continuing_subword_prefix=CONTINUES,
                # named beforehand, these get the same numbers in every training, and with them ties the same order
                **{**common, "special_tokens": [*special, *alphabet, *(CONTINUES + letter for letter in alphabet)]},
            ),
        ),
    }[algorithm]()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(_texts(corpus, then=f"finding {size:,} tokens"), trainer=trainer)
    if algorithm == "wordpiece":
        tokenizer = Tokenizer(_closed_wordpiece(tokenizer.get_vocab(), special, alphabet, size))
        tokenizer.add_special_tokens(special)
    elif algorithm == "unigram":
        tokenizer = _settled_unigram(tokenizer, corpus, special)
    return tokenizer


def _closed_wordpiece(learned: dict[str, int], special: list[str], alphabet: list[str], size: int) -> Any:
    """The learned vocabulary with every byte added both as a start and as a continuation, cut to `size`."""
    from tokenizers import models

    certain = [*special, *alphabet, *(CONTINUES + letter for letter in alphabet)]
    held = set(certain)
    rest = [token for token in sorted(learned, key=learned.__getitem__) if token not in held]
    vocabulary = {token: index for index, token in enumerate([*certain, *rest][:size])}
    return models.WordPiece(
        vocabulary, unk_token=PAD, max_input_chars_per_word=10**6, continuing_subword_prefix=CONTINUES
    )


def _settled_unigram(trained: Tokenizer, corpus: AnyCorpus, special: list[str], rounds: int = 4) -> Tokenizer:
    """The trained vocabulary with scores that are the same in every training.

    The trainer sums over threads in no fixed order, so that its scores (not which tokens it keeps) differ from run to
    run. Here they are found anew by hard EM (Kudo 2018, section 3.2, with the best segmentation in the place of all),
    from the segmentation with the fewest tokens.
    """
    from collections import Counter

    from tokenizers import Tokenizer, models

    tokens = [*special, *sorted(set(trained.get_vocab()) - set(special))]
    scores = [-1.0] * len(tokens)
    for _ in range(rounds):
        made = Tokenizer(models.Unigram(list(zip(tokens, scores, strict=True))))
        made.pre_tokenizer = trained.pre_tokenizer
        made.add_special_tokens(special)
        made.encode_special_tokens = True  # what a text says of them counts as text
        count: Counter[int] = Counter()
        for batch in _batches(_texts(corpus)):
            for encoded in made.encode_batch_fast(batch, add_special_tokens=False):
                count.update(encoded.ids)
        total = math.log(sum(count.values()) + 0.5 * len(tokens))
        scores = [0.0 if t in special else math.log(count[i] + 0.5) - total for i, t in enumerate(tokens)]
    settled = Tokenizer(models.Unigram(list(zip(tokens, scores, strict=True))))
    settled.add_special_tokens(special)
    return settled


def _batches(texts: Iterator[str], size: int = 64) -> Iterator[list[str]]:
    while batch := list(itertools.islice(texts, size)):
        yield batch


def _texts(corpus: AnyCorpus, piece: int = 1 << 16, then: str | None = None) -> Iterator[str]:
    """The training texts in pieces of at most `piece` characters, so that a long document is never held twice.

    `then`: what begins behind the last one, and is said.
    """
    with Progress(f"reading {corpus.name}.train for a tokenizer", text_bytes(corpus, "train"), "bytes") as progress:
        for record in corpus.records("train"):
            text = text_of(record)
            progress.advance(len(text))
            yield from (text[i : i + piece] for i in range(0, len(text), piece))
    if then is not None:
        say(then)
