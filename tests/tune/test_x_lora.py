"""X-LoRA: LoRA adapters mixed by a classifier of the frozen model's hidden states; trained, saved, called as others."""

import json

import pytest
import torch
from safetensors.torch import load_file

import graft
from graft import models
from graft.adapters import adapters_of
from graft.errors import RequestError

from .test_full import base, goes_on_with_the_same_bytes, run  # noqa: F401  (a fixture)

XLORA = {"peft_type": "XLORA", "adapters": {"novels": "novelist", "medicine": "doctor"}, "layerwise_scalings": True}
LARGE = torch.arange(3, 60)[None]


@pytest.fixture(scope="module")
def experts(tmp_path_factory, base):  # noqa: F811
    """Folders of two experts, at different places and of different ranks, trained far enough to matter."""
    folder = tmp_path_factory.mktemp("experts")
    how = {"learning_rate": 0.05, "budget": "12 steps"}
    run(folder / "novelist", base, method={"lora": {"rank": 3, "on": ["attention_linears"]}}, **how)
    run(folder / "doctor", base, "completion", method={"lora": {"rank": 2, "on": ["query", "down"]}}, **how)
    return {name: folder / name / "out" for name in ("novelist", "doctor")}


HOW_TO_MIX = {"method": {"peft": XLORA}, "learning_rate": 0.03, "budget": "6 steps"}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, base, experts):  # noqa: F811
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("mixture")
    found = run(folder, base, experts=experts, **HOW_TO_MIX)
    return folder / "out", found


def test_a_mixture_trains_its_classifier_alone_and_comes_back_with_its_experts(tmp_path, base, experts, mixture):  # noqa: F811
    folder, found = mixture
    places = 4 * 2 + 2  # all of attention in two blocks, and two layers of the feed-forward
    assert found["trained_parameters"] == (32 + 1) * 2 * places
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < losses[0]
    held = load_file(folder / "adapter.safetensors")
    for name, expert in (("novels", "novelist"), ("medicine", "doctor")):
        theirs = load_file(experts[expert] / "adapter.safetensors")
        assert all(torch.equal(held[f"{name}.{key.partition('.')[2]}"], value) for key, value in theirs.items())
    loaded = models.load(folder)
    with torch.no_grad():
        changed = loaded(LARGE).logits
        assert not torch.allclose(changed, models.load(base)(LARGE).logits, atol=1e-3)
        for name in ("novels", "medicine"):
            with adapters_of(loaded).using(name):
                assert not torch.allclose(loaded(LARGE).logits, changed, atol=1e-3)
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(models.load(tmp_path / "again")(LARGE).logits, changed)


SEVERAL = torch.arange(3, 63).view(3, 20)
PADDED = torch.ones(3, 20, dtype=torch.long)
PADDED[1, :7] = PADDED[2, :1] = 0
HOW = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "beams": {"num_beams": 3},
    "padded": {"attention_mask": PADDED},
    "padded beams": {"attention_mask": PADDED, "num_beams": 2},
    "static": {"cache_implementation": "static"},
    "looked up": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("how", HOW)
def test_a_mixture_writes_with_a_cache_what_it_writes_without(mixture, how):
    model, options = models.load(mixture[0]), {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **HOW[how]}
    ids = SEVERAL[:1, :10].repeat(1, 2) if how == "looked up" else SEVERAL
    plain = {
        key: value for key, value in options.items() if key not in ("cache_implementation", "prompt_lookup_num_tokens")
    }
    torch.manual_seed(0)
    with_cache = model.generate(ids, **options)
    torch.manual_seed(0)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **plain))


def test_a_text_that_is_gone_on_with_needs_both_readings(mixture):
    model = models.load(mixture[0])
    with torch.no_grad():
        whole = model(LARGE).logits
        seen = model(LARGE[:, :30], use_cache=True)
        assert torch.allclose(
            model(LARGE[:, 30:], past_key_values=seen.past_key_values).logits, whole[:, 30:], atol=1e-5
        )
        with adapters_of(model).using(None):
            bare = model(LARGE[:, :30], use_cache=True).past_key_values
        with pytest.raises(RequestError, match="found one that lacks what its experts are chosen by"):
            model(LARGE[:, 30:], past_key_values=bare)
        alone = model(LARGE).logits
    assert torch.equal(alone, whole)


