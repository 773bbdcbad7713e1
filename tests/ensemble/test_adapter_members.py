"""Adapters on one base as members: each says what the base changed by it says, and the base is in memory once."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from test_ensemble_folder import facts, letters, lines, run
from tiny_members import llama, prompts

from graft import models
from graft.adapters import adopt
from graft.adapters.folder import save
from graft.ensemble import PROCESS, VERB
from graft.ensemble.dropout import thinned
from graft.ensemble.members import load_members, loaded, share
from graft.errors import CheckpointError
from graft.tune import lora
from graft.verb import Facts
from graft.verbs import verb

TARGETS = ["q_proj", "v_proj", "down_proj"]


def factors(seed, rank=3):
    """A and B for every target of a tiny Llama, by the path of the layer."""
    generator = torch.Generator().manual_seed(seed)
    layers = {n: m for n, m in llama().named_modules() if n.rpartition(".")[2] in TARGETS}
    return {
        name: (
            torch.randn(rank, layer.in_features, generator=generator) * 0.3,
            torch.randn(layer.out_features, rank, generator=generator) * 0.3,
        )
        for name, layer in layers.items()
    }


def peft_folder(folder, seed, base, dropout=0.0):
    """A LoRA folder as peft writes it: rank 3, alpha 6."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": 3}
    config |= {"lora_alpha": 6, "lora_dropout": dropout, "target_modules": TARGETS, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = {}
    for name, (a, b) in factors(seed).items():
        weights[f"base_model.model.{name}.lora_A.weight"] = a
        weights[f"base_model.model.{name}.lora_B.weight"] = b
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def changed(seed):
    """The base with W + 2 B A written out."""
    model = llama()
    with torch.no_grad():
        for name, (a, b) in factors(seed).items():
            model.get_submodule(name).weight.add_(2 * b @ a)
    return model


def graft_folder(folder, seed, base):
    """An adapter as `tune` writes it, with weights that do something."""
    model = models.load(base)
    stack = adopt(model, lora.points(lora.Settings(rank=2)), "own", base=base)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in stack.sites["own"].parameters():
            weight.normal_(std=0.3)
    save(model, folder)
    letters().save_pretrained(folder)
    return model.eval()


@pytest.fixture
def family(tmp_path):
    root = tmp_path / "family" / "models"
    llama().save_pretrained(root / "base")
    letters().save_pretrained(root / "base")
    return root


def storages(model):
    """Bytes of the different storages of a model's weights."""
    found = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in model.parameters()}
    return sum(found.values())


def adapter_bytes(*seeds):
    return sum(4 * (a.numel() + b.numel()) for seed in seeds for a, b in factors(seed).values())


@torch.no_grad()
def test_peft_adapters_say_what_the_changed_base_says_and_cost_only_their_own_weights(family):
    for number in (1, 2):
        peft_folder(family / f"lora{number}", number, "../base")
    members = {"base": 0.5, "lora1": 0.3, "lora2": 0.2}
    assert VERB.check(VERB.parse({"members": members}), facts(family, *members)) == []
    found = models.load(run(family, {"members": members})[0])
    ids, _ = prompts(padded=())
    told = [model(ids).logits.softmax(-1) for model in (llama(), changed(1), changed(2))]
    expected = sum(weight * each for weight, each in zip(members.values(), told, strict=True))
    assert torch.allclose(found(ids).logits.exp(), expected, atol=1e-5)
    assert storages(found) == storages(llama()) + adapter_bytes(1, 2)
    cached = found.generate(ids, num_beams=2, max_new_tokens=5, eos_token_id=None)
    again = found.generate(ids, num_beams=2, max_new_tokens=5, eos_token_id=None, use_cache=False)
    assert torch.equal(cached, again)


@torch.no_grad()
def test_adapters_alone_share_a_base_that_is_no_member_and_may_be_fitted(family):
    for number in (1, 2):
        peft_folder(family / f"lora{number}", number, "../base")
    raw = {"members": ["lora1", "lora2"], "weights": {"fit": "text.dev"}}
    target, fitted = run(family, raw, {"text": lines(family / "text.jsonl", 40)})
    found = models.load(target)
    assert storages(found) == storages(llama()) + adapter_bytes(1, 2)
    assert fitted["loss"] <= min(fitted["member_losses"].values()) + 1e-6
    assert (target / "tokenizer.json").exists()


@torch.no_grad()
def test_adapters_of_tune_share_their_base(family):
    alone = {f"own{number}": graft_folder(family / f"own{number}", number, family / "base") for number in (1, 2)}
    found = models.load(run(family, {"members": list(alone)})[0])
    ids, _ = prompts(padded=())
    expected = sum(model(ids).logits.softmax(-1) / 2 for model in alone.values())
    assert torch.allclose(found(ids).logits.exp(), expected, atol=1e-6)
    own = sum(weight.nbytes for name, weight in alone["own1"].named_parameters() if "graft_adapters" in name)
    assert own > 0
    assert storages(found) == storages(llama()) + 2 * own


