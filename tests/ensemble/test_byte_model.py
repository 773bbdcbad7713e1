"""Byte probabilities of a model over tokens, against direct enumeration of all token sequences."""

import math

import numpy as np
import pytest
import torch
from tiny_bytes import LEFT, RIGHT, brute, by_hand, member, spelt, stepwise, tokenizer, told
from tiny_members import bloom, gpt2, llama, mistral
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from graft.ensemble.byte_level.byte_model import EXACT, ByteModel, Cover
from graft.ensemble.byte_level.cover import Born, Told, chosen, fresh
from graft.ensemble.byte_level.forest import Forest, style_of
from graft.ensemble.byte_level.leaf import Leaf
from graft.ensemble.byte_level.packed import IMPLEMENTATION, attention, packing
from graft.ensemble.byte_level.reader import Reader
from graft.ensemble.byte_level.scorer import score
from graft.ensemble.byte_level.spelling import spelling_of
from graft.ensemble.byte_level.trie import Trie
from graft.errors import RunError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TEXTS = [b"", b"a", b"ab", b"abc", b"cabca", b"bcabcb"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_next_byte_is_a_sum_over_all_token_sequences(text):
    model = member(1, LEFT, 2)
    found, _ = told(model, LEFT, text)
    assert torch.allclose(found[-1], by_hand(model, LEFT, text), atol=1e-6)
    assert torch.allclose(found.sum(-1), torch.ones(len(text) + 1, dtype=torch.double), atol=1e-12)


def test_the_product_over_a_text_is_the_probability_that_texts_begin_with_it():
    model = member(3, RIGHT)
    begins, ends = brute(model, RIGHT)
    reader = ByteModel(model, RIGHT, EXACT)
    for text in TEXTS[1:]:
        (document,) = score(reader, [text])
        assert document.log_probs.sum() == pytest.approx(math.log(begins(text)), abs=1e-5)
        assert (document.bytes, document.lost) == (len(text), pytest.approx(0, abs=1e-6))
    nexts, _ = told(model, RIGHT, b"abc")
    whole = math.exp(score(reader, [b"abc"])[0].log_probs.sum()) * float(nexts[-1, 256])
    assert whole == pytest.approx(ends(b"abc"), rel=1e-5)


def test_texts_of_all_endings_together_have_probability_one():
    """Over a one-letter alphabet: Σ p(text of n bytes, then the end) and what is longer."""
    words = tokenizer("a", [("a", "a")])
    model = member(2, words)
    nexts, _ = told(model, words, b"a" * 6)
    longer, total = 1.0, 0.0
    for behind in nexts:
        total += longer * float(behind[256])
        longer *= float(behind[ord("a")])
    assert total + longer == pytest.approx(1, abs=1e-9)


def test_tokens_of_the_same_bytes_count_together():
    words = tokenizer("ab", [("a", "b")])
    double = tokenizer("ab", [("a", "b")])
    double.add_tokens(["ab "])
    model = llama(4, tokens=len(double.get_vocab()))
    reader = ByteModel(model, words, EXACT)
    spelling = spelling_of(words)
    twice = (*spelling.later, b"ab")
    twin = Reader(model, type(spelling)(twice, twice, spelling.ends, spelling.start))
    _, behind = Forest(twin, 1).root()
    logits = model(input_ids=torch.tensor([[1]])).logits[0, -1].detach()
    wanted = logits[[2, 3, 4, 5, 6]].double().softmax(-1)
    assert behind.root[ord("a")] == pytest.approx(float(wanted[1] + wanted[3] + wanted[4]), rel=1e-5)
    assert len([token for token in twin.later.ids if twice[token] == b"ab"]) == 2
    assert stepwise(reader, b"a").next.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "make", [lambda: gpt2(3), lambda: bloom(4), lambda: mistral(2)], ids=["gpt2", "bloom", "window"]
)
def test_every_architecture_gives_the_enumerated_probabilities(make):
    """ALiBi and sliding windows do not honour a mask over a tree: those are read whole, and are as right."""
    model = make()
    reader = ByteModel(model, LEFT, EXACT)
    assert style_of(reader.reader) == ("packed" if model.config.model_type == "gpt2" else "plain")
    assert torch.allclose(torch.tensor(stepwise(reader, b"bcab").next), by_hand(model, LEFT, b"bcab"), atol=1e-5)
    assert torch.allclose(told(model, LEFT, b"bcab")[0][-1], by_hand(model, LEFT, b"bcab"), atol=1e-5)


