"""An ensemble is a causal LM: against brute force over its members, without and with cache, padding, beams."""

import itertools
import math

import pytest
import torch
from tiny_members import TOKENS, five, gpt2, greedy, llama, mistral, prompts, qwen

from graft.ensemble.model import ensemble_of
from graft.errors import RequestError, RunError

WEIGHTS = [0.3, 0.25, 0.2, 0.15, 0.1]
PLAIN = {"max_new_tokens": 9, "eos_token_id": None}


@pytest.fixture(scope="module")
def members():
    return five()


@pytest.fixture(scope="module")
def ensemble(members):
    return ensemble_of(members, WEIGHTS)


def mixture(members):
    """Probabilities of the next token, from each member alone and without cache."""

    def next_token(ids):
        alone = [model(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1) for model in members.values()]
        return sum(weight * probs for weight, probs in zip(WEIGHTS, alone, strict=True))

    return next_token


@torch.no_grad()
def test_logits_are_the_log_of_the_mixture(members, ensemble):
    ids, _ = prompts(padded=())
    expected = sum(w * m(input_ids=ids).logits.softmax(-1) for w, m in zip(WEIGHTS, members.values(), strict=True))
    logits = ensemble(input_ids=ids).logits
    assert torch.allclose(logits.exp(), expected, atol=1e-6)
    assert torch.allclose(logits.logsumexp(-1), torch.zeros(3, 7), atol=1e-5)
    assert logits.dtype == torch.float32


@torch.no_grad()
def test_greedy_decoding_of_a_padded_batch_is_brute_force_on_each_prompt(members, ensemble):
    ids, mask = prompts()
    batch = ensemble.generate(ids, attention_mask=mask, do_sample=False, **PLAIN)
    for row in range(3):
        own = ids[row : row + 1, int((mask[row] == 0).sum()) :]
        assert greedy(mixture(members), own, 9)[0].tolist() == batch[row, 7 - own.shape[1] :].tolist()


WAYS = {
    "beam": {"num_beams": 4},
    "sampling": {"do_sample": True},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "prefill in chunks": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_decoding_with_a_cache_is_decoding_without(ensemble, way):
    ids, mask = prompts()
    plain = {k: v for k, v in WAYS[way].items() if k in ("num_beams", "do_sample")}
    torch.manual_seed(3)
    cached = ensemble.generate(ids, attention_mask=mask, **PLAIN, **WAYS[way])
    torch.manual_seed(3)
    assert torch.equal(cached, ensemble.generate(ids, attention_mask=mask, use_cache=False, **PLAIN, **plain))


def test_a_static_cache_gives_the_same(members):
    # BLOOM cannot decode with a static cache, in an ensemble or alone
    four = ensemble_of({name: model for name, model in members.items() if name != "bloom"}, [0.4, 0.3, 0.2, 0.1])
    ids, mask = prompts()
    found = four.generate(ids, attention_mask=mask, cache_implementation="static", disable_compile=True, **PLAIN)
    assert torch.equal(found, four.generate(ids, attention_mask=mask, **PLAIN))


@pytest.mark.parametrize("drafts", ["prompt lookup", "a member", "the ensemble"])
def test_assisted_decoding_is_greedy_decoding(members, ensemble, drafts):
    ids, _ = prompts(1, 9, ())
    ids[:, 5:] = ids[:, :4]
    help_ = {"prompt_lookup_num_tokens": 3} if drafts == "prompt lookup" else {"assistant_model": members["llama"]}
    model = ensemble
    if drafts == "the ensemble":
        model, help_ = members["qwen"], {"assistant_model": ensemble}
    found = model.generate(ids, do_sample=False, **PLAIN, **help_)
    assert torch.equal(found, model.generate(ids, do_sample=False, **PLAIN))


def test_decoding_goes_on_from_a_cache_it_returned(ensemble):
    ids, _ = prompts(2, 5, ())
    first = ensemble.generate(ids, do_sample=False, return_dict_in_generate=True, max_new_tokens=4, eos_token_id=None)
    more = ensemble.generate(
        first.sequences, past_key_values=first.past_key_values, do_sample=False, max_new_tokens=5, eos_token_id=None
    )
    assert torch.equal(more, ensemble.generate(ids, do_sample=False, **PLAIN))


@torch.no_grad()
def test_beam_search_finds_the_best_of_all_sequences():
    pair = {"a": llama(5, tokens=5), "b": llama(6, tokens=5, layers=1)}
    ensemble = ensemble_of(pair, [0.5, 0.5])
    prompt = torch.tensor([[3, 4, 3]])
    every = torch.tensor(list(itertools.product(range(5), repeat=3)))
    rows = torch.cat([prompt.expand(len(every), -1), every], 1)
    probs = sum(0.5 * model(input_ids=rows).logits.double().softmax(-1) for model in pair.values())
    scores = probs[:, 2:5].gather(-1, every[..., None]).log().sum((1, 2))
    found = ensemble.generate(prompt, num_beams=25, max_new_tokens=3, eos_token_id=None, length_penalty=0.0)
    assert found[0, 3:].tolist() == every[scores.argmax()].tolist()


def test_samples_follow_the_mixture():
    pair = {"a": llama(5, tokens=5), "b": llama(6, tokens=5)}
    ensemble = ensemble_of(pair, [0.7, 0.3])
    prompt = torch.tensor([[3, 4, 3]]).expand(4000, -1)
    torch.manual_seed(0)
    drawn = ensemble.generate(prompt, do_sample=True, top_k=0, max_new_tokens=1, eos_token_id=None)[:, -1]
    expected = ensemble(input_ids=prompt[:1]).logits[0, -1].exp().detach() * 4000
    counts = torch.bincount(drawn, minlength=5)
    # chi-square with 4 degrees of freedom is below 23.5 with probability 0.9999
    assert ((counts - expected) ** 2 / expected).sum() < 23.5


@torch.no_grad()
def test_an_ensemble_of_one_is_that_member_bit_for_bit():
    for combine in ("linear", "log_linear"):
        model = mistral()
        alone = ensemble_of({"m": model}, [1.0], combine)
        ids, mask = prompts()
        assert torch.equal(alone(input_ids=ids).logits, model(input_ids=ids).logits.log_softmax(-1))
        assert torch.equal(
            alone.generate(ids, attention_mask=mask, num_beams=3, **PLAIN),
            model.generate(ids, attention_mask=mask, num_beams=3, **PLAIN),
        )


@torch.no_grad()
def test_copies_of_a_member_are_that_member(members):
    ids, mask = prompts()
    model = members["gpt2"]
    copies = ensemble_of({"a": model, "b": model, "c": model}, [0.2, 0.3, 0.5])
    found = copies.generate(ids, attention_mask=mask, do_sample=False, **PLAIN)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, do_sample=False, **PLAIN))


