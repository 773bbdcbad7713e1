"""Dropout at test time: passes of one model, against masks applied by hand; checkpoints of one training as members."""

import shutil

import pytest
import torch
from test_ensemble_folder import facts, family, letters, lines, made, run  # noqa: F401
from tiny_members import gpt2, llama, prompts, qwen
from torch import nn

from graft import models
from graft.ensemble import VERB
from graft.ensemble.dropout import FixedDropout, thinned, twin
from graft.ensemble.model import ensemble_of
from graft.errors import RequestError, SettingsError

GIVEN = {"max_new_tokens": 6, "eos_token_id": None}


def storages(model):
    """Bytes of the different storages of a model's weights."""
    found = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in model.parameters()}
    return sum(found.values())


def passes(model, share=0.2, count=4, seed=0):
    return {f"m.{number}": thinned(model, share, seed + number) for number in range(count)}


@torch.no_grad()
def test_a_pass_is_the_model_with_the_masked_columns_of_its_linear_layers_scaled_or_gone():
    model = llama()
    by_hand = llama()
    for name, layer in by_hand.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.weight.mul_(FixedDropout(0.3, 7, name).mask(layer.in_features))
    ids, _ = prompts(padded=())
    assert torch.allclose(thinned(model, 0.3, 7)(ids).logits, by_hand(ids).logits, atol=1e-5)
    assert not torch.allclose(thinned(model, 0.3, 7)(ids).logits, model(ids).logits, atol=1e-2)


@torch.no_grad()
def test_its_own_dropout_layers_keep_their_shares_and_are_masked_in_evaluation():
    model = gpt2()
    masks = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Dropout) and layer.p:
            masks[name] = FixedDropout(layer.p, 3, name)
    for name, mask in masks.items():
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, mask=mask: mask(out))
    ids, _ = prompts(padded=())
    assert torch.allclose(thinned(gpt2(), None, 3)(ids).logits, model(ids).logits, atol=1e-5)
    assert {mask.share for mask in masks.values()} == {0.1}


def test_a_mask_leaves_the_share_it_should_and_the_mean_as_it_was():
    masks = torch.stack([FixedDropout(0.25, seed, "x").mask(400) for seed in range(50)])
    assert masks.unique().tolist() == pytest.approx([0, 4 / 3])
    # 20 000 draws: the share's standard deviation is 0.003
    assert (masks == 0).float().mean().item() == pytest.approx(0.25, abs=0.015)
    assert not torch.equal(FixedDropout(0.25, 0, "x").mask(9), FixedDropout(0.25, 0, "y").mask(9))


@torch.no_grad()
def test_passes_are_averaged_and_the_same_seed_gives_the_same():
    ids, _ = prompts(padded=())
    told = [member(ids).logits.softmax(-1) for member in passes(llama()).values()]
    assert not torch.allclose(told[0], told[1], atol=1e-2)
    found = ensemble_of(passes(llama()))(ids).logits
    assert torch.allclose(found.exp(), sum(told) / 4, atol=1e-6)
    assert torch.equal(found, ensemble_of(passes(llama()))(ids).logits)


def test_the_weights_are_in_memory_once():
    model = qwen()
    assert storages(ensemble_of(passes(model, count=8))) == storages(model)
    assert twin(model).lm_head.weight is model.lm_head.weight


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}])
def test_with_a_cache_and_in_a_padded_batch_it_says_what_it_says_alone(way):
    ensemble = ensemble_of(passes(gpt2(), None))
    ids, mask = prompts()
    found = ensemble.generate(ids, attention_mask=mask, **GIVEN, **way)
    assert torch.equal(found, ensemble.generate(ids, attention_mask=mask, use_cache=False, **GIVEN, **way))
    alone = ensemble.generate(ids[:1, 3:], **GIVEN, **way)
    assert torch.equal(found[:1, 3:], alone)


def test_a_model_without_dropout_layers_is_refused_unless_a_share_is_said():
    with pytest.raises(RequestError, match=r"LlamaForCausalLM has no dropout layer .*say the share"):
        thinned(llama(), None, 0)


def test_passes_saved_from_memory_are_the_same_passes(tmp_path):
    ensemble = ensemble_of(passes(llama()))
    ensemble.save_pretrained(tmp_path, self_contained=True)
    assert [place.name for place in (tmp_path / "members").iterdir()] == ["m.0"]
    ids, _ = prompts(padded=())
    loaded = models.load(tmp_path)
    assert torch.equal(loaded(ids).logits, ensemble(ids).logits)
    assert storages(loaded) == storages(llama())


@torch.no_grad()
def test_a_recipe_makes_passes_with_their_seed(family):  # noqa: F811
    raw = {"members": [{"model": "llama", "dropout": {"passes": 3, "share": 0.1}}, "gpt2"]}
    target, found = run(family, raw)
    assert found["weights"] == pytest.approx({"llama.1": 1 / 6, "llama.2": 1 / 6, "llama.3": 1 / 6, "gpt2": 0.5})
    loaded = models.load(target)
    alone = models.load(family / "llama")
    members = [thinned(alone, 0.1, number) for number in range(3)]
    ids, _ = prompts(padded=())
    told = sum(member(ids).logits.softmax(-1) / 6 for member in members)
    told = told + models.load(family / "gpt2")(ids).logits.softmax(-1) / 2
    assert torch.allclose(loaded(ids).logits.exp(), told, atol=1e-6)
    assert storages(loaded) == storages(alone) + storages(loaded.members[3])


