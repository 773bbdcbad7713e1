"""Rules that choose among whole outputs: votes, ranked votes and least risk, against all that the members write."""

import itertools
import json

import pytest
import torch
from test_ensemble_folder import facts, letters, run
from test_seq2seq import source, t5
from tiny_members import llama, prompts

from graft import models
from graft.ensemble import VERB, least_risk, majority, ranked
from graft.ensemble.model import ensemble_of
from graft.errors import RequestError, SettingsError

SIGNS = len(letters())
GIVEN = {"max_new_tokens": 6, "eos_token_id": 2}
WEIGHTS = [0.5, 0.3, 0.2]


def writers():
    return {str(seed): llama(seed, tokens=SIGNS, layers=1) for seed in (1, 2, 3)}


def ids_and_mask():
    ids, mask = prompts()
    return torch.where(ids >= SIGNS, 5, ids), mask


def texts(rows, begin):
    return [text.strip() for text in letters().batch_decode(rows[:, begin:], skip_special_tokens=True)]


def test_the_answer_with_the_highest_expected_gain_is_chosen():
    outputs = [["the cat sat", "a dog"], ["the cat sat down", "the cat"]]
    every = [text for each in outputs for text in each]
    for utility in ("chrf", "bleu", "token_f1", "exact_match"):
        gain = least_risk.gain_of(utility)
        counts = [0.35, 0.35, 0.15, 0.15]
        gains = [sum(c * gain(text, other) for c, other in zip(counts, every, strict=True)) for text in every]
        chosen = least_risk.choose(outputs, [0.7, 0.3], least_risk.Settings(utility=utility))
        assert gains[chosen] == pytest.approx(max(gains))


def test_gains_are_those_of_sacrebleu_and_of_squad():
    from sacrebleu import sentence_bleu, sentence_chrf

    pair = ("the small cat sat there", "the cat sat there too")
    assert least_risk.gain_of("chrf")(*pair) == pytest.approx(sentence_chrf(pair[0], [pair[1]]).score)
    assert least_risk.gain_of("bleu")(*pair) == pytest.approx(sentence_bleu(pair[0], [pair[1]]).score)
    # without articles: small cat sat there / cat sat there too: three common words of four each
    assert least_risk.gain_of("token_f1")(*pair) == pytest.approx(0.75)
    assert least_risk.gain_of("exact_match")("a ", "a") == 1


def test_votes_count_members_by_their_weights_however_much_they_write():
    assert majority.choose([["a"], ["b"], ["b"]], [0.5, 0.2, 0.2], majority.Settings()) == 0
    assert majority.choose([["a"], ["b"], ["b"]], [0.4, 0.3, 0.3], majority.Settings()) == 1
    assert majority.choose([["a", "a", "b"], ["b"]], [0.5, 0.5], majority.Settings()) == 2
    # Borda: a 2 + 0, b 1 + 2, c 0 + 1
    assert ranked.choose([["a", "b", "c"], ["b", "c", "a"]], [0.5, 0.5], ranked.Settings()) == 1


def written(member, ids, mask, **how):
    return member.generate(ids, attention_mask=mask, **GIVEN, **how)


@pytest.mark.parametrize(("rule", "candidates"), [("majority", 2), ("ranked", 3), ("least_risk", 3)])
def test_of_the_members_beams_one_is_given_for_every_row_of_a_padded_batch(rule, candidates):
    members = writers()
    options = {"candidates": candidates, "draw": "beams"}
    ensemble = ensemble_of(members, WEIGHTS, rule, **options)
    ids, mask = ids_and_mask()
    found = ensemble.generate(ids, attention_mask=mask, tokenizer=letters(), **GIVEN)
    own = [
        written(member, ids, mask, num_beams=candidates, num_return_sequences=candidates) for member in members.values()
    ]
    module = {"majority": majority, "ranked": ranked, "least_risk": least_risk}[rule]
    for row in range(3):
        lines = [each[row * candidates : (row + 1) * candidates] for each in own]
        outputs = [texts(each, 7) for each in lines]
        place = module.choose(outputs, WEIGHTS, module.Settings(**options))
        assert texts(found[row : row + 1], 7)[0] == list(itertools.chain(*outputs))[place]
        assert found[row, :7].tolist() == ids[row].tolist()