@torch.no_grad()
def test_an_ensemble_may_be_a_member(members):
    inner = ensemble_of({"llama": members["llama"], "gpt2": members["gpt2"]}, [0.5, 0.5])
    outer = ensemble_of({"inner": inner, "qwen": members["qwen"]}, [0.8, 0.2])
    flat = ensemble_of({n: members[n] for n in ("llama", "gpt2", "qwen")}, [0.4, 0.4, 0.2])
    ids, mask = prompts()
    assert torch.allclose(outer(input_ids=ids).logits, flat(input_ids=ids).logits, atol=1e-5)
    found = outer.generate(ids, attention_mask=mask, num_beams=3, **PLAIN)
    assert torch.equal(found, flat.generate(ids, attention_mask=mask, num_beams=3, **PLAIN))


@torch.no_grad()
def test_a_member_of_weight_zero_is_not_run(members):
    ran = []
    idle = qwen()
    ensemble = ensemble_of({"idle": idle, "llama": members["llama"]}, [0.0, 1.0])
    idle.register_forward_hook(lambda *_: ran.append(1))
    ids, mask = prompts()
    found = ensemble.generate(ids, attention_mask=mask, num_beams=2, **PLAIN)
    assert torch.equal(found, members["llama"].generate(ids, attention_mask=mask, num_beams=2, **PLAIN))
    assert not ran


@torch.no_grad()
def test_a_vocabulary_padded_to_a_round_size_adds_no_tokens():
    wide, narrow = llama(8, tokens=40), llama(9)
    ids, _ = prompts(padded=())
    found = ensemble_of({"wide": wide, "narrow": narrow}, [0.5, 0.5])(input_ids=ids).logits
    cut = wide(input_ids=ids).logits[..., :TOKENS].softmax(-1)
    assert torch.allclose(found.exp(), 0.5 * cut + 0.5 * narrow(input_ids=ids).logits.softmax(-1), atol=1e-6)


def test_the_loss_is_that_of_the_mixture_and_trains_every_member():
    pair = {"a": llama(), "b": gpt2()}
    ensemble = ensemble_of(pair, [0.6, 0.4])
    ids, _ = prompts(padded=())
    out = ensemble(input_ids=ids, labels=ids)
    alone = [m(input_ids=ids).logits[:, :-1].softmax(-1).gather(-1, ids[:, 1:, None]) for m in pair.values()]
    assert out.loss.item() == pytest.approx(-(0.6 * alone[0] + 0.4 * alone[1]).log().mean().item(), abs=1e-5)
    out.loss.backward()
    for model in pair.values():
        assert all(torch.isfinite(w.grad).all() and w.grad.abs().sum() > 0 for w in model.parameters() if w.dim() > 1)