@pytest.mark.parametrize("cover", [EXACT, Cover(drop=0.02, join=0.1), Cover("canonical", 0.0, 0.0, None)])
def test_a_known_text_gives_what_reading_it_byte_by_byte_gives(cover):
    model = member(6, LEFT)
    whole, last = told(model, LEFT, b"abcabcacb", cover)
    reader = ByteModel(model, LEFT, cover)
    for end in range(10):
        state = stepwise(reader, b"abcabcacb"[:end])
        assert np.allclose(state.next, whole[end], atol=1e-5)
    assert state.lost == pytest.approx(last.lost, abs=1e-4)


def test_several_texts_in_step_are_each_alone_and_what_is_dead_is_cut_out_of_the_cache():
    reader = ByteModel(member(6, LEFT), LEFT, Cover(drop=0.05, most=3))
    texts = [b"abcab" * 12, b"ccbab" * 12, b"bacac" * 12]
    alone = [stepwise(reader, text).next for text in texts]
    for trees in ([0, 1, 2], [0, 0, 0]):
        forest = Forest(reader.reader, 1 + max(trees))
        states = reader.begin(forest, trees)
        columns = 0
        for data in zip(*texts, strict=True):
            states = reader.advance(forest, states, data)
            columns = max(columns, sum(forest._columns))
        for state, wanted in zip(states, alone, strict=True):
            assert np.allclose(state.next, wanted, atol=1e-4)
        assert columns <= 2 * sum(len(text) for text in texts)
    assert style_of(reader.reader) == "packed"


@pytest.mark.parametrize(("way", "style"), [("sdpa", "packed"), ("eager", "additive")])
def test_texts_side_by_side_in_one_row_and_padded_ones_are_what_each_is_alone(way, style):
    """Heads that share keys; the texts are of different length and branch at different places."""
    model = member(6, LEFT, num_key_value_heads=1)
    texts = [b"abcabca", b"ccb", b"bacac"]
    alone = [told(model, LEFT, text)[0] for text in texts]
    ids = torch.tensor([[1, 3, 4, 5]])
    before = model(input_ids=ids).logits
    model.set_attn_implementation(way)
    reader = ByteModel(model, LEFT, EXACT)
    forest = Forest(reader.reader, 3)
    states = reader.begin(forest, range(3))
    nexts = [[state.next] for state in states]
    notes = [lambda place, state, own=own: own.append(state.next) for own in nexts]
    reader.follow(forest, states, texts, notes)
    assert style_of(reader.reader) == style
    for own, wanted in zip(nexts, alone, strict=True):
        assert np.allclose(np.stack(own), wanted, atol=1e-5)
    assert model.config._attn_implementation == way
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)


def test_rows_that_stand_side_by_side_have_no_padding():
    """As many tokens are read as there are sequences, whatever each text needs."""
    reader = ByteModel(member(6, LEFT), LEFT, EXACT)
    style_of(reader.reader)
    forest = Forest(reader.reader, 3)
    reader.reader.tokens_read = 0
    leaves = [Leaf(forest.root(row)[0], token) for row, many in enumerate((1, 5, 2)) for token in range(3, 3 + many)]
    forest.tell(leaves)
    assert reader.reader.tokens_read == len(leaves)


def test_attention_that_is_more_than_scaled_products_is_not_packed():
    model, seen = member(6, LEFT), torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match="softcap"):
        attention(model, seen, seen, seen, None, softcap=30.0)
    with pytest.raises(ZeroDivisionError), packing(model):
        assert model.config._attn_implementation == IMPLEMENTATION
        _ = 1 / 0
    assert model.config._attn_implementation == "sdpa"


