"""Known texts through compiled functions, against the same texts with a state behind each byte."""

import math
import re
from pathlib import Path

import pytest
import torch
from tiny_bytes import LEFT, RIGHT, brute, member, tokenizer
from tiny_members import gpt2, mistral, mixed
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from graft.ensemble.byte_level import arrays, known, walking
from graft.ensemble.byte_level.byte_model import EXACT, ByteModel, Cover
from graft.ensemble.byte_level.reader import KEPT
from graft.ensemble.byte_level.scorer import followed, score

TEXTS = [b"abcabcacb" * 5, b"", b"a", b"bcab", b"cabca" * 9, b"ccba" * 3, b"cb", b"bacbacabc" * 7]
SOME = Cover()


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """Machine code is kept for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFT_CACHE", str(tmp_path_factory.mktemp("home")))
        arrays.kernels.cache_clear()
        yield
    arrays.kernels.cache_clear()


def same(found, wanted):
    for own, other in zip(found, wanted, strict=True):
        assert own.log_probs == pytest.approx(other.log_probs, abs=3e-5)  # of logits in float32, added up otherwise
        assert own.lost == pytest.approx(other.lost, abs=1e-4)


@pytest.mark.parametrize(
    "cover",
    [SOME, Cover(drop=0.0, join=0.0, most=2), Cover(drop=0.2, join=0.1), Cover(drop=0.0, join=0.3), Cover(most=None)],
    ids=str,
)
@pytest.mark.parametrize("limit", [None, 12, 3])
@pytest.mark.parametrize("seed", [1, 6])
def test_known_texts_are_what_following_them_gives(cover, limit, seed):
    reader = ByteModel(member(seed, LEFT, 2), LEFT, cover, limit=limit)
    assert known.serves(reader)
    same(score(reader, TEXTS), followed(reader, TEXTS))


@pytest.mark.parametrize("make", [lambda: (gpt2(3), LEFT), lambda: (member(3, RIGHT, num_key_value_heads=1), RIGHT)])
def test_other_models_too(make):
    model, words = make()
    reader = ByteModel(model, words, SOME)
    assert known.serves(reader)
    same(score(reader, TEXTS), followed(reader, TEXTS))


def test_both_readings_of_a_mixture_of_experts_are_moved():
    reader = ByteModel(mixed(gpt2(3)).double(), LEFT, Cover(drop=0.2, join=0.0))
    assert known.serves(reader)
    same(score(reader, TEXTS), followed(reader, TEXTS))


def test_a_vocabulary_of_which_not_all_is_kept_behind_every_token():
    letters = [chr(place) for place in range(97, 124)]
    twos = [(a, b) for a in letters for b in letters]
    words = tokenizer(letters, [*twos, *((a + b, c) for a, b in twos for c in letters)])
    reader = ByteModel(member(2, words), words, SOME)
    assert len(reader.reader.later.ids) > 20_000 > KEPT / walking.ROWS
    assert known.serves(reader)
    texts = [b"abcabdefxyzzy", b"hello{world", b"qq"]
    same(score(reader, texts), followed(reader, texts))


def test_in_bfloat16_it_is_about_what_it_is_in_float32():
    texts, model = [b"abcabcacb", b"cabcacabca", b"cb", b""], member(6, LEFT)
    wanted = score(ByteModel(model, LEFT, EXACT), texts)
    reader = ByteModel(model.to(torch.bfloat16), LEFT, EXACT)
    assert known.serves(reader)
    for own, other in zip(score(reader, texts), wanted, strict=True):
        # logits of up to 8 have steps of 2 ** -6, and each is a sum whose parts are rounded too
        assert own.log_probs == pytest.approx(other.log_probs, abs=0.1)
        assert own.lost == pytest.approx(0, abs=1e-3)


def test_the_product_over_a_text_is_the_probability_that_texts_begin_with_it():
    model = member(3, RIGHT)
    begins, _ = brute(model, RIGHT)
    reader = ByteModel(model, RIGHT, EXACT)
    assert known.serves(reader)
    for text in (b"a", b"ab", b"abc", b"cabca", b"bcabcb"):
        (document,) = score(reader, [text])
        assert document.log_probs.sum() == pytest.approx(math.log(begins(text)), abs=1e-5)
        assert document.lost == pytest.approx(0, abs=1e-6)


def test_bytes_that_no_token_writes_are_left_out():
    reader = ByteModel(member(1, LEFT), LEFT, SOME)
    texts = [b"abxc", b"xyab", b"abcx", b"x", b"abcabc"]
    found = score(reader, texts)
    same(found[-1:], followed(reader, texts[-1:]))
    for own, other in zip(found, followed(reader, texts), strict=True):
        assert own.log_probs == pytest.approx(other.log_probs, abs=1e-5)
    assert [each.log_probs[at] for each, at in zip(found, (2, 0, 3, 0), strict=False)] == [-math.inf] * 4


def test_tokens_that_write_nothing_at_the_start_of_a_text():
    """As SentencePiece has them: a space that stands before the first word alone."""
    words = ["<pad>", "<bos>", "<eos>", "▁", "a", "b", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    inner = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, merges))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    spoken = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    for cover in (SOME, EXACT):
        reader = ByteModel(member(4, spoken), spoken, cover)
        assert reader.reader.first.root.mid == 1
        texts = [b"ab a", b"", b"b", b"a ab b", b"aab ba"]
        same(score(reader, texts), followed(reader, texts))


def test_what_nothing_follows_any_more_is_left_out_and_changes_nothing(monkeypatch):
    """Nodes, columns and the ranges of bytes that were passed, in a text of many windows."""
    monkeypatch.setattr(walking, "DEAD", 24)
    monkeypatch.setattr(walking, "STRETCH", 128)
    reader = ByteModel(member(6, LEFT), LEFT, SOME, limit=12)
    texts = [b"abcabcacbbcab" * 30, b"cabbacabcc" * 17, b"ab"]
    walks = known.walked(reader, texts)
    wanted = followed(reader, texts)
    for walk, other in zip(walks, wanted, strict=True):
        assert not walk.failed
        assert walk.gold == pytest.approx(other.log_probs, abs=3e-5)
        assert walk.lost == pytest.approx(other.lost, abs=1e-3)
    assert int(walks[0].frame[known.at.BASE]) > 128
    assert walks[0].columns.sum() < 150


def test_rooms_that_are_too_small_grow(monkeypatch):
    reader = ByteModel(member(1, LEFT), LEFT, EXACT)
    monkeypatch.setattr(walking, "SIDES", 2)
    texts = [b"abcabca", b"cabcab"]
    same(score(reader, texts), followed(reader, texts))


def test_models_and_covers_that_are_not_served_are_followed():
    assert not known.serves(ByteModel(mistral(2), LEFT, SOME))
    assert not known.serves(ByteModel(member(1, LEFT), LEFT, Cover("canonical")))


def test_where_there_is_no_compiler_texts_are_followed(monkeypatch):
    reader = ByteModel(member(6, LEFT), LEFT, SOME)
    wanted = score(reader, TEXTS)
    monkeypatch.setattr(known, "kernels", lambda: None)
    assert not known.serves(reader)
    same(score(reader, TEXTS), wanted)


def test_a_text_takes_fewer_passes_than_following_it_and_no_more_tokens():
    reader = ByteModel(member(6, LEFT), LEFT, SOME)
    texts = [b"abcabcacbbcab" * 6] * 3

    def cost(read):
        before = reader.reader.forwards, reader.reader.tokens_read
        read(reader, texts)
        return reader.reader.forwards - before[0], reader.reader.tokens_read - before[1]

    score(reader, texts)  # what follows single tokens is read once and kept
    (passes, tokens), (others, more) = cost(score), cost(followed)
    assert passes <= others
    assert tokens <= 1.2 * more


def test_all_that_the_functions_are_written_in_decides_whether_kept_code_is_theirs():
    folder = Path(arrays.__file__).parent
    found, ahead = {"_layout.py"}, ["_walk.py"]
    while ahead:
        found.add(name := ahead.pop())
        imported = re.findall(r"^from graft\.ensemble\.byte_level\.(\w+) import", (folder / name).read_text(), re.M)
        ahead += {f"{one}.py" for one in imported} - found
    assert found == set(arrays.SOURCES)
