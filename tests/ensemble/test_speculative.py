"""Speculation gives the ensemble's own text: the same tokens when greedy, the same distribution when sampled."""

import itertools

import pytest
import torch
from tiny_members import five, llama, prompts, qwen

from graft.ensemble.model import ensemble_of
from graft.ensemble.speculative import MOST, BlockLength, _Drawing, speculate
from graft.errors import RequestError


@pytest.fixture(scope="module")
def ensemble():
    return ensemble_of(five(), [0.3, 0.25, 0.2, 0.15, 0.1])


@pytest.mark.parametrize("block", [None, 1, 3, 8])
@pytest.mark.parametrize("draft", ["llama", "mistral", "bloom"])
def test_greedy_speculation_is_greedy_decoding(ensemble, draft, block):
    ids, _ = prompts(1, 9, ())
    found = speculate(ensemble, ids, draft, max_new_tokens=20, block=block)
    plain = ensemble.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=None)
    assert torch.equal(found.sequences, plain)
    assert sum(found.kept) + sum(k < d for k, d in zip(found.kept, found.drafted, strict=True)) == 20


def test_it_stops_behind_an_end_token_as_generate_does(ensemble):
    ids, _ = prompts(1, 9, ())
    plain = ensemble.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=None)
    end = int(plain[0, 14])
    stopped = ensemble.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=end)
    assert torch.equal(speculate(ensemble, ids, "gpt2", max_new_tokens=20, eos_token_id=end).sequences, stopped)


def test_a_kept_or_replaced_token_has_the_ensembles_probability():
    generator = torch.Generator().manual_seed(0)
    mixed, told = torch.randn(2, 3, 5, generator=generator).mul(1.5).log_softmax(-1)
    drawing, draws = _Drawing(1.0, generator), 6000
    counts = torch.zeros(5)
    for _ in range(draws):
        block = torch.cat([drawing.draw(row) for row in told])
        counts[drawing.keep(block, mixed, told)[0][0]] += 1
    expected = mixed[0].exp() * draws
    # chi-square with 4 degrees of freedom is below 23.5 with probability 0.9999
    assert ((counts - expected) ** 2 / expected).sum() < 23.5
    assert ((counts - told[0].exp() * draws) ** 2 / (told[0].exp() * draws)).sum() > 100


@pytest.mark.parametrize("combine", ["linear", "log_linear"])
@torch.no_grad()
def test_samples_follow_the_ensemble(combine):
    pair = {"a": llama(5, tokens=4, layers=1), "b": llama(6, tokens=4, layers=1)}
    model = ensemble_of(pair, [0.6, 0.4], combine)
    prompt, temperature, draws = torch.tensor([[3, 1]]), 1.3, 250
    every = torch.tensor(list(itertools.product(range(4), repeat=2)))
    logits = model(input_ids=torch.cat([prompt.expand(16, -1), every], 1)).logits / temperature
    expected = logits.log_softmax(-1)[:, 1:3].gather(-1, every[..., None]).sum((1, 2)).exp() * draws
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(16)
    for _ in range(draws):
        found = speculate(
            model, prompt, "a", max_new_tokens=2, do_sample=True, temperature=temperature, block=2, generator=generator
        )
        counts[int(found.sequences[0, 2] * 4 + found.sequences[0, 3])] += 1
    # chi-square with 15 degrees of freedom is below 44.3 with probability 0.9999
    assert ((counts - expected) ** 2 / expected).sum() < 44.3


def test_no_member_computes_a_position_twice():
    read = {"a": 0, "b": 0}
    pair = {"a": llama(1), "b": qwen()}
    for name, model in pair.items():
        model.register_forward_pre_hook(
            lambda _m, _a, given, name=name: read.update({name: read[name] + given["input_ids"].shape[1]}),
            with_kwargs=True,
        )
    ids, _ = prompts(1, 9, ())
    found = speculate(ensemble_of(pair, [0.9, 0.1]), ids, "a", max_new_tokens=15)
    # of a block whose last tokens fell away, those that fell away were read beyond what stayed
    lost = sum(max(0, drafted - 1 - kept) for drafted, kept in zip(found.drafted, found.kept, strict=True))
    assert read["a"] == read["b"] == 9 + 15 - 1 + lost


def test_the_whole_block_of_a_draft_that_agrees_is_kept():
    model = llama(1)
    twins = ensemble_of({"a": model, "b": model}, [0.5, 0.5])
    ids, _ = prompts(1, 9, ())
    found = speculate(twins, ids, "a", max_new_tokens=12, block=4)
    assert found.kept == found.drafted == [4, 4, 4]


def test_blocks_grow_with_what_is_kept_and_shrink_to_one():
    agree, differ = BlockLength(1, 3), BlockLength(1, 3)
    for _ in range(100):
        agree.saw(agree.best(), agree.best())
        differ.saw(0, differ.best())
    assert agree.best() == MOST
    assert differ.best() == 1
    equal = BlockLength(1.0, 1.0)
    equal.kept, equal.tried = 8.0, 10.0
    # tokens for the cost: 1/2, 1.8/3, 2.44/4, 2.952/5
    assert equal.best() == 3


def test_what_cannot_be_speculated_is_refused(ensemble):
    ids, _ = prompts(2, 5, ())
    with pytest.raises(RequestError, match="one prompt at a time"):
        speculate(ensemble, ids, "llama", max_new_tokens=3)
    with pytest.raises(RequestError, match=r"\(llama, qwen, mistral, gpt2, bloom\), found 'lama'"):
        speculate(ensemble, ids[:1], "lama", max_new_tokens=3)
    with pytest.raises(RequestError, match="member 'llama' was made for 64 tokens"):
        speculate(ensemble, ids[:1], "llama", max_new_tokens=70)