def test_what_is_faint_is_left_out_only_where_something_is_complete():
    reader = Reader(member(6, LEFT), spelling_of(LEFT))
    _, behind = Forest(reader, 1).root()
    faint = fresh(None, behind, 1e-7, 0.0)
    born = [Born(None, 3, 0.0, 1.0)]
    assert chosen([faint], [], 1.0, 0.1, 0.1, None)[0] == [faint]
    assert chosen([faint], born, 1.0, 0.1, 0.1, None)[0] == []
    assert chosen([faint], born, 1.0, 0.0, 0.0, None)[0] == [faint]


def test_what_is_dropped_bounds_the_loss():
    """What is known for certain is less than all: the exact log-probability is above what is said less what is lost."""
    model, text = member(1, LEFT), b"abcabca"
    exact = score(ByteModel(model, LEFT, EXACT), [text])[0]
    for drop in (1e-3, 1e-2, 0.1, 0.3):
        found = score(ByteModel(model, LEFT, Cover(drop=drop, join=drop, most=None)), [text])[0]
        assert found.lost < 3
        assert exact.log_probs.sum() >= found.log_probs.sum() - found.lost - 1e-6
    fewest = score(ByteModel(model, LEFT, Cover(drop=0, join=0, most=1)), [text])[0]
    assert exact.log_probs.sum() >= fewest.log_probs.sum() - fewest.lost - 1e-6 > -math.inf


def test_total_variation_is_within_its_bound():
    """Of the distributions of the first four bytes, over all texts there are."""
    model, drop, length = member(1, LEFT), 0.05, 4
    begins, _ = brute(model, LEFT)
    reader = ByteModel(model, LEFT, Cover(drop=drop, join=drop, most=None))
    distance, texts = 0.0, [b""]
    for _ in range(length):
        texts = [text + letter for text in texts for letter in (b"a", b"b", b"c")]
    for text in texts:
        distance += max(0.0, begins(text) - math.exp(score(reader, [text])[0].log_probs.sum()))
    assert 0 < distance <= length * drop


def test_canonical_sequences_are_those_that_the_tokenizer_makes():
    """Σ over the sequences the tokenizer makes; a token that is not yet complete counts whatever it will be."""
    model = member(7, LEFT)
    reader = ByteModel(model, LEFT, Cover("canonical", 0.0, 0.0, None))
    states = {text: stepwise(reader, text) for text in (b"ab", b"abc", b"cabc")}
    for text, state in states.items():
        for each in state.open:
            path = each.leaf.path()
            own = b"".join(spelt(LEFT)[token] for token in path)
            assert LEFT(own.decode())["input_ids"] == path
            assert own + each.node.read == text
        assert state.next.sum() == pytest.approx(1)
    assert len(states[b"cabc"].open) < len(stepwise(ByteModel(model, LEFT, EXACT), b"cabc").open)


def test_what_a_tokenizer_makes_of_a_text_is_canonical_all_the_way():
    """Also where it cuts spaces at the end of a text otherwise than before a word."""
    text = "She said so.\n\n\nThen   she   didn't 12345 say\n\tit again; naïve 你好.\n\nSo  be it. " * 3
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>"], initial_alphabet=letters, show_progress=False)
    inner.train_from_iterator([text.replace("again;", "\n\n  \n")], trainer)
    words = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    reader = ByteModel(llama(1, tokens=len(words.get_vocab())), words, Cover("canonical"))
    leaf, tokens = Forest(reader.reader, 1).root()[0], words(text)["input_ids"]
    assert len(tokens) < 0.6 * len(text.encode())
    for token in tokens:
        assert reader._canonical(Born(leaf, token, 0.0, 1.0))
        leaf = Leaf(leaf, token)
    root, ids = Forest(reader.reader, 1).root()[0], words.get_vocab()
    pair = next(name for name in ids if len(name) == 2 and name.isascii() and name.isalpha())
    assert not reader._canonical(Born(Leaf(root, ids[pair[0]]), ids[pair[1]], 0.0, 1.0))
    assert math.isfinite(score(reader, [text[:60]])[0].log_probs.sum())


def test_ids_permuted_change_nothing():
    model = member(1, LEFT)
    order = [4, 0, 6, 2, 5, 1, 3]
    other = tokenizer("abc", [("a", "b"), ("b", "c"), ("ab", "c"), ("c", "a")], order)
    moved = member(1, LEFT)
    place = torch.tensor([other.get_vocab()[LEFT.convert_ids_to_tokens(i)] for i in range(len(LEFT.get_vocab()))])
    with torch.no_grad():
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            moved.get_parameter(name)[place] = model.get_parameter(name)
    assert torch.allclose(told(moved, other, b"cabcab")[0], told(model, LEFT, b"cabcab")[0], atol=1e-6)