@torch.no_grad()
@pytest.mark.parametrize("kind", ["peft", "tune"])
def test_a_self_contained_ensemble_has_the_base_of_its_adapters_once(family, tmp_path, kind):
    for number in (1, 2):
        if kind == "peft":
            peft_folder(family / f"m{number}", number, "../base")
        else:
            graft_folder(family / f"m{number}", number, family / "base")
    target, _ = run(family, {"members": ["m1", "m2"], "self_contained": True})
    ids, _ = prompts(padded=())
    before = models.load(target)(ids).logits
    assert sorted(place.name for place in (target / "members").iterdir()) == ["m1", "m1-base", "m2"]
    shutil.copytree(target, tmp_path / "alone")
    models.load(target).save_pretrained(tmp_path / "copy", self_contained=True)
    shutil.rmtree(family)
    for place in ("alone", "copy"):
        assert torch.equal(models.load(tmp_path / place)(ids).logits, before)


@torch.no_grad()
def test_an_adapters_own_dropout_gives_passes_that_share_its_weights(family):
    peft_folder(family / "lora", 1, "../base", dropout=0.4)
    raw = {"members": [{"model": "lora", "dropout": {"passes": 3, "seed": 2}}]}
    found = models.load(run(family, raw)[0])
    ids, _ = prompts(padded=())
    assert storages(found) == storages(llama()) + adapter_bytes(1)
    told = [member(ids).logits.softmax(-1) for member in found.members]
    assert not torch.allclose(told[0], told[1], atol=1e-3)
    assert torch.allclose(found(ids).logits.exp(), sum(told) / 3, atol=1e-6)
    plain = loaded(family / "lora", {})
    plain(ids)  # what an adapter keeps to run fast knows nothing of masks that come later
    assert torch.equal(thinned(plain, None, 20001)(ids).logits.softmax(-1), told[1])
    assert torch.allclose(plain(ids).logits, changed(1)(ids).logits, atol=1e-4)


def test_members_of_other_types_do_not_share(family):
    entries = [
        {"name": "base", "path": "base"},
        {"name": "half", "path": "base", "dtype": "bfloat16"},
        {"name": "again", "path": "base"},
    ]
    first, half, again = load_members(entries, family, None)
    assert again is first
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


def test_only_equal_weights_of_the_same_name_are_shared():
    first, second = llama(), llama()
    with torch.no_grad():
        second.lm_head.weight[0, 0] += 1
    share(second, [first])
    assert second.lm_head.weight is not first.lm_head.weight
    assert second.model.norm.weight is first.model.norm.weight


def test_an_adapter_whose_base_is_gone_is_named(family):
    peft_folder(family / "lora", 1, "../base")
    target, _ = run(family, {"members": ["lora"]})
    shutil.rmtree(family / "base")
    with pytest.raises(CheckpointError, match="lora: the adapter's base is missing"):
        models.load(target)


def test_an_estimate_counts_a_shared_base_once(family, tmp_path):
    base = facts(family, "base")["base"]
    for place, name in enumerate(("one", "two")):
        graft_folder(family / name, place, family / "base")
    found = facts(family, "one", "two")
    own = found["one"].bytes - base.bytes
    assert 0 < own < base.bytes
    cost = VERB.estimate(VERB.parse({"members": ["one", "two"]}), found)
    assert cost.parameters == base.parameters
    assert base.bytes + own <= cost.memory_bytes - PROCESS <= base.bytes + 2 * own
    with_it = VERB.estimate(VERB.parse({"members": ["one", "base"]}), found | {"base": base})
    assert with_it.parameters == base.parameters
    assert base.bytes < with_it.memory_bytes - PROCESS <= base.bytes + 2 * own
    apart = VERB.estimate(VERB.parse({"members": ["one", "base"]}), {"one": base, "base": base})
    assert apart.memory_bytes - PROCESS == 2 * base.bytes
    tune = verb("tune")
    full = tune.facts(tune.parse({"from": "base", "data": "text", "method": "full"}), {"base": base}, "full")
    both = VERB.estimate(VERB.parse({"members": ["one", "full"]}), found | {"full": full})
    assert both.parameters == 2 * base.parameters


def test_a_plan_counts_the_base_of_adapters_once():
    base = Facts("decoder", "begin", "words", 1000, 4000, {"model_type": "llama"})
    tune = verb("tune")
    settings = tune.parse({"from": "base", "data": "text", "method": {"lora": {"rank": 2}}})
    known = {"base": base} | {name: tune.facts(settings, {"base": base}, name) for name in ("one", "two")}
    for members, times in ((["one", "two"], 1), (["one", "two", "base"], 1), (["base"], 1)):
        assert VERB.facts(VERB.parse({"members": members}), known, "key").bytes == times * 4000
    full = tune.facts(tune.parse({"from": "base", "data": "text", "method": "full"}), {"base": base}, "full")
    found = VERB.facts(VERB.parse({"members": ["one", "full"]}), known | {"full": full}, "key")
    assert (found.parameters, found.bytes) == (2000, 8000)
