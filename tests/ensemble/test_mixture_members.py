"""Mixtures of experts as members, which read each text twice: with the ensemble's cache, and drafting, as without."""

import pytest
import torch
from tiny_bytes import LEFT
from tiny_members import bloom, gpt2, llama, mistral, mixed, prompts, qwen

from graft.ensemble.byte_level.byte_model import ByteModel, Cover
from graft.ensemble.byte_level.scorer import followed, score
from graft.ensemble.model import ensemble_of

MEMBERS = {"llama": llama, "mistral": mistral, "gpt2": gpt2, "bloom": bloom}


@pytest.fixture(scope="module")
def ensemble():
    return ensemble_of({"qwen": qwen(), **{name: mixed(make()) for name, make in MEMBERS.items()}})


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_an_ensemble_of_mixtures_writes_with_a_cache_what_it_writes_without(ensemble, how):
    ids, mask = prompts()
    how = {"attention_mask": mask, "max_new_tokens": 8, "eos_token_id": None, "do_sample": False, **how}
    written = ensemble.generate(ids, **how)
    assert torch.equal(written, ensemble.generate(ids, use_cache=False, **how))
    told = torch.stack([member(ids).logits.softmax(-1) for member in ensemble.members]).mean(0)
    assert torch.allclose(ensemble(ids).logits.exp(), told, atol=1e-5)


@pytest.mark.parametrize(("draft", "block"), [("qwen", 4), ("llama", 1), ("mistral", 3), ("bloom", None)])
def test_mixtures_draft_and_judge_in_padded_batches(ensemble, draft, block):
    ids, mask = prompts(4, 9, (3, 1, 0, 8))
    plain = ensemble.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=16, eos_token_id=None)
    found = ensemble.speculate(ids, draft, attention_mask=mask, max_new_tokens=16, block=block)
    assert torch.equal(found.sequences, plain)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_trees_of_tokens_behind_bytes_are_read_twice_as_well(make):
    """What is kept of a text, where its tokens branch: as where nothing is kept."""
    model = mixed(make(3)).double()
    texts = [b"abcabcacb" * 5, b"a", b"bcab", b"cabca" * 9, b"ccba" * 3, b"bacbacabc" * 7]
    kept, plain = (ByteModel(model, LEFT, Cover(drop=0.2)) for _ in range(2))
    plain.reader.style = "plain"
    wanted = followed(plain, texts)
    for found in (score(kept, texts), followed(kept, texts)):
        for own, other in zip(found, wanted, strict=True):
            assert own.log_probs == pytest.approx(other.log_probs, abs=1e-5)
    assert kept.reader.style == "packed"
