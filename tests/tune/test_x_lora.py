"""X-LoRA: LoRA adapters mixed by a classifier of the frozen model's hidden states; trained, saved, called as others."""

import importlib.util
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import graft
from graft import models
from graft.adapters import adapters_of
from graft.errors import CheckpointError, RequestError
from graft.facts import facts_of
from graft.lineage import read_manifest
from graft.tune import VERB

from .test_full import base, goes_on_with_the_same_bytes, run  # noqa: F401  (a fixture)
from .test_several import TASKS, job

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


def made(folder, base, novels, medicine, **more):  # noqa: F811
    """A mixture as the command makes it, by folders."""
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"count {n}: {n + 1}"}) + "\n" for n in range(30)))
    adapters = {"novels": str(novels), "medicine": str(medicine)}
    given = {"budget": "2 steps", "batch_size": 4, "method": {"peft": {"peft_type": "XLORA", "adapters": adapters}}}
    return graft.tune(folder / "mix", from_=str(base), data=str(folder / "rows.jsonl"), **{**given, **more})


def test_experts_of_peft_and_of_graft_are_parents_of_a_mixture_that_needs_them_no_more(tmp_path, base, experts):  # noqa: F811
    pytest.importorskip("peft")
    start = shutil.copytree(base, tmp_path / "base")
    novels = shutil.copytree(experts["novelist"], tmp_path / "novels")
    config = json.loads((novels / "config.json").read_text())
    config["graft_adapted"]["base"]["path"] = "../base"
    (novels / "config.json").write_text(json.dumps(config))
    medicine = graft.adapt(tmp_path / "written", adapters=[str(experts["doctor"])], export="peft") / "peft"
    folder = made(tmp_path / "made", start, novels, medicine)
    parents = [parent.name for parent in read_manifest(folder).parents]
    assert parents == [str(start), str(novels), str(medicine)]
    shutil.rmtree(novels)
    shutil.rmtree(tmp_path / "written")
    again = made(tmp_path / "again", base, experts["novelist"], experts["doctor"])
    with torch.no_grad():
        assert torch.allclose(models.load(again)(LARGE).logits, models.load(folder)(LARGE).logits, atol=1e-5)


def test_what_is_wrong_with_a_mixture_is_said_before_anything_runs(tmp_path, base, experts, mixture):  # noqa: F811
    pytest.importorskip("peft")
    run(tmp_path / "tuned", base, budget="1 steps")
    run(tmp_path / "other", tmp_path / "tuned" / "out", method="lora", budget="1 steps")
    run(tmp_path / "wide", base, method="houlsby", budget="1 steps")
    places = {**experts, "other": tmp_path / "other" / "out", "wide": tmp_path / "wide" / "out", "mix": mixture[0]}
    known = {"base": facts_of(base), **{name: facts_of(place) for name, place in places.items()}}

    def problem(first="novelist", second="doctor", **raw):
        config = {"peft_type": "XLORA", "adapters": {"a": first, "b": second}, **raw.pop("config", {})}
        settings = VERB.parse({"from": "base", "data": "d", "method": {"peft": config}, **raw})
        return " ".join(VERB.check(settings, known))

    assert problem() == ""
    assert "expected a LoRA adapter as an expert, found the form bottleneck" in problem(second="wide")
    assert "other was made for another model than base" in problem(second="other")
    assert "base is no LoRA adapter: expected as the expert b" in problem(second="base")
    assert "mix: expected one LoRA adapter as the expert b, found several" in problem(second="mix")
    known["packed"] = replace(known["base"], stored="quantised", folder="")
    assert "novelist was made for another model than packed" in problem(**{"from": "packed"})
    assert "does not fold" in problem(fold=True)
    assert "`compile` does not follow it" in problem(compile=True)
    assert "novelist has adapters: expected the frozen model" in problem(**{"from": "novelist"})
    assert "a `hidden_size` of 32, that of the last hidden states, found 64" in problem(config={"hidden_size": 64})
    assert "did you mean 'xlora_depth'?" in problem(config={"xlora_deep": 2})
    assert "softmax_temperature: expected a number greater than 0" in problem(config={"softmax_temperature": 0})
    assert "a `top_k` of at most 2" in problem(config={"top_k_lora": 3})
    for adapters in (None, ["novelist"], {"a": "novelist"}, {"a.b": "novelist", "c": "doctor"}):
        with pytest.raises(RequestError, match="XLORA expected `adapters`, two LoRA adapters or more by name"):
            problem(config={"adapters": adapters})


