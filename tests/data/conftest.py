"""A byte-level tokenizer, so that every token is known by hand."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graft.data.tokenizers import CHAT_TEMPLATE


@pytest.fixture(scope="session")
def letters():
    """Letter a is token 100 + its place; every other byte has a token as well."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = {chr(ord("a") + i): 100 + i for i in range(26)}
    free = iter(n for n in range(10, 400) if n not in set(known.values()))
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<mask>": 3}
    vocabulary |= {f"<extra_id_{i}>": 4 + i for i in range(6)}
    vocabulary |= {letter: known.get(letter) or next(free) for letter in alphabet}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", mask_token="<mask>",
        additional_special_tokens=[f"<extra_id_{i}>" for i in range(6)], chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