def test_rows_that_are_read_without_the_mixture_are_as_if_it_were_not_there(mixture, base):  # noqa: F811
    model = models.load(mixture[0])
    stack = adapters_of(model)
    with torch.no_grad():
        alone, frozen = model(SEVERAL).logits, models.load(base)(SEVERAL).logits
        with stack.using("novels"):
            expert = model(SEVERAL).logits
        with stack.each_row(["m", None, "novels"]):
            each = model(SEVERAL).logits
    for row, expected in enumerate((alone, frozen, expert)):
        assert torch.allclose(each[row], expected[row], atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"use_trainable_adapters": True, "xlora_depth": 2, "xlora_size": 8}])
def test_a_killed_training_of_a_mixture_goes_on_with_the_same_bytes(tmp_path, base, experts, monkeypatch, more):  # noqa: F811
    pytest.importorskip("peft")
    how = {"method": {"peft": {**XLORA, **more}}, "gradient_checkpointing": True, "experts": experts}
    goes_on_with_the_same_bytes(
        tmp_path, base, monkeypatch, {**how, "learning_rate": 0.03, "budget": "5 steps", "checkpoint_every": "1 steps"}
    )
    held = load_file(tmp_path / "whole" / "out" / "adapter.safetensors")
    theirs = load_file(experts["doctor"] / "adapter.safetensors")
    same = [torch.equal(held[f"medicine.{key.partition('.')[2]}"], value) for key, value in theirs.items()]
    assert not any(same) if more else all(same)


def test_what_is_computed_again_for_the_backward_pass_has_the_scalings_of_its_own_text(mixture):
    model = models.load(mixture[0], dtype=torch.float32)
    stack = adapters_of(model)
    stack.train_only(model, "m")
    others = SEVERAL + 60

    def gradients():
        model.zero_grad()
        first, second = (model(ids, labels=ids, use_cache=False).loss for ids in (SEVERAL, others))
        (first - 2 * second).backward()
        return [p.grad.clone() for p in stack.sites["m"].parameters()]

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable()
    assert all(torch.equal(one, other) for one, other in zip(plain, gradients(), strict=True))
    assert all(bool(each.any()) for each in plain)


def theirs(base, folder, adapters=None, **settings):  # noqa: F811
    """peft's own X-LoRA of a folder, or a fresh one."""
    peft = pytest.importorskip("peft")
    model = models.load(base, dtype=torch.float32)
    model.config.use_cache = False
    if folder is not None:
        return peft.PeftModel.from_pretrained(model, folder).eval()
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, **settings)
    made = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in made.base_model.internal_xlora_classifier.parameters():
            parameter.mul_(5)  # away from an even mixture
    return made


def test_a_mixture_is_written_for_peft_which_computes_the_same(tmp_path, base, mixture):  # noqa: F811
    ours = models.load(mixture[0])
    written = graft.adapt(tmp_path / "written", adapters=[str(mixture[0])], export="peft") / "peft"
    made = theirs(base, written)
    with torch.no_grad():
        assert torch.allclose(made(LARGE).logits, ours(LARGE).logits, atol=1e-5)


SETTINGS = {
    "plain": {},
    "layerwise": {"layerwise_scalings": True, "softmax_temperature": 0.3, "global_scaling_weight": 2.0},
    "deep": {"xlora_depth": 3, "xlora_size": 8},
    "sparse": {"layerwise_scalings": True, "top_k_lora": 1, "scaling_pass_value": 0.7},
    "sparse, alone": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "without softmax": {"enable_softmax": False},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_mixture_of_peft_is_read_and_computes_the_same(tmp_path, base, experts, settings):  # noqa: F811
    for name in experts:
        graft.adapt(tmp_path / name, adapters=[str(experts[name])], export="peft")
    places = {str(number): str(tmp_path / name / "peft") for number, name in enumerate(experts)}
    torch.manual_seed(0)
    made = theirs(base, None, places, **settings)
    made.save_pretrained(tmp_path / "peft")
    ours = models.load(graft.adapt(tmp_path / "ours", peft=str(tmp_path / "peft"), from_=base))
    with torch.no_grad():
        expected = made(LARGE).logits
        assert torch.allclose(ours(LARGE).logits, expected, atol=1e-5)
        assert not torch.allclose(models.load(base)(LARGE).logits, expected, atol=1e-3)