def test_the_numbers_of_a_mixture_are_known_before_it_is_made(base, experts, mixture):  # noqa: F811
    pytest.importorskip("peft")
    known = {"base": facts_of(base), **{name: facts_of(place) for name, place in experts.items()}}
    settings = VERB.parse({"from": "base", "data": "rows", **HOW_TO_MIX})
    estimate = VERB.estimate(settings, known)
    held = sum(value.numel() for value in load_file(mixture[0] / "adapter.safetensors").values())
    assert (estimate.disk_bytes, estimate.parameters) == (4 * held, known["base"].parameters + held)
    facts = VERB.facts(settings, known, "key")
    assert not facts.mergeable
    assert facts.config["graft_adapted"]["adapters"]["adapter 1"][0]["of"] == ["novels", "medicine"]


def test_a_mixture_is_folded_by_nothing(tmp_path, base, experts, mixture):  # noqa: F811
    with pytest.raises(RequestError, match="does not fold"):
        graft.adapt(tmp_path / "whole", adapters=[str(mixture[0])], fold=True)
    with pytest.raises(RequestError, match="does not fold"):
        made(tmp_path / "made", base, experts["novelist"], experts["doctor"], fold=True)


def test_an_expert_of_another_base_that_only_its_weights_tell_is_refused(tmp_path, base, experts):  # noqa: F811
    """Where nothing is known before: in memory."""
    from graft.adapters.experts import add_expert

    run(tmp_path / "tuned", base, budget="1 steps")
    model = models.load(tmp_path / "tuned" / "out")
    with pytest.raises(CheckpointError, match="made for another base"):
        add_expert(model, experts["novelist"], "novels", tmp_path / "tuned" / "out")
    with pytest.raises(RequestError, match="expected the folder of a LoRA adapter as the expert novels"):
        add_expert(model, base, "novels", base)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_mixture_on_packed_weights_learns_and_writes(tmp_path, base, bits):  # noqa: F811
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    packed = graft.quantize(tmp_path / "packed", from_=base, bits=bits)
    how = {"learning_rate": 0.05, "budget": "6 steps"}
    for name, rank in (("novelist", 2), ("doctor", 3)):
        run(tmp_path / name, packed, method={"lora": {"rank": rank}}, **how)
    places = {name: tmp_path / name / "out" for name in ("novelist", "doctor")}
    run(tmp_path / "mix", packed, experts=places, **HOW_TO_MIX)
    loaded = models.load(tmp_path / "mix" / "out")
    log = [json.loads(line) for line in (tmp_path / "mix" / "out" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < losses[0]
    how = {"max_new_tokens": 6, "do_sample": False, "attention_mask": PADDED}
    written = loaded.generate(SEVERAL, **how)
    assert torch.equal(written, loaded.generate(SEVERAL, use_cache=False, **how))


def test_a_mixture_is_scored_and_is_a_member(tmp_path, base, mixture):  # noqa: F811
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"plain text number {n}"}) + "\n" for n in range(30))
    )
    sets = {"rows": {"source": "jsonl", "path": "rows.jsonl", "splits": {"dev": 0.2}}}
    measures = [{"measure": "bits_per_byte", "on": ["rows.dev"]}]
    where = {"out": tmp_path / "results", "root": tmp_path, "device": "cpu", "data_sets": sets}
    duo = graft.ensemble(tmp_path / "duo", members=[str(mixture[0]), str(base)])
    found = graft.evaluate({"mix": mixture[0], "base": base, "duo": duo}, measures, **where)
    mix, frozen, both = (next(row["value"] for row in found if row["model"] == name) for name in ("mix", "base", "duo"))
    assert mix < frozen
    assert mix - 1e-6 <= both <= frozen + 1e-6
    model = models.load(duo)
    how = {"max_new_tokens": 6, "do_sample": False, "attention_mask": PADDED}
    assert torch.equal(model.generate(SEVERAL, **how), model.generate(SEVERAL, use_cache=False, **how))


