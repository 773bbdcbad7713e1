"""One cache for all members, whoever made it; members that keep something else are read without one."""

import pytest
import torch
from tiny_members import ENDS, TOKENS, bloom, five, llama, prompts, qwen, sharp
from transformers import (
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    StaticCache,
)

from graft.ensemble.model import ensemble_of
from graft.errors import RequestError


@pytest.mark.parametrize(
    "made",
    [lambda config: DynamicCache(), lambda config: StaticCache(config, max_cache_len=20)],
    ids=["grown", "static"],
)
def test_a_cache_that_was_made_by_hand_holds_all_members(made):
    ensemble, (ids, mask) = ensemble_of(five()), prompts()
    asked = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    cache = made(ensemble.config)
    torch.testing.assert_close(
        ensemble.generate(ids, past_key_values=cache, **asked), ensemble.generate(ids, use_cache=False, **asked)
    )
    assert len(cache.layers) == ensemble.config.num_hidden_layers == 9


def test_a_cache_of_a_single_member_says_what_it_should_be_made_of():
    small = llama()
    ensemble, (ids, _) = ensemble_of({"small": small, "other": qwen()}), prompts()
    with pytest.raises(RequestError, match=r"layers of all members \(3 or more\), found one of 2: .*ensemble.config"):
        ensemble(ids, past_key_values=DynamicCache(config=small.config), use_cache=True)


@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_biases_that_follow_the_mask_fit_a_static_cache_also_in_an_ensemble_of_ensembles(name):
    own = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "alibi": True}
    config = FalconConfig(vocab_size=TOKENS, **own, **ENDS)
    member = bloom() if name == "bloom" else sharp(FalconForCausalLM(config), 5)
    ensemble = ensemble_of({"pair": ensemble_of({"biased": member, "llama": llama()}), "qwen": qwen()})
    ids, mask = prompts()
    asked = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    plain = ensemble.generate(ids, use_cache=False, **asked)
    torch.testing.assert_close(ensemble.generate(ids, cache_implementation="static", **asked), plain)


def convolutional():
    own = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    types = ["conv", "full_attention"]
    return Lfm2ForCausalLM(Lfm2Config(vocab_size=TOKENS, num_hidden_layers=2, layer_types=types, **own, **ENDS))


def without_any():
    config = OpenAIGPTConfig(vocab_size=TOKENS, n_embd=16, n_layer=1, n_head=2, n_positions=64, **ENDS)
    return OpenAIGPTLMHeadModel(config)


@pytest.mark.parametrize("made", [convolutional, without_any])
def test_a_member_that_keeps_no_layers_of_keys_is_read_anew(made):
    ensemble, (ids, mask) = ensemble_of({"llama": llama(), "other": sharp(made(), 6)}), prompts()
    asked = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    plain = ensemble.generate(ids, use_cache=False, **asked)
    torch.testing.assert_close(ensemble.generate(ids, **asked), plain)
    torch.testing.assert_close(ensemble.generate(ids, num_beams=1, past_key_values=DynamicCache(), **asked), plain)
    assert not ensemble.caches
