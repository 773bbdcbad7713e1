"""Members of several vocabularies that are combined only at common boundaries, and only where they differ."""

import json

import pytest
import torch
from test_union import LEFT, RIGHT, UNION, WEIGHTS, own_next, tokenizer, union_folder
from tiny_members import llama

from graft import models
from graft.ensemble import VERB
from graft.ensemble.agreed import write
from graft.ensemble.model import ensemble_of
from graft.ensemble.union import union_of
from graft.errors import RequestError, RunError


def writer(seed):
    """A member that hardly ever writes its special tokens."""
    model = llama(seed, tokens=9)
    with torch.no_grad():
        model.lm_head.weight[:3] = 0
    return model


MEMBERS = {"left": writer(35), "right": writer(135)}
PLAIN = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}


@pytest.fixture
def ensemble():
    return ensemble_of(MEMBERS, WEIGHTS, union=UNION)


def string(tokens):
    return "".join(UNION.tokens[each] for each in tokens)


def best(probs):
    return max(probs, key=lambda token: probs[token])


@torch.no_grad()
def reference(text, count, block):
    """The same, token by token, with every distribution read anew by the member alone."""
    text, begin, heard, combined = list(text), len(text), 0, 0
    while len(text) < begin + count:
        drafts = []
        while len(drafts) < min(block, begin + count - len(text)):
            tokens = [UNION.tokens[each] for each in text + drafts]
            drafts.append(UNION.tokens.index(best(own_next(MEMBERS["left"], LEFT, tokens))))
        whole, start = string((text + drafts)[1:]), string(text[1:])
        pieces = RIGHT.convert_ids_to_tokens(RIGHT(whole)["input_ids"])
        ends = {len("".join(pieces[:number])): number for number in range(len(pieces) + 1)}
        for place, draft in enumerate(drafts):
            at, token = len(start) + len(string(drafts[:place])), draft
            if at in ends:
                heard += 1
                other = own_next(MEMBERS["right"], RIGHT, ["<bos>", *pieces[: ends[at]]])
                if best(other) != UNION.tokens[draft]:
                    combined += 1
                    left = own_next(MEMBERS["left"], LEFT, [UNION.tokens[each] for each in text])
                    mixed = {each: 0.6 * left.get(each, 0) + 0.4 * other.get(each, 0) for each in UNION.tokens}
                    token = UNION.tokens.index(best(mixed))
            text.append(token)
            if token != draft:
                break
    return text, heard, combined


@pytest.mark.parametrize("block", [1, 3, 8])
@pytest.mark.parametrize("prompt", [[1, 3], [1, 8, 5], [1, 7, 9, 3, 4]])
def test_it_writes_what_the_definition_says(ensemble, prompt, block):
    found = write(ensemble, torch.tensor([prompt]), max_new_tokens=12, block=block)
    assert (found.ids.tolist(), found.agreed, found.combined) == reference(prompt, 12, block)


def test_the_prompts_of_this_test_reach_every_case():
    told = [reference(prompt, 12, 3)[1:] for prompt in ([1, 3], [1, 8, 5], [1, 7, 9, 3, 4])]
    assert any(heard < 12 for heard, _ in told)
    assert any(0 < combined < heard for heard, combined in told)


@pytest.mark.parametrize("block", [1, 4, 20])
def test_where_all_boundaries_agree_it_writes_what_the_mixture_writes(block):
    letters = tokenizer("abcdef", [])
    same = ensemble_of(MEMBERS, WEIGHTS, union=union_of([letters, letters]))
    ids = torch.tensor([[1, 3, 4, 5]])
    found = write(same, ids, max_new_tokens=12, block=block)
    assert torch.equal(found.ids[None], same.generate(ids, **PLAIN))
    assert found.agreed == 12
    assert 0 < found.combined < 12


def test_generate_writes_so_where_the_ensemble_says_it(ensemble):
    ids, mask = torch.tensor([[0, 1, 3], [1, 8, 5]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    whole = ensemble.generate(ids, attention_mask=mask, **PLAIN)
    ensemble.config.boundaries = 3
    found = ensemble.generate(ids, attention_mask=mask, **PLAIN)
    for row, prompt in zip(found, ([1, 3], [1, 8, 5]), strict=True):
        assert row[3:].tolist() == reference(prompt, 12, 3)[0][len(prompt) :]
    beams = ensemble.generate(ids, attention_mask=mask, **{**PLAIN, "num_beams": 2})
    ensemble.config.boundaries = None
    assert torch.equal(beams, ensemble.generate(ids, attention_mask=mask, **{**PLAIN, "num_beams": 2}))
    assert torch.equal(whole, ensemble.generate(ids, attention_mask=mask, **PLAIN))


def test_texts_end_where_the_ensemble_ends_them(ensemble):
    plain = write(ensemble, torch.tensor([[1, 3]]), max_new_tokens=12, block=4).ids.tolist()
    end = plain[5]
    stopped = plain[: 2 + plain[2:].index(end) + 1]
    assert write(ensemble, torch.tensor([[1, 3]]), max_new_tokens=12, block=4, eos_token_id=end).ids.tolist() == stopped


def test_the_others_read_the_text_once_for_a_block(ensemble):
    calls = []
    ensemble.members[1].register_forward_pre_hook(lambda *_: calls.append(1))
    found = write(ensemble, torch.tensor([[1, 3]]), max_new_tokens=12, block=4)
    assert len(calls) <= 12 / 4 + found.combined
    assert len(calls) < 12


def test_a_recipe_says_it_and_the_folder_keeps_it(tmp_path):
    given = {"members": {"left": 0.6, "right": 0.4}, "boundaries": 3}
    out, _, _ = union_folder(tmp_path, given, members=MEMBERS)
    assert json.loads((out / "config.json").read_text())["boundaries"] == 3
    ids = torch.tensor([[1, 8, 5]])
    assert models.load(out).generate(ids, **PLAIN)[0].tolist() == reference([1, 8, 5], 12, 3)[0]


def test_what_it_cannot_do_is_refused(ensemble):
    with pytest.raises(RequestError, match="expected a union of vocabularies whose first member has a weight"):
        write(ensemble_of({"a": llama(1, tokens=9)}), torch.tensor([[1]]), max_new_tokens=2)
    with pytest.raises(RequestError, match="expected one prompt with a token and a block of one or more"):
        write(ensemble, torch.tensor([[1], [2]]), max_new_tokens=2)
    bad = llama(2, tokens=9)
    with torch.no_grad():
        bad.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="member 'bad'"):
        write(ensemble_of({"fine": MEMBERS["left"], "bad": bad}, union=UNION), torch.tensor([[1, 3]]), max_new_tokens=2)
    with pytest.raises(Exception, match="boundaries"):
        VERB.parse({"members": ["a", "b"], "vocabulary": "union", "boundaries": 0})


def test_without_a_union_it_is_refused_before_anything_runs(tmp_path):
    from test_union import saved

    from graft.facts import facts_of

    facts = {name: facts_of(folder) for name, folder in saved(tmp_path).items()}
    settings = VERB.parse({"members": ["left", "right"], "vocabulary": "bytes", "boundaries": 4})
    assert any("`boundaries` is for a union of vocabularies" in each for each in VERB.check(settings, facts))
