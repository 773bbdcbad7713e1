"""Speculation gives the ensemble's own text: the same tokens when greedy, the same distribution when sampled."""

import itertools

import pytest
import torch
from tiny_members import TOKENS, five, gpt2, llama, mistral, prompts, qwen

from graft.ensemble import causal, speculative
from graft.ensemble.model import ensemble_of
from graft.ensemble.recalled import Recalled
from graft.ensemble.speculative import _Drawing, instead_of_generate, speculate
from graft.ensemble.turns import PLAIN, Plan, Turns
from graft.errors import RequestError, RunError


@pytest.fixture(scope="module")
def ensemble():
    return ensemble_of(five(), [0.3, 0.25, 0.2, 0.15, 0.1])


@pytest.mark.parametrize("block", [None, 1, 3, 8])
@pytest.mark.parametrize("draft", [None, "llama", "mistral", "bloom"])
def test_greedy_speculation_is_greedy_decoding(ensemble, draft, block):
    ids, _ = prompts(1, 9, ())
    found = speculate(ensemble, ids, draft, max_new_tokens=20, block=block)
    plain = ensemble.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=None)
    assert torch.equal(found.sequences, plain)


@pytest.mark.parametrize("block", [None, 1, 3, 8])
@pytest.mark.parametrize("draft", [None, "llama", "mistral"])
def test_each_row_of_a_padded_batch_goes_on_as_far_as_its_own_drafts_are_kept(ensemble, draft, block):
    ids, mask = prompts(5, 9, (3, 1, 0, 8, 5))
    plain = ensemble.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=25, eos_token_id=None)
    found = speculate(ensemble, ids, draft, attention_mask=mask, max_new_tokens=25, block=block)
    assert torch.equal(found.sequences, plain)


def test_rows_stop_behind_their_end_token_as_generate_does(ensemble):
    ids, mask = prompts(4, 9, (3, 1, 0, 8))
    plain = ensemble.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, eos_token_id=None)
    ends = [int(plain[0, 14]), int(plain[2, 11])]
    given = {"attention_mask": mask, "max_new_tokens": 20, "eos_token_id": ends}
    stopped = ensemble.generate(ids, do_sample=False, **given)
    assert torch.equal(speculate(ensemble, ids, **given).sequences, stopped)
    alone = speculate(ensemble, ids[2:3], "gpt2", max_new_tokens=20, eos_token_id=ends[1]).sequences
    assert torch.equal(alone, ensemble.generate(ids[2:3], do_sample=False, max_new_tokens=20, eos_token_id=ends[1]))


def test_a_prompt_that_needs_no_new_tokens_comes_back(ensemble):
    ids, _ = prompts(2, 5, ())
    assert torch.equal(speculate(ensemble, ids, max_new_tokens=0).sequences, ids)


def test_an_ensemble_of_one_keeps_all_its_drafts():
    model = llama()
    ids, _ = prompts(3, 6, ())
    found = speculate(ensemble_of({"one": model}), ids, max_new_tokens=12, block=1)
    assert torch.equal(found.sequences, model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=None))
    assert found.drafted == found.kept == 36


def test_a_nested_ensemble_drafts_and_verifies():
    inner = ensemble_of({"a": llama(5), "b": gpt2()})
    outer = ensemble_of({"inner": inner, "c": qwen()}, [0.7, 0.3], "log_linear")
    ids, mask = prompts()
    plain = outer.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=10, eos_token_id=None)
    for draft in ("inner", "c", None):
        found = outer.speculate(ids, draft, attention_mask=mask, max_new_tokens=10).sequences
        assert torch.equal(found, plain)


def test_a_kept_or_replaced_token_has_the_ensembles_probability():
    generator = torch.Generator().manual_seed(0)
    mixed, told = torch.randn(2, 3, 5, generator=generator).mul(1.5).log_softmax(-1)
    drawing, rows = _Drawing(1.0, generator), 6000
    drafts = [drawing.draw(told[at].expand(rows, 5)) for at in range(3)]
    tokens, drawn = torch.stack([each[0] for each in drafts], 1), torch.stack([each[1] for each in drafts], 1)
    verdicts = drawing.judge(tokens, mixed.expand(rows, 3, 5), drawn, [3] * rows)
    first = [int(tokens[row, 0]) if verdict.kept else verdict.instead for row, verdict in enumerate(verdicts)]
    counts, expected = torch.bincount(torch.tensor(first), minlength=5), mixed[0].exp() * rows
    # chi-square with 4 degrees of freedom is below 23.5 with probability 0.9999
    assert ((counts - expected) ** 2 / expected).sum() < 23.5
    assert ((counts - told[0].exp() * rows) ** 2 / (told[0].exp() * rows)).sum() > 100


