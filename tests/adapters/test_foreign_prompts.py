"""Prompts that peft's modules make, put in front by graft: the logits are peft's own."""

import pytest
import torch

from graft.adapters.folder import weights_of
from graft.adapters.foreign import wrap
from graft.adapters.stack import adapters_of
from graft.errors import RequestError

from .families import family, inputs, moved

peft = pytest.importorskip("peft")

KINDS = {
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 12},
    "PROMPT_TUNING": {"num_virtual_tokens": 5},
    "PREFIX_TUNING": {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 12},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 1},
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_the_logits_are_those_of_peft(name, kind):
    settings = {"peft_type": kind, **KINDS[kind]}
    ours = wrap(family(name), settings, None, "mine").eval()
    config = {**settings, "task_type": "CAUSAL_LM"}
    config.pop("peft_type")
    made = {str(getattr(k, "value", k)): cls for k, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}[kind](**config)
    theirs = peft.get_peft_model(family(name), made).eval()
    site = next(iter(adapters_of(ours).sites["mine"].values()))
    moved(ours)
    theirs.prompt_encoder["default"].load_state_dict(site.made.encoder.state_dict())
    given = inputs(ours)
    more = {"task_ids": torch.zeros(2, dtype=torch.long)} if "MULTITASK" in kind else {}
    mask = torch.ones_like(given["input_ids"])
    with torch.no_grad():
        expected = theirs(**given, attention_mask=mask, **more).logits[:, -given["input_ids"].shape[1] :]
        torch.testing.assert_close(ours(**given).logits, expected, rtol=1e-4, atol=1e-5)


def test_only_peft_s_modules_are_trained_and_what_is_saved_is_what_they_made():
    model = wrap(family("llama"), {"peft_type": "P_TUNING", **KINDS["P_TUNING"]}, None, "mine")
    assert all("made.encoder" in name for name, p in model.named_parameters() if p.requires_grad)
    held = weights_of(adapters_of(model))
    assert set(held) == {"mine.input.embeddings"}
    assert held["mine.input.embeddings"].shape == (3, 16)
    keys = wrap(family("llama"), {"peft_type": "PREFIX_TUNING", **KINDS["PREFIX_TUNING"]}, None, "mine")
    held = weights_of(adapters_of(keys))
    assert len(held) == 4
    assert {tuple(tensor.shape) for tensor in held.values()} == {(2, 4, 4)}


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_models_that_are_no_decoders_are_refused(name):
    with pytest.raises(RequestError, match="stand in front of decoders, found"):
        wrap(family(name), {"peft_type": "P_TUNING", **KINDS["P_TUNING"]}, None)


def test_tokens_of_another_width_are_refused():
    with pytest.raises(RequestError, match="expected learned tokens of 8 channels"):
        wrap(family("opt"), {"peft_type": "P_TUNING", **KINDS["P_TUNING"]}, None)


def test_keys_of_another_size_are_refused():
    settings = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "num_layers": 1, "token_dim": 24}
    with pytest.raises(RequestError, match=r"expected keys and values of|leave `token_dim`"):
        wrap(family("llama"), settings, None)
