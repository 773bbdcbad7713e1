"""Types of peft that graft has no point for: inside the model, and prompts before the text; trained, saved, scored."""

import json

import pytest
import torch
from safetensors.torch import load_file

import graft
from graft import models
from graft.adapters import adapters_of, foreign
from graft.errors import RequestError
from graft.facts import facts_of
from graft.tune import VERB

from .test_full import base, goes_on_with_the_same_bytes, run  # noqa: F401  (a fixture)


def test_any_type_of_peft_is_tuned_saved_loaded_and_folded(tmp_path, base):  # noqa: F811
    pytest.importorskip("peft")
    how = {"peft": {"peft_type": "LOHA", "r": 2, "target_modules": "all-linear"}}
    ids = torch.arange(3, 30)[None]
    found = run(tmp_path / "a", base, method=how, learning_rate=0.03, budget="8 steps")
    assert found["trained_parameters"] > 0
    loaded = models.load(tmp_path / "a" / "out")
    assert type(loaded).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        changed = loaded(ids).logits
        assert not torch.allclose(changed, models.load(base)(ids).logits, atol=1e-4)
    loaded.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(models.load(tmp_path / "again")(ids).logits, changed)
    run(tmp_path / "b", base, method=how, learning_rate=0.03, budget="8 steps", fold=True)
    with torch.no_grad():
        assert torch.allclose(models.load(tmp_path / "b" / "out")(ids).logits, changed, atol=1e-5)


def test_an_adapter_of_a_type_of_peft_is_folded_and_exported_by_itself_alone(tmp_path, base):  # noqa: F811
    peft = pytest.importorskip("peft")
    how = {"peft": {"peft_type": "LOHA", "r": 2, "target_modules": "all-linear"}}
    run(tmp_path / "a", base, method=how, learning_rate=0.03, budget="4 steps")
    low, ids = tmp_path / "a" / "out", torch.arange(3, 30)[None]
    with torch.no_grad():
        expected = models.load(low)(ids).logits
        whole = graft.adapt(tmp_path / "whole", adapters=[str(low)], fold=True)
        assert torch.allclose(models.load(whole)(ids).logits, expected, atol=1e-5)
        written = graft.adapt(tmp_path / "written", adapters=[str(low)], export="peft")
        assert torch.equal(models.load(written)(ids).logits, expected)
        theirs = peft.PeftModel.from_pretrained(models.load(base), written / "peft").eval()
        assert torch.equal(theirs(ids).logits, expected)
    run(tmp_path / "b", base, budget="2 steps", method="lora")
    for adapters in ([str(low), str(tmp_path / "b" / "out")], {str(low): 0.5}):
        with pytest.raises(RequestError, match="one of peft's own types, which stands alone and whole: fold it"):
            graft.adapt(tmp_path / "both", adapters=adapters)


def test_what_peft_cannot_do_here_is_refused(tmp_path, base):  # noqa: F811
    pytest.importorskip("peft")
    for config, words in (
        ({"peft_type": "LOHAA"}, r"did you mean 'LOHA'\?"),
        ({"peft_type": "LOHA", "rank": 3}, "LOHA has no setting 'rank'"),
        ({"peft_type": "LOHA", "task_type": "X"}, "does not take these settings.*task type"),
        ({"peft_type": "ADALORA", "total_step": 4, "tinit": 2, "tfinal": 2}, r"expected tinit \+ tfinal < total_step"),
        ({"peft_type": "ADALORA", "init_r": 4, "target_r": 4}, "expected a `target_r` below `init_r`, found 4 and 4"),
        ({"peft_type": "LOHA", "r": 2, "target_modules": ["nowhere"]}, "peft: Target modules"),
    ):
        with pytest.raises(RequestError, match=words):
            run(tmp_path, base, method={"peft": config})


