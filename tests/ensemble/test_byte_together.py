"""Texts that are read at the same time, in trees of one cache, say what each says by itself."""

import numpy as np
import pytest
import torch
from tiny_bytes import LEFT, by_hand, member, stepwise, tokenizer
from tiny_members import gpt2

from graft.ensemble.byte_level import forest as forests
from graft.ensemble.byte_level import leaf as leaves
from graft.ensemble.byte_level import packed as packs
from graft.ensemble.byte_level.asking import Ask, together
from graft.ensemble.byte_level.byte_model import EXACT, ByteModel, Cover
from graft.ensemble.byte_level.cover import Born
from graft.ensemble.byte_level.following import cut
from graft.ensemble.byte_level.forest import Forest, style_of
from graft.ensemble.byte_level.leaf import Leaf
from graft.ensemble.byte_level.packed import Piece, blocks_of
from graft.ensemble.byte_level.scorer import distributions, score
from graft.ensemble.model import ensemble_of

TEXTS = [b"abcabcacb" * 5, b"", b"a", b"bcab", b"cabca" * 9, b"xbca", b"ccba" * 3]
SOME = Cover(drop=0.03, join=0.3)


@pytest.mark.parametrize("cover", [Cover(drop=0.0, join=0.0, most=2), SOME, Cover("canonical", 0.0, 0.0, None)])
@pytest.mark.parametrize("limit", [None, 12])
def test_scoring_many_texts_is_scoring_each(cover, limit):
    reader = ByteModel(member(6, LEFT), LEFT, cover, limit=limit)
    alone = [score(reader, [text])[0] for text in TEXTS]
    for own, found in zip(alone, score(reader, TEXTS), strict=True):
        assert found.log_probs == pytest.approx(own.log_probs, abs=1e-4)
        assert found.lost == pytest.approx(own.lost, abs=1e-3)


def test_distributions_of_many_texts_are_those_counted_by_hand():
    model = member(6, LEFT)
    texts = [b"abcab", b"", b"cb", b"bca"]
    for text, nexts in zip(texts, distributions(ByteModel(model, LEFT, EXACT), texts), strict=True):
        assert nexts.shape == (len(text), 257)
        for end, found in enumerate(nexts):
            assert np.allclose(found, by_hand(model, LEFT, text[:end]), atol=1e-6)
        assert np.allclose(nexts.sum(-1), 1, atol=1e-12)


def test_texts_in_one_pass_need_about_as_many_passes_as_the_longest_alone():
    reader = ByteModel(gpt2(3), LEFT, SOME)
    texts = [b"abcabcacb" * 4, b"cabca" * 7, b"ccbabcab" * 4, b"bacac" * 7]
    score(reader, texts)  # what follows single tokens is read once and kept

    def passes(texts):
        before = reader.reader.forwards
        score(reader, texts)
        return reader.reader.forwards - before

    alone = [passes([text]) for text in texts]
    assert passes(texts) <= 1.5 * max(alone) < sum(alone)


def test_padding_and_rows_that_wait_change_nothing(monkeypatch):
    """Trees that need many and few tokens at once, in one pass and in several."""
    reader = ByteModel(member(6, LEFT), LEFT, SOME)
    wanted = score(reader, TEXTS)
    for spare, logits in ((0, 2**24), (10**6, 2**24), (16, 64)):
        monkeypatch.setattr(leaves, "SPARE", spare)
        monkeypatch.setattr(forests, "LOGITS", logits)
        for own, found in zip(wanted, score(reader, TEXTS), strict=True):
            assert found.log_probs == pytest.approx(own.log_probs, abs=1e-4)


def test_trees_that_are_attended_to_together_say_what_each_does_alone(monkeypatch):
    reader = ByteModel(member(6, LEFT), LEFT, SOME)
    found = []
    for most in (0, 20, 10**6):
        monkeypatch.setattr(packs, "FEW", most)
        monkeypatch.setattr(packs, "PADDED", min(most, 2))
        found.append(np.concatenate([each.log_probs for each in score(reader, TEXTS)]))
    assert np.allclose(found[0], found[1], atol=1e-5)
    assert np.allclose(found[0], found[2], atol=1e-5)


def test_trees_are_attended_to_together_unless_most_would_be_padding():
    def trees(*sizes):
        ends = np.cumsum(sizes)
        pieces = [
            Piece(end - size, end, tree, np.ones((size, 3 + tree), bool))
            for tree, (size, end) in enumerate(zip(sizes, ends, strict=True))
        ]
        blocks, tokens, rows = blocks_of(pieces, torch.float32, torch.device("cpu"))
        order = torch.arange(ends[-1])
        assert sum(block.mask[:, 0, :, 0].numel() for block in blocks) == len(order if tokens is None else tokens)
        assert (tokens is None) == (rows is None)
        assert (order if tokens is None else tokens[rows]).tolist() == order.tolist()
        return [(block.trees.start, block.trees.stop, tuple(block.mask.shape)) for block in blocks]

    assert trees(2, 1, 2) == [(0, 3, (3, 1, 2, 5))]
    assert trees(9, 1, 1) == [(0, 3, (3, 1, 9, 5))]
    assert trees(90, 1, 1) == [(0, 1, (1, 1, 90, 3)), (1, 3, (2, 1, 1, 5))]
    assert trees(90, 88, 20) == [(0, 2, (2, 1, 90, 4)), (2, 3, (1, 1, 20, 5))]
    assert trees(90, 60, 50) == [(0, 1, (1, 1, 90, 3)), (1, 2, (1, 1, 60, 4)), (2, 3, (1, 1, 50, 5))]
    assert trees(1, 1, 90) == [(0, 2, (2, 1, 1, 4)), (2, 3, (1, 1, 90, 5))]