@pytest.mark.parametrize("combine", ["linear", "log_linear"])
@pytest.mark.parametrize(("draft", "block"), [("a", 2), ("b", 1), (None, None)])
@torch.no_grad()
def test_samples_follow_the_ensemble_though_rows_are_kept_unequally_far(combine, draft, block, monkeypatch):
    if block is None:
        monkeypatch.setattr(speculative, "Turns", changing())
    trio = {name: llama(seed, tokens=4, layers=1) for name, seed in (("a", 5), ("b", 6), ("c", 7))}
    model = ensemble_of(trio, [0.5, 0.3, 0.2], combine)
    prompt, temperature, rows, new = torch.tensor([[3, 1]]), 1.3, 3000, 3
    every = torch.tensor(list(itertools.product(range(4), repeat=new)))
    logits = model(input_ids=torch.cat([prompt.expand(len(every), -1), every], 1)).logits / temperature
    said = logits.log_softmax(-1)[:, 1 : 1 + new].gather(-1, every[..., None])
    expected = said.sum((1, 2)).exp() * rows
    found = model.speculate(
        prompt.expand(rows, -1), draft, max_new_tokens=new, do_sample=True, temperature=temperature, block=block,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    places = found.sequences[:, 2:] @ torch.tensor([16, 4, 1])
    counts = torch.bincount(places, minlength=64)
    # chi-square with 63 degrees of freedom is below 114 with probability 0.9999
    assert ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum() < 114
    assert 0 < found.kept < found.drafted


def changing():
    """Turns that change their plan at every round: plain decoding, drafts of other members, blocks."""
    plans = itertools.cycle([PLAIN, Plan(0, 1, True), PLAIN, Plan(1, 2), Plan(0, 3, True), PLAIN, PLAIN])

    class Changing(Turns):
        def plan(self, left):
            return next(plans)

    return Changing


def test_greedy_text_is_the_same_however_plans_change(ensemble, monkeypatch):
    monkeypatch.setattr(speculative, "Turns", changing())
    ids, mask = prompts(5, 9, (3, 1, 0, 8, 5))
    plain = ensemble.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=25, eos_token_id=None)
    end = int(plain[1, 20])
    for ends in (None, end):
        given = {"attention_mask": mask, "max_new_tokens": 25, "eos_token_id": ends, "pad_token_id": 0}
        expected = ensemble.generate(ids, do_sample=False, **given)
        found = speculate(ensemble, ids, **given)
        assert torch.equal(found.sequences, expected)
        assert 0 < found.kept < found.drafted


def sure_of(token):
    """A model that gives nearly all probability to one token, whatever stands before."""
    model = gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.transformer.wte.weight[token] = 10
    return model


@pytest.mark.parametrize("block", [1, 3])
def test_rows_none_of_whose_drafts_are_kept_are_written_by_the_others(block, monkeypatch):
    class Wrong(Turns):
        def plan(self, left):
            return Plan(1, block)

    monkeypatch.setattr(speculative, "Turns", Wrong)
    # what was said before cannot be right either: the one that drafts drafts its own word
    monkeypatch.setattr(Recalled, "drafts", lambda _self, _number, _rows, _text, own: own)
    ids, mask = prompts(5, 9, (3, 1, 0, 8, 5))
    given = {"attention_mask": mask, "max_new_tokens": 20, "pad_token_id": 0}
    never = set(range(3, TOKENS)) - set(
        mistral().generate(ids, eos_token_id=None, do_sample=False, **given).flatten().tolist()
    )
    duo = ensemble_of({"slides": mistral(), "wrong": sure_of(max(never))}, [0.98, 0.02])
    end = int(duo.generate(ids, eos_token_id=None, do_sample=False, **given)[1, 15])
    found = speculate(duo, ids, eos_token_id=end, **given)
    assert torch.equal(found.sequences, duo.generate(ids, eos_token_id=end, do_sample=False, **given))
    assert found.kept == 0 < found.drafted