def test_weights_of_passes_can_be_fitted(family):  # noqa: F811
    member = {"model": "gpt2", "dropout": {"passes": 2, "seed": 5}}
    raw = {"members": [member, "llama"], "weights": {"fit": "text.dev"}}
    target, found = run(family, raw, {"text": lines(family / "text.jsonl", 40)})
    assert list(found["weights"]) == ["gpt2.1", "gpt2.2", "llama"]
    assert found["loss"] <= min(found["member_losses"].values()) + 1e-6
    assert [entry.get("dropout") for entry in models.load(target).config.members] == [
        {"share": None, "seed": 50000},
        {"share": None, "seed": 50001},
        None,
    ]


def keep(family, *names):  # noqa: F811
    """Other models as checkpoints of the model `llama`."""
    for name, model in names:
        place = family / "llama" / "checkpoints" / name
        model.save_pretrained(place)
        letters().save_pretrained(place)


@torch.no_grad()
@pytest.mark.parametrize("self_contained", [False, True])
def test_the_last_checkpoints_of_a_training_are_members(family, tmp_path, self_contained):  # noqa: F811
    keep(family, ("step-9", llama(11)), ("step-10", llama(12)), ("step-100", llama(13)), ("ema", llama(14)))
    raw = {"members": [{"model": "llama", "checkpoints": "last 2"}], "self_contained": self_contained}
    target, found = run(family, raw)
    assert found["weights"] == {"llama-step-10": 0.5, "llama-step-100": 0.5}
    if self_contained:
        shutil.copytree(target, tmp_path / "alone")
        shutil.rmtree(family)
        target = tmp_path / "alone"
    ids, _ = prompts(padded=())
    told = sum(llama(seed)(ids).logits.softmax(-1) / 2 for seed in (12, 13))
    assert torch.allclose(models.load(target)(ids).logits.exp(), told, atol=1e-6)


def test_a_model_its_average_and_a_checkpoint_are_three_members(family):  # noqa: F811
    keep(family, ("step-9", llama(11)), ("ema", llama(14)))
    members = [{"model": "llama", "weight": 0.5}, {"model": "llama", "weight": 0.3, "checkpoint": "ema"}]
    members.append({"model": "llama", "weight": 0.2, "checkpoint": "step-9"})
    _, found = run(family, {"members": members})
    assert found["weights"] == {"llama": 0.5, "llama-ema": 0.3, "llama-step-9": 0.2}


@pytest.mark.parametrize(
    ("member", "words"),
    [
        ({"checkpoint": "step-7"}, r"llama: expected the checkpoint step-7, found step-9: keep it .*keep: \{last: N\}"),
        ({"checkpoints": "last 3"}, r"llama: expected 3 checkpoints, found step-9: keep more"),
    ],
)
def test_checkpoints_that_are_not_there_are_refused_with_those_that_are(family, member, words):  # noqa: F811
    keep(family, ("step-9", llama(11)))
    with pytest.raises(RequestError, match=words):
        run(family, {"members": [{"model": "llama", **member}, "gpt2"]})


@torch.no_grad()
def test_members_have_a_type_and_a_device_of_their_own(family):  # noqa: F811
    raw = {"members": [{"model": "llama", "dtype": "bfloat16", "device": "cpu"}, "qwen"]}
    loaded = models.load(run(family, raw)[0])
    assert [member.dtype for member in loaded.members] == [torch.bfloat16, torch.float32]
    ids, _ = prompts(padded=())
    told = [models.load(family / "llama", dtype="bfloat16"), models.load(family / "qwen")]
    mixed = sum(member(ids).logits.float().softmax(-1) / 2 for member in told)
    assert torch.allclose(loaded(ids).logits.exp(), mixed, atol=1e-6)


def test_what_cannot_be_said_of_members_is_refused(family):  # noqa: F811
    for member, words in [
        ({"checkpoints": "last", "model": "a"}, "checkpoints"),
        ({"checkpoint": "x", "checkpoints": "all", "model": "a"}, "found both"),
    ]:
        with pytest.raises(SettingsError, match=words):
            VERB.parse({"members": [member, "b"]})
    with pytest.raises(SettingsError, match="a weight for every member or for none, found some"):
        VERB.parse({"members": [{"model": "a", "weight": 0.5}, "b"]})
    with pytest.raises(SettingsError, match="each member once"):
        VERB.parse({"members": [{"model": "a"}, "a"]})
    raw = {"combine": "experts", "members": ["llama", "qwen", {"model": "gpt2", "dropout": {}}]}
    (problem,) = VERB.check(VERB.parse(raw), facts(family, "llama", "qwen", "gpt2"))
    assert problem == "gpt2 stands for several members, which share a weight: experts takes single ones"
    raw = {"members": [{"model": "llama", "dropout": {}}, "qwen"], "draft": "llama"}
    (problem,) = VERB.check(VERB.parse(raw), facts(family, "llama", "qwen"))
    assert "expected one member as draft" in problem