def test_what_two_ask_for_is_read_once():
    reader = ByteModel(member(6, LEFT), LEFT, EXACT).reader
    forest = Forest(reader, 1)
    root = forest.root()[0]
    token = int(reader.later.ids[0])

    def asking():
        (found,) = yield Ask([Leaf(root, token)])
        (behind,) = yield Ask([Leaf(found[0], token)])
        return found, behind

    before = reader.tokens_read
    (one, two), (same, again) = together(forest, [asking(), asking()])
    assert reader.tokens_read - before == 2
    assert (one[0] is same[0], two[0] is again[0]) == (True, True)
    with torch.no_grad():
        logits = reader.model(input_ids=torch.tensor([[1, token, token]])).logits[0, -1]
    assert np.allclose(two[1].logs, logits[[*reader.later.ids, 2]].log_softmax(-1)[:-1], atol=1e-5)


def test_a_special_token_that_a_text_speaks_of_is_written_by_its_letters():
    words = tokenizer("<>abeos")
    model = member(3, words)
    ids = words.get_vocab()
    reader = ByteModel(model, words, Cover("canonical", 0.0, 0.0, None))
    assert cut(reader, b"a<eos>b", True) == [ids[letter] for letter in "a<eos>b"]
    leaf = Forest(reader.reader, 1).root()[0]
    for letter in "a<eos>":
        assert reader._canonical(Born(leaf, ids[letter], 0.0, 1.0))
        leaf = Leaf(leaf, ids[letter])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, *(ids[letter] for letter in "a<eos>")]])).logits[0]
    allowed = [2, *(ids[letter] for letter in "<>abeos")]
    wanted = [
        float(row[allowed].log_softmax(-1)[allowed.index(ids[c])]) for row, c in zip(logits, "a<eos>b", strict=True)
    ]
    assert score(reader, ["a<eos>b"])[0].log_probs == pytest.approx(wanted, abs=1e-5)
    assert style_of(reader.reader) == "packed"


def test_an_ensemble_as_a_member_counts_the_tokens_that_lead_to_one_and_not_all_that_branch():
    """Where it reads 64 tokens, a text of 90 bytes needs more than that in all, on branches next to each other."""
    model = member(6, LEFT)
    alone = ByteModel(model, LEFT, SOME, limit=64)
    inside = ByteModel(ensemble_of({"one": model, "same": model}, [0.5, 0.5]), LEFT, SOME)
    assert (style_of(inside.reader), inside.reader.limit) == ("additive", 64)
    text = b"abcabcacb" * 10
    (own,), (found,) = score(alone, [text]), score(inside, [text])
    assert found.log_probs == pytest.approx(own.log_probs, abs=1e-4)
    assert inside.reader.tokens_read > 64


def test_rows_that_need_nothing_read_ahead_where_others_must_be_read():
    """Decoding in a batch then takes fewer passes than the rows' needs at different bytes, and says the same."""
    model = member(6, LEFT)
    texts = [b"abcabcacbabcabcabcacb", b"cabcacabcacabcacabcac", b"bacacbacacbacacbacacb"]

    def passes(trees):
        reader = ByteModel(model, LEFT, SOME)
        score(reader, texts)  # what follows single tokens is read once and kept
        before, forest = reader.reader.forwards, Forest(reader.reader, len(trees))
        states = reader.begin(forest, range(len(trees)))
        for data in zip(*(texts[tree] for tree in trees), strict=True):
            states = reader.advance(forest, states, data)
        return reader.reader.forwards - before, [state.next for state in states]

    alone = [passes([tree]) for tree in range(3)]
    together, found = passes([0, 1, 2])
    assert together < sum(count for count, _ in alone)
    for (_, (wanted,)), own in zip(alone, found, strict=True):
        assert np.allclose(wanted, own, atol=1e-4)


def test_what_is_read_ahead_is_what_comes_to_pass_and_changes_nothing():
    reader = ByteModel(member(6, LEFT), LEFT, SOME)
    forest = Forest(reader.reader, 1)
    (state,) = reader.begin(forest, [0])
    drafted = reader._likely(forest, state)
    assert drafted
    plain = ByteModel(member(6, LEFT), LEFT, SOME)
    other = Forest(plain.reader, 1)
    plain._likely = lambda *_: []
    (same,) = plain.begin(other, [0])
    for _ in range(12):
        byte = int(state.next[:256].argmax())
        assert np.allclose(state.next, same.next, atol=1e-5)
        (state,), (same,) = reader.advance(forest, [state], [byte]), plain.advance(other, [same], [byte])


def test_a_known_text_takes_fewer_passes_than_its_bytes_one_by_one_also_where_its_tokenizer_is_no_guide():
    """Of a random model, which finds other sequences likelier again and again."""
    text = b"abcabcacbbcab" * 4

    def passes(read):
        reader = ByteModel(member(6, LEFT), LEFT, SOME)
        read(reader)  # what follows single tokens is read once and kept
        before = reader.reader.forwards
        read(reader)
        return reader.reader.forwards - before

    assert passes(lambda reader: score(reader, [text])) < 0.8 * passes(lambda reader: stepwise(reader, text))
