"""What tokens of every kind of tokenizer add to a text, against what the tokenizer decodes itself."""

import itertools

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from graft.ensemble.byte_level.spelling import LETTERS, spelling_of
from graft.ensemble.byte_level.tokenizer import BOS, EOS, PAD, byte_tokenizer
from graft.errors import CannotCombine

TEXT = ["Die Straße, it isn't far. 你好 world! 12345  two  spaces\nand a line", "naïve café 🙂 don't stop"] * 3
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def fast(inner):
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_level(algorithm):
    inner = Tokenizer(models.BPE() if algorithm == "bpe" else models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    kind = trainers.BpeTrainer if algorithm == "bpe" else trainers.UnigramTrainer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXT, kind(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    )
    return fast(inner)


def with_fallback(decoder="llama"):
    """As SentencePiece writes it: `▁` for a space, `<0x0A>` for a byte that has no token."""
    words = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab", "你"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    inner = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    if decoder == "llama":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        chain = [decoders.ByteFallback(), decoders.Metaspace()]
    inner.decoder = decoders.Sequence(chain)
    return fast(inner)


def word_piece():
    words = [*SPECIAL, "the", "cat", "##s", "##at", ".", "'", "s", "don", "##'", "n", "'t"]
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece("##", True)
    return fast(inner)


KINDS = {
    "byte-level bpe": lambda: byte_level("bpe"),
    "byte-level unigram": lambda: byte_level("unigram"),
    "llama": with_fallback,
    "metaspace": lambda: with_fallback("metaspace"),
    "wordpiece": word_piece,
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_spell_what_the_tokenizer_decodes(kind):
    words = KINDS[kind]()
    spelling = spelling_of(words)
    ids = [i for i, each in enumerate(spelling.later) if each is not None]
    assert all(spelling.later[i] is None and spelling.first[i] is None for i in words.all_special_ids)
    for a, b, c in itertools.islice(itertools.product(ids[::7], ids[::5], ids[::11]), 3000):
        spelt = spelling.first[a] + spelling.later[b] + spelling.later[c]
        try:
            wanted = spelt.decode()
        except UnicodeDecodeError:
            continue
        assert words.backend_tokenizer.decode([a, b, c], skip_special_tokens=False) == wanted


@pytest.mark.parametrize("kind", ["byte-level bpe", "byte-level unigram", "llama"])
def test_a_text_is_spelt_by_its_tokens(kind):
    words = KINDS[kind]()
    spelling = spelling_of(words)
    for text in TEXT[:2]:
        first, *others = words(text, add_special_tokens=False)["input_ids"]
        assert spelling.first[first] + b"".join(spelling.later[i] for i in others) == text.encode()


def test_the_first_word_has_no_space_before_it():
    spelling, ids = spelling_of(with_fallback()), with_fallback().get_vocab()
    assert (spelling.first[ids["▁ab"]], spelling.later[ids["▁ab"]]) == (b"ab", b" ab")
    assert (spelling.first[ids["▁"]], spelling.later[ids["▁"]]) == (b"", b" ")
    assert spelling.later[ids["<0x0A>"]] == b"\n"
    spelling, ids = spelling_of(word_piece()), word_piece().get_vocab()
    assert [spelling.first[ids["cat"]], spelling.later[ids["cat"]], spelling.later[ids["##s"]]] == [
        b"cat",
        b" cat",
        b"s",
    ]
    assert spelling.later[ids["."]] == b"."


def test_added_tokens_are_their_own_text_and_several_ends_are_known():
    words = byte_level("bpe")
    words.add_tokens(["  naïve\n"])
    spelling = spelling_of(words, [1])
    assert spelling.later[words.get_vocab()["  naïve\n"]] == "  naïve\n".encode()
    assert (spelling.ends, spelling.start) == ((1, 2), 1)


def test_tokens_without_bytes_of_their_own_are_refused():
    words = byte_level("bpe")
    words.backend_tokenizer.decoder = decoders.BPEDecoder()
    with pytest.raises(CannotCombine, match=r"neighbours \(decoder BPEDecoder\)"):
        spelling_of(words)
    words.backend_tokenizer.decoder = decoders.Strip("a", 0, 1)
    with pytest.raises(CannotCombine, match="decoder Strip"):
        spelling_of(words)
    bare = Tokenizer(models.BPE({"a": 0}, []))
    bare.decoder = decoders.Fuse()
    with pytest.raises(CannotCombine, match="start or end token"):
        spelling_of(PreTrainedTokenizerFast(tokenizer_object=bare))


def test_the_tokenizer_over_bytes_gives_every_byte_its_number():
    words = byte_tokenizer()
    for text in TEXT[:2]:
        ids = words(text)["input_ids"]
        assert ids == list(text.encode())
        assert words.decode(ids) == text
    assert (words.bos_token_id, words.eos_token_id, words.pad_token_id) == (BOS, EOS, PAD)
    assert sorted(LETTERS.values()) == list(range(256))
    assert set(LETTERS) == set(pre_tokenizers.ByteLevel.alphabet())
    assert [each for each in spelling_of(words).later if each is not None] == [bytes([byte]) for byte in range(256)]