PROMPTS = {
    "p_tuning": {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "p_tuning_lstm": {
        "peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 8,
        "encoder_reparameterization_type": "LSTM",
    },
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
    "projected": {
        "peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 16,
    },
    "several": {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 3, "num_tasks": 1},
    "context": {"peft_type": "CPT", "cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
}  # fmt: skip


@pytest.mark.parametrize("config", list(PROMPTS.values()), ids=list(PROMPTS))
def test_prompts_of_peft_are_trained_saved_loaded_and_scored(tmp_path, base, config):  # noqa: F811
    pytest.importorskip("peft")
    found = run(tmp_path, base, method={"peft": config}, budget="12 steps", learning_rate=0.03)
    assert found["trained_parameters"] > 0
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < losses[0]
    loaded = models.load(tmp_path / "out")
    (point,) = adapters_of(loaded).points["m"]
    assert point.form == ("softmax" if "PREFIX" in config["peft_type"] else "tokens")
    sets = {"rows": {"source": "jsonl", "path": "rows.jsonl", "splits": {"dev": 0.2}}}
    measures = [{"measure": "bits_per_byte", "on": ["rows.dev"]}]
    where = {"out": tmp_path / "results", "root": tmp_path, "device": "cpu"}
    (score, *_) = graft.evaluate({"low": tmp_path / "out"}, measures, data_sets=sets, **where)
    assert score["value"] > 0
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert not torch.allclose(loaded(ids).logits, models.load(base)(ids).logits, atol=1e-4)
    with pytest.raises(RequestError, match="learned keys or tokens, which are no weights of the model"):
        run(tmp_path / "fold", base, method={"peft": config}, fold=True)


def test_a_killed_training_of_p_tuning_goes_on_with_the_same_bytes(tmp_path, base, monkeypatch):  # noqa: F811
    pytest.importorskip("peft")
    how = {"method": {"peft": PROMPTS["p_tuning"]}, "budget": "5 steps", "checkpoint_every": "1 steps"}
    goes_on_with_the_same_bytes(tmp_path, base, monkeypatch, how)


LINEARS = {"target_modules": "all-linear"}
INSIDE = {
    "LOKR": {"r": 2, **LINEARS},
    "OFT": {"r": 0, "oft_block_size": 4, **LINEARS},
    "BOFT": {"boft_block_size": 4, **LINEARS},
    "VERA": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "HRA": {"r": 2, **LINEARS},
    "FOURIERFT": {"n_frequency": 8, **LINEARS},
    "C3A": {"block_size": 8, **LINEARS},
    "MISS": {"r": 2, **LINEARS},
    "LORA": {"r": 2, **LINEARS},
    "POLY": {"r": 2, "n_skills": 2, **LINEARS},
    "IA3": {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
    "RANDLORA": {"r": 2, **LINEARS},
    "TRAINABLE_TOKENS": {"token_indices": [3, 5]},
    "SHIRA": {"r": 2, **LINEARS},
}
"""Types that work inside the model, with settings that suit a tiny one."""


@pytest.mark.parametrize("kind", list(INSIDE))
def test_types_of_peft_inside_the_model_are_trained_saved_loaded_and_folded_or_say_why_not(tmp_path, base, kind):  # noqa: F811
    peft = pytest.importorskip("peft")
    if kind not in {str(getattr(name, "value", name)) for name in peft.PEFT_TYPE_TO_CONFIG_MAPPING}:
        pytest.skip(f"the peft that is installed has no {kind}")
    how, ids = {"peft": {"peft_type": kind, **INSIDE[kind]}}, torch.arange(3, 30)[None]
    fresh = run(tmp_path / "apart", base, method=how, learning_rate=0.03, budget="6 steps")
    with torch.no_grad():
        changed = models.load(tmp_path / "apart" / "out")(ids).logits
        assert not torch.allclose(changed, models.load(base)(ids).logits, atol=1e-5)
    again = run(tmp_path / "more", tmp_path / "apart" / "out", method="further", learning_rate=0.03, budget="2 steps")
    assert again["trained_parameters"] == fresh["trained_parameters"]
    with torch.no_grad():
        assert not torch.allclose(models.load(tmp_path / "more" / "out")(ids).logits, changed, atol=1e-6)
    try:
        run(tmp_path / "whole", base, method=how, learning_rate=0.03, budget="6 steps", fold=True)
    except RequestError as error:
        assert "does not fold" in str(error)
        return
    with torch.no_grad():
        assert torch.allclose(models.load(tmp_path / "whole" / "out")(ids).logits, changed, atol=1e-4)


def test_what_is_wrong_with_settings_of_peft_is_said_before_anything_runs(base):  # noqa: F811
    pytest.importorskip("peft")
    start = facts_of(base)

    def problems(**config):
        return VERB.check(VERB.parse({"from": "base", "data": "d", "method": {"peft": config}}), {"base": start})

    assert problems(peft_type="LOHA", r=2, target_modules="all-linear") == []
    assert "peft: Target modules" in problems(peft_type="LOHA", r=2, target_modules=["nowhere"])[0]
    assert "did you mean 'LOHA'?" in problems(peft_type="LOHAA")[0]
    assert "found none; there are: ADALORA" in problems(r=2)[0]
    assert "no setting 'target_module' (did you mean" in problems(peft_type="LOHA", target_module=["q_proj"])[0]
    # a start from the weights' values cannot be tried on a skeleton, which says nothing against it
    assert problems(peft_type="SHIRA", r=2, **LINEARS) == []
    loha = {"peft": {"peft_type": "LOHA", "r": 2, "target_modules": "all-linear"}}
    settings = VERB.parse({"from": "base", "data": "d", "method": loha})
    whole = VERB.parse({"from": "base", "data": "d"})
    needed, all_of_it = (VERB.estimate(each, {"base": start}).memory_bytes for each in (settings, whole))
    assert needed < all_of_it


ADALORA = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "target_modules": "all-linear", "tinit": 1, "tfinal": 2}


def ranks_in(folder):
    return [len(value) for name, value in load_file(folder / "adapter.safetensors").items() if name.endswith("lora_E")]


def test_adalora_loses_ranks_down_to_its_budget_and_is_saved_loaded_folded_and_exported(tmp_path, base):  # noqa: F811
    peft = pytest.importorskip("peft")
    how, ids = {"peft": ADALORA}, torch.arange(3, 30)[None]
    run(tmp_path / "a", base, method=how, learning_rate=0.03, budget="12 steps")
    log = [json.loads(line) for line in (tmp_path / "a" / "out" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < losses[0]
    ranks = ranks_in(tmp_path / "a" / "out")
    assert (len(ranks), sum(ranks)) == (14, 2 * 14)
    assert max(ranks) <= 4
    loaded = models.load(tmp_path / "a" / "out")
    with torch.no_grad():
        changed = loaded(ids).logits
        assert not torch.allclose(changed, models.load(base)(ids).logits, atol=1e-4)
        loaded.save_pretrained(tmp_path / "again")
        assert ranks_in(tmp_path / "again") == ranks
        assert torch.equal(models.load(tmp_path / "again")(ids).logits, changed)
        written = graft.adapt(tmp_path / "written", adapters=[str(tmp_path / "a" / "out")], export="peft")
        theirs = peft.PeftModel.from_pretrained(models.load(base), written / "peft").eval()
        assert torch.equal(theirs(ids).logits, changed)
    run(tmp_path / "b", base, method=how, learning_rate=0.03, budget="12 steps", fold=True)
    with torch.no_grad():
        assert torch.allclose(models.load(tmp_path / "b" / "out")(ids).logits, changed, atol=1e-5)


def test_what_adalora_left_is_not_trained_further(tmp_path, base):  # noqa: F811
    pytest.importorskip("peft")
    run(tmp_path / "a", base, method={"peft": ADALORA}, budget="12 steps")
    with pytest.raises(RequestError, match="ADALORA has given its ranks away"):
        run(tmp_path / "b", tmp_path / "a" / "out", method="further")


def test_adalora_takes_the_steps_of_the_training_where_none_are_given(tmp_path, base):  # noqa: F811
    pytest.importorskip("peft")
    run(tmp_path / "own", base, method={"peft": ADALORA}, budget="6 steps")
    run(tmp_path / "said", base, method={"peft": {**ADALORA, "total_step": 6}}, budget="6 steps")
    own, said = (load_file(tmp_path / name / "out" / "adapter.safetensors") for name in ("own", "said"))
    assert all(torch.equal(own[name], said[name]) for name in said)
    assert facts_of(tmp_path / "own" / "out").config["graft_adapted"]["peft"]["total_step"] == 6
    run(tmp_path / "longer", base, method={"peft": {**ADALORA, "total_step": 60}}, budget="6 steps")
    assert sum(ranks_in(tmp_path / "longer" / "out")) > 2 * 14  # it ended before its ranks were gone
    with pytest.raises(RequestError, match="found a training with tinit 1, tfinal 2 and 3 steps"):
        run(tmp_path / "short", base, method={"peft": ADALORA}, budget="3 steps")


@pytest.mark.parametrize("tfinal", [0, 6])
def test_a_killed_training_of_adalora_goes_on_with_the_same_bytes(tmp_path, base, monkeypatch, tfinal):  # noqa: F811
    """Killed while ranks go, and when they are settled."""
    pytest.importorskip("peft")
    how = {"peft": {**ADALORA, "tinit": 0, "tfinal": tfinal}}
    goes_on_with_the_same_bytes(
        tmp_path,
        base,
        monkeypatch,
        {"method": how, "learning_rate": 0.03, "budget": "8 steps", "checkpoint_every": "1 steps"},
    )


def test_adalora_keeps_its_factors_orthogonal_as_peft_does(base):  # noqa: F811
    pytest.importorskip("peft")
    wrapped = foreign.wrap(models.load(base, dtype=torch.float32), {**ADALORA, "orth_reg_weight": 0.3}, None)
    wrapper, ids = wrapped.__dict__[foreign.HOLDER][0], torch.arange(3, 30)[None]
    plain = wrapper.base_model.model(ids, labels=ids).loss
    theirs = wrapper.base_model(ids, labels=ids).loss - plain
    assert torch.allclose(wrapped.graft_ranks.penalty(), theirs, rtol=1e-4)


def test_adalora_is_not_spread_over_processes(base):  # noqa: F811
    pytest.importorskip("peft")
    settings = VERB.parse({"from": "base", "data": "d", "method": {"peft": ADALORA}, "parallel": "fsdp"})
    (problem,) = VERB.check(settings, {"base": facts_of(base)})
    assert "use `parallel: ddp`" in problem
