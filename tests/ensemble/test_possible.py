"""Where a rule and the options of `generate` together leave no token, that is said, with what to do."""

import pytest
import torch
from test_seq2seq import t5
from tiny_members import gpt2, llama, prompts

from graft.ensemble.model import ensemble_of
from graft.ensemble.possible import Possible
from graft.errors import RunError

END = 2


def sure_of_the_end(model):
    """A model that gives nearly all probability to the end of the text, whatever stands before."""
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.transformer.wte.weight[END] = 10
    return model


def trio(top_p):
    members = {"base": sure_of_the_end(gpt2(1)), "expert": llama(2), "anti": llama(3)}
    return ensemble_of(members, None, "experts", top_p=top_p)


WORDS = "experts: expected a token that may be written, found that options of `generate` .* forbid all .*: set `top_p`"


@pytest.mark.parametrize("how", [{"do_sample": True}, {"do_sample": False}], ids=["sampled", "greedy"])
def test_a_nucleus_of_the_forbidden_end_alone_says_what_to_do(how):
    ids, mask = prompts()
    given = {"attention_mask": mask, "max_new_tokens": 6, **how}
    with pytest.raises(RunError, match=WORDS):
        trio(0.9).generate(ids, min_new_tokens=3, **given)
    assert (trio(0.9).generate(ids, **given)[:, ids.shape[1]] == END).all()


def test_a_wide_nucleus_goes_on():
    ids, mask = prompts()
    written = trio(1.0).generate(ids, attention_mask=mask, min_new_tokens=3, max_new_tokens=6, do_sample=True)
    assert not (written[:, ids.shape[1] : ids.shape[1] + 3] == END).any()


def test_tokens_that_are_implausible_are_named_by_their_rule():
    ids, mask = prompts()
    pair = ensemble_of({"expert": sure_of_the_end(gpt2(1)), "amateur": llama(2)}, None, "contrastive")
    with pytest.raises(RunError, match=r"contrastive: expected .*: set `plausibility` of the rule nearer to 0"):
        pair.generate(ids, attention_mask=mask, min_new_tokens=2, max_new_tokens=4)


def test_a_translator_says_so_too():
    source, _ = prompts(1, 7, ())
    pair = ensemble_of({"a": t5(1), "b": t5(2)})
    everything = list(range(pair.config.vocab_size))
    with pytest.raises(RunError, match=r"linear: expected a token that may be written, .*possible: leave those"):
        pair.generate(source, suppress_tokens=everything, max_new_tokens=2)


def test_processors_of_the_caller_stay_and_beams_are_left_alone():
    ids, mask = prompts()
    seen = []
    watch = lambda ids, scores: seen.append(len(ids)) or scores  # noqa: E731
    trio(1.0).generate(ids, attention_mask=mask, max_new_tokens=1, logits_processor=[watch])
    assert seen == [len(ids)]
    beams = trio(0.9).generate(ids, attention_mask=mask, max_new_tokens=3, num_beams=2, do_sample=False)
    assert (beams[:, ids.shape[1]] == END).all()


def test_nobody_looks_where_no_processor_forbids_anything(monkeypatch):
    looked = []
    monkeypatch.setattr(Possible, "__call__", lambda _, ids, scores: looked.append(len(ids)) or scores)
    ids, mask = prompts()
    pair = ensemble_of({"a": gpt2(1), "b": llama(2)})
    given = {"attention_mask": mask, "max_new_tokens": 2, "do_sample": False}
    pair.generate(ids, eos_token_id=None, **given)
    assert not looked
    pair.generate(ids, min_new_tokens=2, **given)
    assert looked == [len(ids)] * 2