def test_samples_are_the_same_every_time_and_another_seed_gives_others():
    members, (ids, mask) = writers(), ids_and_mask()
    state = torch.random.get_rng_state()
    one, again, other = (
        ensemble_of(members, WEIGHTS, "least_risk", candidates=4, seed=seed).generate(
            ids, attention_mask=mask, tokenizer=letters(), **GIVEN
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_samples_are_drawn_from_every_member():
    """With equality as gain and one answer each, the commonest answer of the members' own samples is given."""
    members, (ids, mask) = writers(), ids_and_mask()
    ensemble = ensemble_of(members, WEIGHTS, "least_risk", candidates=5, utility="exact_match", temperature=0.001)
    found = ensemble.generate(ids, attention_mask=mask, tokenizer=letters(), **GIVEN)
    # at this temperature samples are greedy, so the heaviest member's text wins unless the others agree
    greedy = [texts(written(member, ids, mask, do_sample=False), 7) for member in members.values()]
    for row in range(3):
        votes = {text: 0.0 for each in greedy for text in [each[row]]}
        for weight, each in zip(WEIGHTS, greedy, strict=True):
            votes[each[row]] += weight
        assert texts(found[row : row + 1], 7)[0] == max(votes, key=votes.get)


def test_a_call_may_say_how_answers_are_written():
    ensemble = ensemble_of(writers(), WEIGHTS, "least_risk", candidates=2)
    ids, mask = ids_and_mask()
    beams = ensemble_of(writers(), WEIGHTS, "least_risk", candidates=2, draw="beams")
    given = {"attention_mask": mask, "tokenizer": letters(), **GIVEN}
    assert torch.equal(ensemble.generate(ids, num_beams=2, **given), beams.generate(ids, **given))


def test_a_translators_outputs_are_chosen_from_as_well():
    members = {str(seed): t5(seed) for seed in (1, 2)}
    ids, mask = source()
    ensemble = ensemble_of(members, [0.6, 0.4], "majority")
    found = ensemble.generate(ids, attention_mask=mask, max_new_tokens=5, tokenizer=Places())
    first = members["1"].generate(ids, attention_mask=mask, max_new_tokens=5, num_beams=1, do_sample=False)
    assert found.tolist() == first.tolist()


class Places:
    """Stands for a tokenizer: the ids are the text."""

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(str(token) for token in row if token > 2) for row in rows.tolist()]


@torch.no_grad()
def test_text_is_scored_by_the_mixture_of_the_members():
    members, (ids, _) = writers(), ids_and_mask()
    found = ensemble_of(members, WEIGHTS, "least_risk")(input_ids=ids).logits
    assert torch.equal(found, ensemble_of(members, WEIGHTS)(input_ids=ids).logits)


def test_a_recipe_makes_it_and_it_is_measured_like_any_other(tmp_path):
    from graft.evaluate.scorer import Scorer

    family = tmp_path / "family" / "models"
    for name, model in writers().items():
        model.save_pretrained(family / name)
        letters().save_pretrained(family / name)
    raw = {"combine": {"least_risk": {"utility": "token_f1", "candidates": 3}}, "members": list(writers())}
    target, _ = run(family, raw)
    loaded = models.load(target)
    scorer = Scorer(loaded, models.load_tokenizer(target))
    (answer,) = scorer.generate(["ab"], max_tokens=6)
    ids = torch.tensor([[1, *letters()("ab")["input_ids"]][-2 if not scorer.start else -3 :]])
    assert answer.strip() == texts(loaded.generate(ids, **GIVEN), ids.shape[1])[0]
    config = json.loads((target / "config.json").read_text())
    assert config["options"]["candidates"] == 3
    assert VERB.check(VERB.parse(raw), facts(family, *writers())) == []


def test_what_it_cannot_do_is_refused():
    ensemble = ensemble_of(writers(), WEIGHTS, "majority")
    ids, mask = ids_and_mask()
    with pytest.raises(RequestError, match="needs a tokenizer: load the ensemble from its folder, or give one"):
        ensemble.generate(ids, attention_mask=mask, **GIVEN)
    with pytest.raises(RequestError, match="cannot honour return_dict_in_generate"):
        ensemble.generate(ids, attention_mask=mask, return_dict_in_generate=True, tokenizer=letters())
    with pytest.raises(SettingsError, match="utility"):
        VERB.parse({"combine": {"least_risk": {"utility": "meteor"}}, "members": ["a", "b"]})
    with pytest.raises(RequestError, match="must sum to one"):
        ensemble_of(writers(), [1, 1, 1], "majority")


def test_answers_of_several_lengths_are_padded_with_an_end_where_there_is_no_padding():
    ids = prompts(3, 7, ())[0][::2]
    mask = torch.ones_like(ids)
    short, long = llama(1), llama(2)
    ends = short.generate(ids, attention_mask=mask, max_new_tokens=1)[:, -1].tolist()
    ensemble = ensemble_of({"short": short, "long": long}, combine="majority")
    ensemble.config.pad_token_id, ensemble.config.eos_token_id = None, ends
    places = iter((0, 1))
    ensemble.choose = lambda *_: next(places)
    found = ensemble.generate(ids, attention_mask=mask, max_new_tokens=4, eos_token_id=ends, tokenizer=letters())[:, 7:]
    own = long.generate(ids, attention_mask=mask, max_new_tokens=4, eos_token_id=ends, pad_token_id=min(ends))[:, 7:]
    assert found[1].tolist() == own[1].tolist()
    assert found[0].tolist() == [ends[0], *[min(ends)] * (own.shape[1] - 1)]
    assert min(ends) > 0 < own.shape[1] - 1
