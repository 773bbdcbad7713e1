"""A gate leaves members out of ensembles of translators and of classifiers too; who is left out catches up exactly."""

import math

import pytest
import torch
from test_classification import bert, texts
from test_ensemble_folder import facts, run
from test_gate import looking_at_one
from test_seq2seq import PLAIN, bart, family, members, pairs, source, t5  # noqa: F401
from tiny_members import prompts

from graft import models
from graft.ensemble import VERB
from graft.ensemble.gate import Told
from graft.ensemble.model import EnsembleConfig, ensemble_class, ensemble_of


def gated(trio, gate):
    config = EnsembleConfig(ensemble_of(trio).config.members, "linear", [1 / 3] * 3, {}, gate.plain())
    return ensemble_class(config)(config, list(trio.values())).eval()


def translators():
    return {"deep": t5(2, layers=3, size=24), "small": t5(1), "bart": bart(3)}


def decoder(member):
    return member.get_decoder()


def counted(ensemble, part=lambda member: member):
    """How many tokens each member's part reads from now on, run by run."""
    read = {place: [] for place in range(len(ensemble.members))}
    for place, member in enumerate(ensemble.members):

        def count(_module, _args, given, place=place):
            read[place].append(given["input_ids"].shape[1])

        part(member).register_forward_pre_hook(count, with_kwargs=True)
    return read


@pytest.fixture(scope="module")
def ensemble():
    return gated(translators(), looking_at_one(0.3, states=True))


@torch.no_grad()
def test_translators_that_are_left_out_read_later_what_they_have_missed_and_then_say_the_same():
    ensemble = gated(translators(), looking_at_one(0.3, states=True))
    ids, mask = source()
    ids, mask = ids[:1], mask[:1]
    torch.manual_seed(5)
    target = torch.cat([torch.ones(1, 1, dtype=torch.long), torch.randint(3, 37, (1, 20))], 1)
    whole = ensemble(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
    read, cache, told, weights = counted(ensemble, decoder), None, [], []
    decide = ensemble.gate.decide
    ensemble.gate.decide = lambda looked: weights.append(decide(looked)) or weights[-1]
    encoded = ensemble.get_encoder()(ids, mask)
    for place in range(target.shape[1]):
        found = ensemble(
            encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=target[:, place : place + 1],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache = found.past_key_values
        told.append(found.logits)
    needed = torch.cat(weights, 1)[0] > 0
    assert torch.allclose(torch.cat(told, 1), whole, atol=1e-4)
    for place in (0, 2):
        assert 1 < len(read[place]) == int(needed[:, place].sum()) < 21
        # it has read as far as it was needed last
        assert sum(read[place]) == 1 + int(needed[:, place].nonzero().max())
    assert read[1] == [1] * 21


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"do_sample": True}, {}])
def test_translators_decode_with_members_left_out_as_without_a_cache(way):
    ensemble = gated(translators(), looking_at_one(0.3, states=True))
    ids, mask = source()
    ids, mask = (ids[1:2], mask[1:2]) if not way else (ids, mask)
    read = counted(ensemble, decoder)
    torch.manual_seed(3)
    found = ensemble.generate(ids, attention_mask=mask, **PLAIN, **way)
    assert len(read[0]) < len(read[1])
    torch.manual_seed(3)
    assert torch.equal(found, ensemble.generate(ids, attention_mask=mask, use_cache=False, **PLAIN, **way))


def test_a_batch_of_translations_is_each_alone(ensemble):
    ids, mask = source()
    found = ensemble.generate(ids, attention_mask=mask, do_sample=False, **PLAIN)
    for row in range(3):
        own = ids[row : row + 1, : int(mask[row].sum())]
        assert torch.equal(ensemble.generate(own, do_sample=False, **PLAIN)[0], found[row])


def test_a_translator_without_any_weight_never_decodes_and_the_loss_is_that_of_the_others():
    trio, gate = translators(), looking_at_one(hidden=0)
    with torch.no_grad():
        gate.outer.bias[0] = -math.inf
    ensemble = gated(trio, gate)
    read = counted(ensemble, decoder)
    ids, mask = source()
    target = prompts(padded=())[0]
    loss = ensemble(input_ids=ids, attention_mask=mask, labels=target).loss
    assert (read[0], len(read[1]), len(read[2])) == ([], 1, 1)
    weights = gate.decide([ensemble._told(ensemble_reader(ensemble, ids, mask, target), None, every=True)[0][1]])
    begun = torch.cat([torch.ones(3, 1, dtype=torch.long), target[:, :-1]], 1)
    with torch.no_grad():
        told = [m(input_ids=ids, attention_mask=mask, decoder_input_ids=begun).logits for m in trio.values()]
    mixed = sum(weights[..., n : n + 1] * each.softmax(-1) for n, each in enumerate(told) if n)
    assert loss.item() == pytest.approx(-mixed.gather(-1, target[..., None]).log().mean().item(), abs=1e-5)


def ensemble_reader(ensemble, ids, mask, target):
    begun = torch.cat([torch.ones(3, 1, dtype=torch.long), target[:, :-1]], 1)
    given = {"attention_mask": mask, "decoder_input_ids": begun, "decoder_attention_mask": None}
    return ensemble._reader(ensemble.get_encoder()(ids, mask)[0], given, None)


def test_a_recipe_fits_a_gate_that_leaves_translators_out(family):  # noqa: F811
    gate = {"looks_at": ["small"], "hidden_states": True, "skip": 0.05}
    raw = {"members": ["small", "deep", "bart"], "weights": {"fit": "pairs.dev", "gate": gate}}
    assert VERB.check(VERB.parse(raw), facts(family, "small", "deep", "bart")) == []
    target, found = run(family, raw, {"pairs": pairs(family / "pairs.jsonl")})
    assert set(found["needed"]) == {"small", "deep", "bart"}
    loaded = models.load(target)
    assert (loaded.gate.looks_at, loaded.gate.skip) == ([0], 0.05)
    ids, mask = source()
    cached = loaded.generate(ids, attention_mask=mask, num_beams=3, **PLAIN)
    assert torch.equal(cached, loaded.generate(ids, attention_mask=mask, num_beams=3, use_cache=False, **PLAIN))


@torch.no_grad()
def test_a_classifier_runs_only_where_a_text_needs_it():
    trio, gate = {"a": bert(1), "small": bert(2), "b": bert(3)}, looking_at_one(0.3, hidden=0)
    ids, mask = texts()
    told = [m(input_ids=ids, attention_mask=mask).logits.log_softmax(-1) for m in trio.values()]
    gate.outer.weight.mul_(0.01)
    for bias, runs in (([0, 0, 0], [1, 1, 1]), ([-9, 0, 0], [0, 1, 1]), ([-9, 0, -9], [0, 1, 0])):
        gate.outer.bias.copy_(torch.tensor(bias))
        ensemble, weights = gated(trio, gate), gate.decide([Told(told[1])])
        read = counted(ensemble)
        found = ensemble(input_ids=ids, attention_mask=mask).logits
        assert torch.allclose(found.exp(), sum(weights[:, n : n + 1] * p.exp() for n, p in enumerate(told)), atol=1e-6)
        assert [len(read[n]) for n in range(3)] == runs
