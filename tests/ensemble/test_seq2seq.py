"""Ensembles of encoder-decoders: against brute force over the members, with beams, padding and caches."""

import subprocess
import sys

import pytest
import torch
from tiny_members import llama, prompts, sharp
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from graft import models
from graft.ensemble.model import ensemble_of
from graft.errors import RequestError

ENDS = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
PLAIN = {"max_new_tokens": 8, "eos_token_id": None}


def t5(seed, layers=2, size=16):
    config = T5Config(
        vocab_size=37, d_model=size, d_kv=8, d_ff=24, num_layers=layers, num_decoder_layers=layers, num_heads=2, **ENDS
    )
    return sharp(T5ForConditionalGeneration(config), seed)


def bart(seed):
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(
        vocab_size=37, d_model=24, encoder_ffn_dim=24, decoder_ffn_dim=24, forced_eos_token_id=None, **sizes, **ENDS
    )
    model = sharp(BartForConditionalGeneration(config), seed)
    model.generation_config.forced_eos_token_id = None
    return model


@pytest.fixture(scope="module")
def members():
    return {"small": t5(1), "deep": t5(2, layers=3, size=24), "bart": bart(3)}


@pytest.fixture(scope="module")
def ensemble(members):
    return ensemble_of(members, [0.5, 0.3, 0.2])


@torch.no_grad()
def mixture(members, source, mask, target):
    alone = [m(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits for m in members.values()]
    return sum(w * logits.softmax(-1) for w, logits in zip([0.5, 0.3, 0.2], alone, strict=True))


def source():
    ids, mask = prompts()
    return ids.flip(1), mask.flip(1)


@torch.no_grad()
def test_logits_and_loss_are_those_of_the_mixture(members, ensemble):
    ids, mask = source()
    target = prompts(padded=())[0]
    shifted = torch.cat([torch.ones(3, 1, dtype=torch.long), target[:, :-1]], 1)
    expected = mixture(members, ids, mask, shifted)
    found = ensemble(input_ids=ids, attention_mask=mask, labels=target)
    assert torch.allclose(found.logits.exp(), expected, atol=1e-6)
    assert found.loss.item() == pytest.approx(-expected.gather(-1, target[..., None]).log().mean().item(), abs=1e-5)


def test_greedy_decoding_of_a_padded_batch_is_brute_force_on_each_source(members, ensemble):
    ids, mask = source()
    found = ensemble.generate(ids, attention_mask=mask, do_sample=False, **PLAIN)
    for row in range(3):
        own = ids[row : row + 1, : int(mask[row].sum())]
        target = torch.tensor([[1]])
        for _ in range(8):
            best = mixture(members, own, torch.ones_like(own), target)[:, -1].argmax(-1)
            target = torch.cat([target, best[:, None]], 1)
        assert found[row].tolist() == target[0].tolist()


@pytest.mark.parametrize("way", [{"num_beams": 4}, {"do_sample": True}, {"num_beams": 3, "do_sample": True}])
def test_decoding_with_a_cache_is_decoding_without(ensemble, way):
    ids, mask = source()
    torch.manual_seed(3)
    cached = ensemble.generate(ids, attention_mask=mask, **PLAIN, **way)
    torch.manual_seed(3)
    assert torch.equal(cached, ensemble.generate(ids, attention_mask=mask, use_cache=False, **PLAIN, **way))


def test_an_ensemble_of_one_is_that_member(members):
    ids, mask = source()
    model = members["deep"]
    found = ensemble_of({"deep": model}).generate(ids, attention_mask=mask, num_beams=3, **PLAIN)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, num_beams=3, **PLAIN))


def test_it_is_saved_with_its_members_and_loads_by_the_auto_class(ensemble, tmp_path):
    ids, mask = source()
    ensemble.save_pretrained(tmp_path / "both", self_contained=True)
    before = ensemble.generate(ids, attention_mask=mask, num_beams=2, **PLAIN)
    for loaded in (models.load(tmp_path / "both"), AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "both")):
        assert torch.equal(loaded.generate(ids, attention_mask=mask, num_beams=2, **PLAIN), before)


AUTO = """
import sys, graft
from transformers import AutoModelForSeq2SeqLM
print(type(AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])).__name__)
"""


def test_the_auto_class_knows_it_after_import_graft(ensemble, tmp_path):
    ensemble.save_pretrained(tmp_path / "both", self_contained=True)
    done = subprocess.run([sys.executable, "-c", AUTO, str(tmp_path / "both")], capture_output=True, text=True)
    assert done.stdout.split() == ["EnsembleForSeq2SeqLM"], done.stderr


@pytest.mark.parametrize("room", ["model", "seq2seq", "show"])
def test_its_rooms_may_be_imported_in_any_order(room):
    program = f"import graft.ensemble.{room}; import transformers; import graft.ensemble.model"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


def test_decoders_beside_encoder_decoders_are_refused(members):
    with pytest.raises(RequestError, match="encoder-decoders beside decoders"):
        ensemble_of({"translator": members["small"], "writer": llama()})