def test_a_mixture_is_trained_further_and_below_another_adapter(tmp_path, base, mixture):  # noqa: F811
    """The classifier alone; then something on top of it."""
    before = load_file(mixture[0] / "adapter.safetensors")
    run(tmp_path / "further", mixture[0], method="further", budget="2 steps", learning_rate=0.03)
    after = load_file(tmp_path / "further" / "out" / "adapter.safetensors")
    changed = {key.partition(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"m"}
    run(tmp_path / "top", mixture[0], method={"lora": {"rank": 2}}, budget="2 steps", learning_rate=0.03)
    stack = adapters_of(models.load(tmp_path / "top" / "out"))
    assert [name for name, _ in stack.active] == ["m", "m-2"]
    top = load_file(tmp_path / "top" / "out" / "adapter.safetensors")
    assert all(torch.equal(top[key], before[key]) for key in before)


def test_tasks_with_heads_are_learned_by_a_mixture_and_stand_on_it(tmp_path, base, experts):  # noqa: F811
    pytest.importorskip("peft")
    given = {"method": {"peft": XLORA}, "batch_size": 4, "budget": "2 steps", "learning_rate": 0.02}
    work = job(tmp_path, base, {"lm": "prose", "colour": TASKS["colour"]}, **given)
    VERB.run(replace(work, models={**work.models, **experts}))
    headed = models.load(tmp_path / "out" / "heads" / "colour")
    with torch.no_grad():
        mixed = headed(LARGE).logits
        with adapters_of(headed).using(None):
            assert not torch.allclose(headed(LARGE).logits, mixed, atol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_experts_that_are_trained_along_learn_where_they_speak_in_both_readings(tmp_path, base, experts, precision):  # noqa: F811
    """Weights that were cast for the first reading are cast anew for the second."""
    pytest.importorskip("peft")
    more = {"use_trainable_adapters": True, "scaling_pass_value": 0.5}
    how = {**HOW_TO_MIX, "method": {"peft": {**XLORA, **more}}, "precision": precision, "budget": "2 steps"}
    run(tmp_path, base, experts=experts, **how)
    held = load_file(tmp_path / "out" / "adapter.safetensors")
    for name, expert in (("novels", "novelist"), ("medicine", "doctor")):
        theirs = load_file(experts[expert] / "adapter.safetensors")
        assert not any(torch.equal(held[f"{name}.{key.partition('.')[2]}"], value) for key, value in theirs.items())
    half = models.load(tmp_path / "out", dtype=torch.bfloat16)
    written = half.generate(SEVERAL, max_new_tokens=4, do_sample=False)
    assert torch.equal(written, half.generate(SEVERAL, max_new_tokens=4, do_sample=False, use_cache=False))


@pytest.mark.parametrize("method", ["further", "lora"])
def test_what_a_mixture_cannot_do_is_refused_of_models_that_have_one_too(monkeypatch, mixture, method):
    known, there = {"mix": facts_of(mixture[0])}, {"from": "mix", "data": "d", "method": method}
    assert VERB.check(VERB.parse(there), known) == []
    assert "`compile` does not follow it" in " ".join(VERB.check(VERB.parse(there | {"compile": True}), known))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    settings = VERB.parse(there | {"parallel": {"method": "zero", "stage": 3}})
    monkeypatch.undo()
    assert "use `parallel: fsdp`, or stage 1 or 2" in " ".join(VERB.check(settings, known))
