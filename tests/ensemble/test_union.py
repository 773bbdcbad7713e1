"""A mixture over the union of two vocabularies, against direct enumeration of token strings."""

import math
from pathlib import Path

import pytest
import torch
from tiny_members import greedy, llama
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from graft import lineage
from graft import models as graft_models
from graft.ensemble import VERB
from graft.ensemble.model import ensemble_of
from graft.ensemble.union import union_of, unmatched_mass
from graft.errors import CannotCombine, RequestError
from graft.verb import Job


def tokenizer(letters, merges, pad="<pad>", decoder=None):
    words = [pad, "<bos>", "<eos>", *letters, *(a + b for a, b in merges)]
    inner = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=merges))
    inner.decoder = decoder or decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=pad, bos_token="<bos>", eos_token="<eos>")


LEFT = tokenizer("abcd", [("a", "b"), ("c", "d")])
RIGHT = tokenizer("dcba", [("b", "c"), ("a", "b")], pad="[PAD]")
UNION = union_of([LEFT, RIGHT])
MEMBERS = {"left": llama(1, tokens=9), "right": llama(2, tokens=9)}
WEIGHTS = [0.6, 0.4]


@pytest.fixture
def ensemble():
    return ensemble_of(MEMBERS, WEIGHTS, union=UNION)


def own_next(model, words, tokens):
    """Probability of each token string behind `tokens`, which a member reads one by one in its own ids."""
    ids = []
    for token in tokens:
        ids += [words.get_vocab()[token]] if token in words.get_vocab() else words(token)["input_ids"]
    probs = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
    names = {"[PAD]": "<pad>"}
    return {names.get(token, token): float(probs[place]) for token, place in words.get_vocab().items()}


def by_hand(tokens):
    left, right = own_next(MEMBERS["left"], LEFT, tokens), own_next(MEMBERS["right"], RIGHT, tokens)
    return [0.6 * left.get(token, 0) + 0.4 * right.get(token, 0) for token in UNION.tokens]


def test_the_union_keeps_the_first_members_ids_and_adds_the_others():
    assert UNION.tokens == ("<pad>", "<bos>", "<eos>", "a", "b", "c", "d", "ab", "cd", "bc")
    assert [UNION.tokens[i] for i in (~UNION.shared()).nonzero().flatten()] == ["cd", "bc"]


@torch.no_grad()
@pytest.mark.parametrize("tokens", [["<bos>", "a"], ["<bos>", "cd", "bc", "ab"], ["bc", "cd", "cd", "a", "bc"]])
def test_every_token_gets_what_its_owners_give(ensemble, tokens):
    ids = torch.tensor([[UNION.tokens.index(token) for token in tokens]])
    found = ensemble(input_ids=ids).logits[0]
    for end in range(1, len(tokens) + 1):
        assert torch.allclose(found[end - 1].exp(), torch.tensor(by_hand(tokens[:end])), atol=1e-6)
    assert torch.allclose(found.logsumexp(-1), torch.zeros(len(tokens)), atol=1e-5)


@torch.no_grad()
def test_a_padded_batch_is_each_row_alone_and_greedy_decoding_is_brute_force(ensemble):
    rows = [[1, 8, 9, 7], [9, 3]]
    ids = torch.tensor([rows[0], [0, 0, *rows[1]]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    found = ensemble.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=6, eos_token_id=None)
    for row, own in zip(found, rows, strict=True):
        alone = greedy(
            lambda ids: torch.tensor([by_hand([UNION.tokens[i] for i in ids[0].tolist()])]), torch.tensor([own]), 6
        )
        assert row[-6:].tolist() == alone[0, -6:].tolist()
    beams = ensemble.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=6, eos_token_id=None)
    single = ensemble.generate(ids[1:, 2:], num_beams=3, max_new_tokens=6, eos_token_id=None)
    assert beams[1, 4:].tolist() == single[0, 2:].tolist()


@torch.no_grad()
def test_the_same_vocabulary_twice_is_the_plain_mixture():
    ids = torch.tensor([[1, 8, 7, 3]])
    over = ensemble_of(MEMBERS, WEIGHTS, union=union_of([LEFT, LEFT]))(input_ids=ids).logits
    assert torch.allclose(over, ensemble_of(MEMBERS, WEIGHTS)(input_ids=ids).logits, atol=1e-6)


@torch.no_grad()
def test_mass_that_only_its_owner_gives_is_reported(ensemble):
    ids = torch.tensor([[1, 3]])
    given = {"attention_mask": None, "position_ids": None, "logits_to_keep": 1}
    told = [each.log_probs for each in ensemble.told(ids, given, None)[0]]
    cd = own_next(MEMBERS["left"], LEFT, ["<bos>", "a"])["cd"]
    bc = own_next(MEMBERS["right"], RIGHT, ["<bos>", "a"])["bc"]
    assert unmatched_mass(UNION, told) == pytest.approx([cd, bc], rel=1e-4)


def test_tokens_that_cannot_be_read_and_other_kinds_of_tokenizers_are_refused():
    poor = union_of([LEFT, tokenizer("ab", [])])
    with pytest.raises(CannotCombine, match="member 1 has neither the token 'cd'"):
        poor.cut(1, torch.tensor([[8]]), None)
    with pytest.raises(CannotCombine, match="write tokens differently"):
        union_of([LEFT, tokenizer("ab", [], decoder=decoders.ByteLevel())])
    with pytest.raises(RequestError, match="for mixtures"):
        ensemble_of(MEMBERS, [0.5, 0.5], "log_linear", union=UNION)


def saved(tmp_path: Path):
    for name, words in (("left", LEFT), ("right", RIGHT)):
        MEMBERS[name].save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in MEMBERS}


def test_a_recipe_makes_a_union_that_loads_writes_and_reads_text(tmp_path, ensemble):
    folders = saved(tmp_path)
    facts = {name: lineage.facts_of(folder) for name, folder in folders.items()}
    raw = {"members": {"left": 0.6, "right": 0.4}}
    (problem,) = VERB.check(VERB.parse(raw), facts)
    assert "different vocabularies" in problem
    assert "vocabulary: union" in problem
    settings = VERB.parse({**raw, "vocabulary": "union"})
    assert VERB.check(settings, facts) == []
    (problem,) = VERB.check(VERB.parse({**raw, "vocabulary": "union", "combine": "log_linear"}), facts)
    assert "for mixtures" in problem
    out = tmp_path / "both"
    out.mkdir()
    VERB.run(Job("both", settings, 0, out, tmp_path / "s", tmp_path / "c", folders, {}))
    loaded, words = graft_models.load(out), graft_models.load_tokenizer(out)
    ids = torch.tensor([[1, 8, 9, 7]])
    assert torch.equal(loaded(input_ids=ids).logits, ensemble(input_ids=ids).logits)
    assert words.decode([8, 9, 7]) == "cdbcab"
    assert words("abcd")["input_ids"] == LEFT("abcd")["input_ids"]
    assert math.isclose(float(loaded(input_ids=ids).logits[0, -1].exp().sum()), 1, abs_tol=1e-5)
