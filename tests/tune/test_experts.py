"""LoRA on fused experts, tuned end to end: what learns, what stays, what is planned, what is refused before work."""

import json

import pytest
import torch
from safetensors.torch import load_file

import graft
from graft import data, models
from graft.adapters import adapters_of
from graft.adapters.packed import is_packed
from graft.adapters.stack import adopt
from graft.adapters.table import counted
from graft.adapters.trial import skeleton
from graft.checkpoint import TensorReader
from graft.data.tokenizers import train_tokenizer
from graft.errors import RequestError, SettingsError
from graft.facts import facts_of
from graft.methods import method
from graft.pretrain.architectures import Shape, build, config_for
from graft.tune import VERB, named_points

from .test_full import goes_on_with_the_same_bytes, run

SHAPE = {
    "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
ON = {"lora": {"rank": 3, "on": ["experts"]}}


@torch.no_grad()
def mixed(folder, kind="mixtral"):
    """A small mixture of experts with a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = data.parse({"source": "python-library", "packages": ["json"], "splits": {"dev": 0, "test": 0}})
    tokenizer = train_tokenizer(data.open_corpus({"c": raw}, "c", folder), "bpe", 400)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    more = {"head_dim": 8, "attn_implementation": "eager"} if kind == "gpt_oss" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **ids, **more))
    for path, parameter in model.named_parameters():
        if parameter.dim() > 1 or path.endswith(("bias", "sinks")):
            parameter.normal_(0, 0.1)
    models.save(model, tokenizer, folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return mixed(tmp_path_factory.mktemp("mixtral"))


def named(settings):
    ((how, options),) = settings.method.items()
    chosen = method("graft.tune", how)
    return chosen.points(chosen.Settings(**options))


def losses(folder):
    log = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in log if "loss" in row]


def frozen(model):
    return {name: value for name, value in model.state_dict().items() if not name.startswith("graft_adapters.")}


def test_experts_learn_and_the_frozen_model_stays_to_the_bit(tmp_path, base):
    found = run(tmp_path, base, method=ON, budget="8 steps", learning_rate=0.03)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.3
    # 2 layers of 4 experts: 32 → 48 and 24 → 32
    assert found["trained_parameters"] == 2 * 4 * 3 * (32 + 48 + 24 + 32)
    before, after = (frozen(models.load(place)) for place in (base, tmp_path / "out"))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    held = load_file(tmp_path / "out" / "adapter.safetensors")
    assert all(value.abs().max() > 0 for name, value in held.items() if name.endswith("up"))
    folded = graft.adapt(tmp_path / "whole", adapters=[str(tmp_path / "out")], fold=True)
    ids = torch.arange(3, 40)[None]
    assert torch.allclose(models.load(folded)(ids).logits, models.load(tmp_path / "out")(ids).logits, atol=2e-5)
    with TensorReader(folded) as written, TensorReader(base) as plain:
        assert written.names == plain.names


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_checkpointing_changes_nothing_however_experts_are_computed(base, how):
    """The forward pass runs again in the backward one, and stops where it has all it needs."""
    gradients = []
    for again in (False, True):
        model = models.load(base).train()
        model.set_experts_implementation(how)
        stack = adopt(model, named_points_on_experts())
        torch.manual_seed(1)
        for parameter in stack.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        if again:
            model.gradient_checkpointing_enable()
        model(torch.arange(3, 40)[None]).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in stack.parameters()])
        held = {name for module in model.modules() for name in vars(module)}
        assert not held & {"gate_up_proj", "down_proj"}
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def named_points_on_experts():
    (point,) = named_points()["lora"]
    return [point.model_copy(update={"on": ["experts"], "size": 3})]


def test_a_call_that_breaks_off_leaves_the_frozen_weights_to_be_seen(base):
    model = models.load(base)
    adopt(model, named_points_on_experts())
    experts = model.model.layers[1].mlp.experts
    experts.act_fn, kept = None, experts.act_fn
    with pytest.raises(TypeError):
        model(torch.arange(3, 40)[None])
    assert type(experts.down_proj) is torch.nn.Parameter
    experts.act_fn = kept
    assert model(torch.arange(3, 40)[None]).logits.isfinite().all()


def test_dropout_thins_out_what_the_change_reads(tmp_path, base):
    often = {**ON["lora"], "dropout": 0.4}
    run(tmp_path / "plain", base, method=ON, learning_rate=0.03)
    run(tmp_path / "drop", base, method={"lora": often}, learning_rate=0.03)
    assert losses(tmp_path / "plain")[0] == losses(tmp_path / "drop")[0]
    assert losses(tmp_path / "plain")[-1] != losses(tmp_path / "drop")[-1]
    model = models.load(tmp_path / "drop" / "out")
    ids = torch.arange(3, 40)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_a_killed_training_ends_with_the_same_bytes(tmp_path, base, monkeypatch):
    how = {"method": {"lora": {**ON["lora"], "dropout": 0.1}}, "budget": "6 steps", "checkpoint_every": "1 step"}
    goes_on_with_the_same_bytes(tmp_path, base, monkeypatch, how)


def test_half_precision_computes_the_change_in_the_type_of_its_weights(tmp_path, base):
    run(tmp_path, base, method=ON, precision="bf16", budget="6 steps", learning_rate=0.03)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    half = models.load(tmp_path / "out", dtype=torch.bfloat16)
    ids = torch.arange(3, 40)[None]
    expected, without = (models.load(place)(ids).logits for place in (tmp_path / "out", base))
    assert (expected - without).abs().median() > 0.1
    # a router may choose another expert for some tokens
    assert (half(ids).logits.float() - expected).abs().median() < 0.02
    for sites in adapters_of(half).sites.values():
        sites.float()
    assert (half(ids).logits.float() - expected).abs().median() < 0.02


def test_on_a_packed_model_experts_stay_whole_and_learn(tmp_path, base):
    pytest.importorskip("bitsandbytes")
    from graft.quantize import VERB as QUANTIZE

    packed = graft.quantize(tmp_path / "packed", from_=base, bits=4)
    # the experts are most of it
    said = QUANTIZE.facts(QUANTIZE.parse({"from": "base", "bits": 4}), {"base": facts_of(base)}, "").bytes
    assert 0.8 < said / facts_of(packed).bytes < 1.2
    run(tmp_path, packed, method={"lora": {"rank": 3, "on": ["linears", "experts"]}}, learning_rate=0.03)
    model = models.load(tmp_path / "out")
    experts = model.model.layers[0].mlp.experts
    assert any(map(is_packed, model.modules()))
    assert experts.down_proj.is_floating_point()
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_a_plan_counts_what_a_training_has(tmp_path, base):
    facts = {"base": facts_of(base)}
    settings = VERB.parse(
        {"from": "base", "data": "rows", "method": {"lora": {"rank": 3, "on": ["linears", "experts"]}}}
    )
    assert VERB.check(settings, facts) == []
    expected = VERB._trained(settings, facts["base"])
    assert run(tmp_path, base, method=settings.method)["trained_parameters"] == expected
    shown = counted(skeleton(facts["base"].config), named(settings))
    assert shown.startswith(f"{expected:,} (")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"compile": True}, "`compile` does not follow adapters on fused experts, found them at model.layers.0.mlp"),
        ({"parallel": {"method": "zero", "stage": 3}}, "use `parallel: fsdp`, or stage 1 or 2"),
        ({"method": {"lora": {"rank": 30, "on": ["experts"]}}}, "expected a rank of at most 24"),
        ({"method": {"point": {"form": "bottleneck", "size": 2, "on": ["*.experts.*"]}}}, "found form bottleneck"),
    ],
)
def test_what_cannot_be_is_refused_before_work(monkeypatch, base, given, words):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    settings = VERB.parse({"from": "base", "data": "rows", "method": ON, **given})
    monkeypatch.undo()
    (found,) = VERB.check(settings, {"base": facts_of(base)})
    assert words in found


def test_models_without_fused_experts_say_so(tmp_path):
    model = build(config_for("decoder", "rotary", Shape(32, 2, 2, 400, 64, 0.0, {"bos": 1, "eos": 2, "pad": 0})))
    with pytest.raises(RequestError, match="expected experts that lie in one parameter, found none; linear layers"):
        adopt(model, named_points_on_experts())
    with pytest.raises(SettingsError, match="fused experts take plain LoRA, found pissa"):
        VERB.parse({"from": "base", "data": "rows", "method": {"lora": {"on": ["experts_up"], "pissa": True}}})


def test_rows_cannot_each_have_their_own_and_changes_are_not_fused(base):
    model = models.load(base)
    stack = adopt(model, named_points_on_experts(), "one")
    adopt(model, named_points_on_experts(), "two")
    with (
        pytest.raises(
            RequestError,
            match=r"one changes model\.layers\.0\.mlp\.experts, fused experts, which read tokens of all rows",
        ),
        stack.each_row(["one", None]),
    ):
        pass
    fusion = named_points_on_experts()[0].model_copy(
        update={"form": "fusion", "on": ["adapters"], "of": ["one", "two"]}
    )
    with pytest.raises(RequestError, match="cannot be fused"):
        adopt(model, [fusion], "fused")


@pytest.mark.parametrize(
    ("on", "words"),
    [
        ("experts", "m, linear on experts, changes each of several experts"),
        ("*.gate_up_proj", "m changes model.layers.0"),
    ],
)
def test_a_merge_wants_them_folded(tmp_path, base, on, words):
    run(tmp_path, base, method={"lora": {"rank": 2, "on": [on]}}, budget="1 step")
    with pytest.raises(graft.errors.GraftError, match=f"{words}.*fold it first"):
        graft.merge(tmp_path / "merged", method="linear", models=[str(tmp_path / "out"), str(base)])
