"""A mixture over the union of two vocabularies, against direct enumeration of token strings."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_members import greedy, llama
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from graft import data
from graft import models as graft_models
from graft.ensemble import VERB
from graft.ensemble.model import ensemble_of
from graft.ensemble.show import coloured, speaks
from graft.ensemble.spoken import FILE, Spoken
from graft.ensemble.union import union_of, unmatched_mass
from graft.errors import CannotCombine, RequestError, RunError
from graft.evaluate.scorer import Scorer
from graft.facts import facts_of
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


def saved(tmp_path: Path, members=MEMBERS):
    for name, words in (("left", LEFT), ("right", RIGHT)):
        members[name].save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in MEMBERS}


def test_a_recipe_makes_a_union_that_loads_writes_and_reads_text(tmp_path, ensemble):
    folders = saved(tmp_path)
    facts = {name: facts_of(folder) for name, folder in folders.items()}
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


TEXTS = ["abcd", "dcbab", "aabbccd", "bcbcbc", "cdcd", "abab", "dd", "cba"]


def union_folder(tmp_path, settings, name="both", members=MEMBERS):
    """The ensemble's folder and what the manifest would hold, from members that lie beside it."""
    folders = saved(tmp_path, members)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 4))
    source = {"source": "jsonl", "path": str(tmp_path / "text.jsonl"), "splits": {"dev": 0.5, "test": 0.1}}
    settings = VERB.parse({**settings, "vocabulary": "union"})
    facts = {name: facts_of(folder) for name, folder in folders.items()}
    assert VERB.check(settings, facts) == []
    out = tmp_path / name
    out.mkdir()
    job = Job(name, settings, 0, out, tmp_path / "s", tmp_path / "c", folders, {"text": data.parse(source)}, tmp_path)
    found = VERB.run(job)
    records = list(data.open_corpus({"text": data.parse(source)}, "text", tmp_path).records("dev"))
    return out, found, [record["text"] for record in records]


@torch.no_grad()
def test_weights_of_a_union_are_fitted_in_its_tokens(tmp_path):
    out, found, texts = union_folder(tmp_path, {"members": ["left", "right"], "weights": {"fit": "text.dev"}})
    told = {name: [] for name in MEMBERS}
    for text in texts:
        tokens = ["<bos>", *(LEFT.convert_ids_to_tokens(LEFT(text)["input_ids"]))]
        for end in range(1, len(tokens)):
            told["left"].append(own_next(MEMBERS["left"], LEFT, tokens[:end]).get(tokens[end], 0.0))
            told["right"].append(own_next(MEMBERS["right"], RIGHT, tokens[:end]).get(tokens[end], 0.0))
    columns = np.array([told["left"], told["right"]])
    grid = np.linspace(0, 1, 2001)[1:-1]
    losses = -np.log(grid[:, None] * columns[0] + (1 - grid[:, None]) * columns[1]).mean(1)
    assert found["loss"] == pytest.approx(losses.min(), abs=1e-4)
    assert found["weights"]["left"] == pytest.approx(grid[losses.argmin()], abs=2e-3)
    loaded = graft_models.load(out)
    scored = Scorer(loaded, graft_models.load_tokenizer(out)).documents(texts)
    assert -np.concatenate([each.log_probs for each in scored]).mean() == pytest.approx(found["loss"], abs=1e-4)
    assert set(found["unmatched_mass"]) == {"left", "right"}
    assert all(0 < mass < 1 for mass in found["unmatched_mass"].values())


def test_a_union_shows_who_speaks_and_how_much_is_not_mixed(tmp_path):
    given = {"members": {"left": 0.6, "right": 0.4}, "show": "text.dev"}
    out, found, texts = union_folder(tmp_path, given)
    kept = Spoken.from_plain(json.loads((out / FILE).read_text()))
    spoken = speaks(out, texts[0])
    assert "".join(spoken.tokens) == texts[0] == "".join(kept.tokens)
    for name in ("shares", "weights", "probs"):
        assert np.allclose(getattr(spoken, name), getattr(kept, name), atol=1e-5)
    assert kept.unmatched == pytest.approx(spoken.unmatched, abs=1e-5)
    assert found["unmatched_mass"] == pytest.approx(
        dict(zip(("left", "right"), spoken.unmatched, strict=True)), abs=1e-5
    )
    assert "on tokens that not all members have: left " in coloured(spoken).plain
    assert "on tokens that not all members have" in spoken.legend()


def test_a_gate_over_a_union_is_refused(tmp_path):
    facts = {name: facts_of(folder) for name, folder in saved(tmp_path).items()}
    raw = {"members": ["left", "right"], "vocabulary": "union", "weights": {"fit": "text.dev", "gate": 0}}
    assert any("a gate is for members of one vocabulary" in each for each in VERB.check(VERB.parse(raw), facts))


@torch.no_grad()
def test_a_member_that_needs_more_tokens_than_it_was_made_for_reads_the_newest_of_them(ensemble):
    """A token of the left member's is two of the right one's, which was made for 64: 80 are read in windows."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(3, 8, (1, 20), generator=generator)
    ids = torch.cat([letters, torch.full((1, 30), UNION.tokens.index("cd"))], 1)
    found = ensemble(input_ids=ids).logits[0]
    own = [each for token in ids[0].tolist() for each in UNION.sides[1].reads[token]]
    assert len(own) == 80
    left = MEMBERS["left"](input_ids=ids).logits[0, -1].softmax(-1)
    right = MEMBERS["right"](input_ids=torch.tensor([own[-64:]])).logits[0, -1].softmax(-1)
    expected = 0.6 * UNION.spread(left.log(), 0).exp() + 0.4 * UNION.spread(right.log(), 1).exp()
    assert torch.allclose(found[-1].exp(), expected, atol=1e-5)
    early = ensemble(input_ids=ids[:, :40]).logits[0]
    assert torch.allclose(found[:40], early, atol=1e-4)


@torch.no_grad()
def test_nan_of_a_member_that_lacks_the_first_token_is_seen():
    broken = llama(2, tokens=3)
    broken.lm_head.weight.fill_(math.nan)
    left, right = (
        PreTrainedTokenizerFast(tokenizer_object=with_fuse(words)) for words in (["x", "a", "b"], ["a", "b", "c"])
    )
    ensemble = ensemble_of({"fine": llama(1, tokens=3), "bad": broken}, [0.5, 0.5], union=union_of([left, right]))
    with pytest.raises(RunError, match=r"member 'bad' .*gives NaN logits"):
        ensemble(input_ids=torch.tensor([[1, 2]]))


def with_fuse(words):
    """A tokenizer of single letters."""
    inner = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[]))
    inner.decoder = decoders.Fuse()
    return inner