def test_the_same_generator_gives_the_same_samples(ensemble):
    ids, _ = prompts(2, 5, ())
    given = {"max_new_tokens": 12, "do_sample": True}
    one, two = (ensemble.speculate(ids, **given, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one.sequences, two.sequences)


def runs(pair):
    """What each member reads from now on, run by run: for every token all that stands before it, and itself."""
    read = {name: [] for name in pair}
    for name, model in pair.items():
        text = []

        def note(_module, _args, given, name=name, text=text):
            seen, new = given["past_key_values"].get_seq_length(), given["input_ids"][0].tolist()
            text[seen:] = new
            read[name].append([tuple(text[: seen + place]) for place in range(1, len(new) + 1)])

        model.register_forward_pre_hook(note, with_kwargs=True)
    return read


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("draft", ["a", None])
def test_no_member_computes_anything_twice(draft, block):
    pair = {"a": llama(1), "b": qwen()}
    duo, read = ensemble_of(pair, [0.6, 0.4]), runs(pair)
    ids, _ = prompts(1, 9, ())
    found = speculate(duo, ids, draft, max_new_tokens=25, block=block)
    assert found.kept < found.drafted
    for each in read.values():
        every = [text for run in each for text in run]
        assert len(every) == len(set(every))


def test_members_that_agree_run_once_for_a_token_instead_of_once_each():
    model = llama(1)
    twins = {name: llama(1) for name in "abc"}
    trio, read = ensemble_of(twins, [0.5, 0.3, 0.2]), runs(twins)
    ids, _ = prompts(1, 9, ())
    found = speculate(trio, ids, max_new_tokens=30, block=1)
    assert torch.equal(found.sequences, model.generate(ids, do_sample=False, max_new_tokens=30, eos_token_id=None))
    assert found.kept == found.drafted == 30
    assert sum(map(len, read.values())) <= 30 + 2


def test_what_cannot_be_speculated_is_refused(ensemble):
    ids, mask = prompts(2, 5, (2, 0))
    with pytest.raises(RequestError, match=r"\(llama, qwen, mistral, gpt2, bloom\), found 'lama'"):
        speculate(ensemble, ids[:1], "lama", max_new_tokens=3)
    with pytest.raises(RequestError, match="member 'llama' was made for 64 tokens"):
        speculate(ensemble, ids[:1], "llama", max_new_tokens=70)
    with pytest.raises(RequestError, match="padded on the left, found padding behind"):
        speculate(ensemble, ids, attention_mask=mask.flip(1), max_new_tokens=3)
    with pytest.raises(RequestError, match=r"found none in rows \[1\]"):
        speculate(ensemble, ids, attention_mask=mask * torch.tensor([[1], [0]]), max_new_tokens=3)
    with pytest.raises(RequestError, match="expected a token in every prompt"):
        speculate(ensemble, ids[:, :0], max_new_tokens=3)
    with pytest.raises(RequestError, match="expected a temperature above zero, found 0"):
        speculate(ensemble, ids, max_new_tokens=3, do_sample=True, temperature=0)
    with pytest.raises(RequestError, match="expected a block above zero, found 0"):
        speculate(ensemble, ids, max_new_tokens=3, block=0)
    chosen = ensemble_of({"a": llama(), "b": qwen()}, [0.5, 0.5], "majority")
    with pytest.raises(RequestError, match="speculation decodes token by token, found majority: use generate"):
        speculate(chosen, ids, max_new_tokens=3)


@pytest.mark.parametrize("draft", ["fine", "bad"])
@pytest.mark.parametrize("sample", [True, False])
def test_nan_logits_name_the_member_whether_it_drafts_or_verifies(draft, sample):
    bad = qwen()
    with torch.no_grad():
        list(bad.parameters())[-1].fill_(float("nan"))
    ids, mask = prompts()
    model = ensemble_of({"fine": llama(), "bad": bad})
    with pytest.raises(RunError, match=r"member 'bad' \(.*\) gives NaN logits: check its weights"):
        model.speculate(ids, draft, attention_mask=mask, max_new_tokens=4, do_sample=sample)


def test_an_ensemble_that_names_a_draft_speculates_where_generate_is_greedy(monkeypatch):
    plain, ensemble = ensemble_of(five()), ensemble_of(five())
    ensemble.config.draft = "llama"
    calls = []
    monkeypatch.setattr(causal, "instead_of_generate", lambda *a: calls.append(instead_of_generate(*a)) or calls[-1])
    ids, mask = prompts()
    greedy = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "num_beams": 1, "stopping_criteria": []}
    end = int(plain.generate(ids, eos_token_id=None, **greedy)[0, -3])
    for own in ({}, {"eos_token_id": None}, {"eos_token_id": end, "pad_token_id": 0}):
        found, expected = ensemble.generate(ids, **greedy, **own), plain.generate(ids, **greedy, **own)
        assert torch.equal(found, expected)
        assert calls[-1] is not None
    for own in ({"num_beams": 3}, {"repetition_penalty": 1.3}, {"return_dict_in_generate": True}):
        found, expected = (m.generate(ids, **{**greedy, **own}) for m in (ensemble, plain))
        assert torch.equal(getattr(found, "sequences", found), getattr(expected, "sequences", expected))
        assert calls[-1] is None
    for model in (ensemble, plain):
        model.generation_config.no_repeat_ngram_size = 2
    assert torch.equal(ensemble.generate(ids, **greedy), plain.generate(ids, **greedy))
    assert calls[-1] is None
    torch.manual_seed(0)
    assert ensemble.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=True).shape[0] == 3
    assert calls[-1] is None


def test_a_draft_of_weight_zero_leaves_generate_as_it_is():
    ensemble = ensemble_of({"a": llama(), "b": qwen()}, [1.0, 0.0])
    ensemble.config.draft = "b"
    ids, mask = prompts()
    given = {"attention_mask": mask, "max_new_tokens": 5, "eos_token_id": None, "do_sample": False}
    assert torch.equal(ensemble.generate(ids, **given), ensemble.members[0].generate(ids, **given))
