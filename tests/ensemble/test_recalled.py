"""What the others said after the same tokens makes drafts that are kept more often; the distribution stays as it is."""

import itertools

import pytest
import torch
from test_gate import gated, some_gate
from tiny_members import gpt2, llama, prompts, qwen

from graft.ensemble import recalled
from graft.ensemble.gate import Told
from graft.ensemble.model import ensemble_of
from graft.ensemble.recalled import Recalled


def said(seed, rows=3, columns=2, tokens=37):
    return Told(torch.randn(rows, columns, tokens, generator=torch.Generator().manual_seed(seed)).log_softmax(-1))


@pytest.fixture
def duo():
    return ensemble_of({"a": llama(), "b": qwen()}, [0.7, 0.3])


TEXT = torch.tensor([[5, 6, 7], [5, 6, 8], [5, 5, 5]])
"""Of three rows: pairs (5, 6) and (6, 7), (5, 6) and (6, 8), (5, 5) twice."""


def test_a_draft_is_mixed_with_what_the_others_said_after_the_same_two_tokens(duo):
    heard, told = Recalled(duo), [said(0), said(1)]
    heard.hear([4, 2, 0], TEXT, [2, 1, 2], told)
    now = told[0].log_probs[:, 0] * 1.5
    now = now.log_softmax(-1)
    found = heard.drafts(0, [4, 2, 0], torch.tensor([[5, 6], [5, 6], [5, 5]]), now)
    expected = (0.7 * now[0].exp() + 0.3 * told[1].log_probs[0, 0].exp()).log()
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)  # float32
    assert torch.equal(found[1], now[1])  # of that row only the last column was heard
    assert torch.equal(found[2], now[2])  # (5, 5) came again, when the member expected something else
    of_other = heard.drafts(1, [4], torch.tensor([[6, 7]]), told[1].log_probs[:1, 1])
    expected = (0.7 * told[0].log_probs[0, 1].exp() + 0.3 * told[1].log_probs[0, 1].exp()).log()
    torch.testing.assert_close(of_other[0], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(heard.drafts(1, [9], torch.tensor([[6, 7]]), now[:1]), now[:1])


def test_what_no_member_thinks_possible_is_not_drafted():
    duo = ensemble_of({"a": llama(), "b": qwen()}, [0.5, 0.5], "log_linear")
    first, second = (torch.full((1, 1, 37), -torch.inf) for _ in range(2))
    first[..., 3], second[..., 4] = 0.0, 0.0
    heard = Recalled(duo)
    heard.hear([0], torch.tensor([[5, 6]]), [1], [Told(first), Told(second)])
    assert torch.equal(heard.drafts(0, [0], torch.tensor([[5, 6]]), first[:, 0]), first[:, 0])


def test_what_was_said_first_is_forgotten_first(duo, monkeypatch):
    monkeypatch.setattr(recalled, "MOST", 3 * 2 * 37)
    heard = Recalled(duo)
    for turn in range(9):
        heard.hear([0], torch.tensor([[turn, turn + 1]]), [1], [said(turn, 1, 1), said(turn, 1, 1)])
    assert sorted(heard._places) == [(0, 6, 7), (0, 7, 8), (0, 8, 9)]
    heard.hear([0], torch.tensor([[6, 7]]), [1], [said(50, 1, 1), said(51, 1, 1)])
    assert sorted(heard._places) == [(0, 6, 7), (0, 7, 8), (0, 8, 9)]


def test_an_ensemble_with_a_gate_remembers_nothing():
    model = gated({"small": llama(), "b": gpt2()}, some_gate())
    heard = Recalled(model)
    heard.hear([0, 1, 2], TEXT, [2, 2, 2], [said(0), said(1)])
    now = said(3).log_probs[:, 0]
    assert torch.equal(heard.drafts(0, [0, 1, 2], TEXT[:, :2], now), now)


def test_text_that_repeats_itself_is_drafted_better_and_is_the_same(monkeypatch):
    trio = ensemble_of({"a": llama(), "b": qwen(), "c": gpt2()}, [0.4, 0.3, 0.3])
    ids, mask = prompts(5, 9, (3, 1, 0, 8, 5))
    given = {"attention_mask": mask, "max_new_tokens": 45}
    found = trio.speculate(ids, block=1, **given)
    monkeypatch.setattr(Recalled, "drafts", lambda self, number, numbers, text, own: own)
    alone = trio.speculate(ids, block=1, **given)
    assert torch.equal(found.sequences, alone.sequences)
    assert torch.equal(found.sequences, trio.generate(ids, do_sample=False, eos_token_id=None, **given))
    assert found.kept > alone.kept


@torch.no_grad()
def test_samples_follow_the_ensemble_where_others_are_recalled(monkeypatch):
    used = []
    plain = Recalled.drafts

    def counted(self, number, rows, text, own):
        found = plain(self, number, rows, text, own)
        used.append(int((found != own).any(-1).sum()))
        return found

    monkeypatch.setattr(Recalled, "drafts", counted)
    model = ensemble_of({name: llama(seed, tokens=3, layers=1) for name, seed in (("a", 5), ("b", 6))}, [0.6, 0.4])
    prompt, rows, new = torch.tensor([[2, 1, 1, 1, 1]]), 3000, 4
    every = torch.tensor(list(itertools.product(range(3), repeat=new)))
    logits = model(input_ids=torch.cat([prompt.expand(len(every), -1), every], 1)).logits
    expected = logits[:, 4 : 4 + new].gather(-1, every[..., None]).sum((1, 2)).exp() * rows
    found = model.speculate(
        prompt.expand(rows, -1), max_new_tokens=new, do_sample=True, block=1, generator=torch.Generator().manual_seed(0)
    )
    counts = torch.bincount(found.sequences[:, 5:] @ torch.tensor([27, 9, 3, 1]), minlength=81)
    assert sum(used) > rows / 10
    # chi-square with 80 degrees of freedom is below 137 with probability 0.9999
    assert ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum() < 137