def test_a_model_that_is_full_goes_on_from_its_newest_half():
    model = member(1, LEFT)
    reader = ByteModel(model, LEFT, Cover(drop=0, join=0, most=1), limit=8)
    text = b"abc" * 12
    state = stepwise(reader, text)
    (best,) = (each for each in state.open if not each.node.depth)
    assert 4 <= len(best.leaf.path()) < 8
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, *best.leaf.path()]])).logits[0, -1]
    wanted = logits[[*reader.reader.later.ids, 2]].log_softmax(-1)
    assert np.allclose(best.told.logs, wanted[:-1], atol=1e-5)
    whole, _ = told(model, LEFT, text, Cover(drop=0, join=0, most=1), limit=8)
    assert np.allclose(whole[-1], state.next, atol=1e-5)


def test_a_byte_that_no_token_writes_has_probability_zero_and_is_left_out():
    reader = ByteModel(member(1, LEFT), LEFT, EXACT)
    (document,) = score(reader, [b"abxc"])
    assert document.log_probs[2] == -math.inf
    assert document.log_probs[3] == pytest.approx(score(reader, [b"abc"])[0].log_probs[2], abs=1e-6)


def test_a_text_is_read_on_behind_what_cannot_be_written():
    """Behind one such byte as if it were not there, behind two from the last whole token."""
    words = tokenizer("ab", [("a", "b")])
    (document,) = score(ByteModel(member(3, words), words, EXACT), [b"abxyabab"])
    assert (document.log_probs[2:4] == -math.inf).all()
    assert np.isfinite(document.log_probs[[0, 1, 4, 5, 6, 7]]).all()


def test_nan_is_named():
    model = member(1, LEFT)
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    with pytest.raises(RunError, match="member 'bad' gives NaN"):
        stepwise(ByteModel(model, LEFT, EXACT, name="member 'bad'"), b"a")


def test_the_least_likely_give_their_mass_to_the_likeliest_up_to_their_share():
    behind = Told(Trie([b"a"]), np.zeros(1, np.float32), np.array([0.0, 1.0]), 0.0)
    moved = [fresh(None, behind, mass, 0.0) for mass in (0.5, 0.02)]
    born = [Born(None, 0, 0.0, mass) for mass in (0.4, 0.05, 0.03)]
    kept, new, rough = chosen(moved, born, 1.0, 0.04, 0.04, None)
    assert ([each.mass for each in kept], rough) == ([pytest.approx(0.5), pytest.approx(0.02)], False)
    assert [each.mass for each in new] == [pytest.approx(0.43), pytest.approx(0.05)]
    assert [each.mass for each in chosen(moved, born, 1.0, 0.0, 0.0, 2)[1]] == [
        pytest.approx(0.43),
        pytest.approx(0.05),
    ]
    assert len(chosen(moved, born, 1.0, 0.0, 0.0, None)[1]) == 3
    _, new, rough = chosen(moved, born[1:], 0.6, 0.2, 0.2, None)
    assert ([each.mass for each in new], rough) == ([pytest.approx(0.08)], True)
    assert chosen([], [], 0.0, 0.0, 0.0, None) == ([], [], False)


def test_a_trie_finds_ranges():
    trie = Trie([b"ab", None, b"a", b"b", b"abc", b"ab"])
    node = trie.root.next[ord("a")]
    assert (node.low, node.mid, node.high, bytes(node.bytes)) == (0, 1, 4, b"b")
    inner = node.next[ord("b")]
    assert sorted(trie.ids[inner.low : inner.mid].tolist()) == [0, 5]
    assert (inner.read, inner.next[ord("x")], trie.longest(b"abx")) == (b"ab", None, (0, 2))
    assert trie.longest(b"x") is None
    logs = np.log(np.array([0.1, 0.2, 0.3, 0.15, 0.25], np.float32))
    assert node.sums(logs) == pytest.approx([0.65])
