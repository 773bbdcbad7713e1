"""The tokenizer of models over bytes: a token is a byte and has its number; three more begin, end and pad texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.ensemble.byte_level.spelling import LETTERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = 257, 256, 258
"""Ids behind those of the bytes. The end's is the place where `cover` keeps its probability."""
SIZE = 259
IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "decoder_start_token_id": None}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that cuts every text into its UTF-8 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {EOS: "</s>", BOS: "<s>", PAD: "<pad>"}
    vocabulary = LETTERS | {name: place for place, name in names.items()}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=names[BOS],
        eos_token=names[EOS],
        pad_token=names[PAD],
        clean_up_tokenization_spaces=False,
    )