def test_nothing_flows_into_a_frozen_member():
    frozen, free = llama().requires_grad_(False), qwen()
    ids, _ = prompts(padded=())
    ensemble_of({"frozen": frozen, "free": free}, [0.5, 0.5])(input_ids=ids, labels=ids).loss.backward()
    assert all(weight.grad is None for weight in frozen.parameters())
    assert free.lm_head.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_the_loss_counts_labels_by_the_number_it_is_given():
    ensemble = ensemble_of({"a": llama()}, [1.0])
    ids, _ = prompts(padded=())
    mean = ensemble(input_ids=ids, labels=ids).loss
    whole = ensemble(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(9)).loss
    assert whole.item() == pytest.approx(mean.item() * 18 / 9, rel=1e-5)


@torch.no_grad()
def test_only_the_logits_asked_for_are_computed(ensemble):
    ids, _ = prompts(padded=())
    assert torch.allclose(
        ensemble(input_ids=ids, logits_to_keep=2).logits, ensemble(input_ids=ids).logits[:, -2:], atol=1e-5
    )


def test_a_member_that_gives_nan_is_named():
    broken = qwen()
    broken.lm_head.weight.data[3] = math.nan
    ids, mask = prompts()
    with pytest.raises(RunError, match=r"member 'broken' .*gives NaN logits"):
        ensemble_of({"fine": llama(), "broken": broken}, [0.5, 0.5]).generate(
            ids, attention_mask=mask, max_new_tokens=2
        )


def test_a_context_longer_than_a_members_is_refused_naming_it():
    ensemble = ensemble_of({"far": qwen(), "near": gpt2()}, [0.5, 0.5])
    ids, _ = prompts(1, 60, ())
    with pytest.raises(RequestError, match="member 'near' was made for 64 tokens, found a context of 65"):
        ensemble.generate(ids, max_new_tokens=20, eos_token_id=None)


def test_an_empty_prompt_is_refused_naming_its_row(ensemble):
    ids, mask = prompts(3, 7, (0, 7, 0))
    with pytest.raises(RequestError, match=r"none in rows \[1\]"):
        ensemble.generate(ids, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(RequestError, match="expected a token in every prompt"):
        ensemble(input_ids=ids[:, :0])


def test_a_product_without_a_common_token_says_so():
    ensemble = ensemble_of({"a": llama(), "b": qwen()}, [0.5, 0.5], "log_linear")
    for place, model in enumerate(ensemble.members):
        head = model.lm_head
        ban = torch.zeros(TOKENS).masked_fill(torch.arange(TOKENS) % 2 == place, -math.inf)
        head.register_forward_hook(lambda _m, _i, out, ban=ban: out + ban)
    ids, _ = prompts(padded=())
    with pytest.raises(RunError, match="no token is possible for every member"):
        ensemble(input_ids=ids)


@pytest.mark.parametrize("combine", ["log_linear", "contrastive"])
@torch.no_grad()
def test_other_rules_decode_by_beams_as_without_cache(combine, members):
    pair = {"llama": members["llama"], "gpt2": members["gpt2"]}
    ensemble = ensemble_of(pair, [1.4, -0.4], combine)
    ids, mask = prompts()
    found = ensemble.generate(ids, attention_mask=mask, num_beams=3, **PLAIN)
    assert torch.equal(found, ensemble.generate(ids, attention_mask=mask, num_beams=3, use_cache=False, **PLAIN))


def test_the_same_weights_are_refused_in_memory_and_in_a_recipe():
    with pytest.raises(RequestError, match=r"normalised they are \[0\.333333, 0\.666667\]"):
        ensemble_of({"a": llama(), "b": qwen()}, [0.4, 0.8])
    with pytest.raises(RequestError, match="expected 2 weights, found 1"):
        ensemble_of({"a": llama(), "b": qwen()}, [1.0])


@pytest.mark.parametrize("combine", ["linear", "majority", "log_linear"])
def test_a_mixture_tells_of_wanted_tokens_without_the_others(combine):
    inner = ensemble_of({"a": llama(), "b": qwen()}, [0.3, 0.7])
    wide = llama(5, tokens=TOKENS + 3)
    model = ensemble_of({"inner": inner, "wide": wide, "gpt2": gpt2()}, [0.5, 0.2, 0.3], combine)
    ids, _ = prompts(3, 9, ())
    wanted = ids.roll(-1, 1)
    found = model.log_probs_of(ids, wanted)
    if combine == "log_linear":
        assert found is None
    else:
        with torch.no_grad():
            told = model(input_ids=ids).logits.gather(-1, wanted[..., None])[..., 0]
        assert torch.allclose(found, told, atol=1e-5)


def test_wanted_tokens_of_a_damaged_member_name_it():
    bad = qwen()
    with torch.no_grad():
        list(bad.parameters())[-1].fill_(float("nan"))
    ids, _ = prompts(2, 5, ())
    with pytest.raises(RunError, match=r"member 'bad' \(.*\) gives NaN logits: check its weights"):
        ensemble_of({"fine": llama(), "bad": bad}).log_probs_of(ids, ids)
