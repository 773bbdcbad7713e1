"""Adapters are tuned end to end: on every format, frozen weights to the bit, resumed exactly, folded or small."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import graft
from graft import models
from graft.adapters import adapters_of
from graft.checkpoint import TensorReader
from graft.cli import app
from graft.errors import RequestError, SettingsError
from graft.facts import facts_of
from graft.pretrain.architectures import Shape, build, config_for
from graft.tune import VERB, counted
from graft.verb import Facts

from .test_full import ROWS, base, goes_on_with_the_same_bytes, run, tokenizer_and_ids  # noqa: F401  (a fixture)

LORA = {"lora": {"rank": 2}}
KINDS = {
    "lora": LORA,
    "pissa": {"lora": {"rank": 2, "pissa": True, "dora": True}},
    "houlsby": {"houlsby": {"width": 4}},
    "prefix": {"prefix": {"length": 3}},
    "prompt": {"prompt": {"length": 3, "gate": False}},
    "ia3": "ia3",
    "mix_and_match": {"mix_and_match": {"width": 4, "length": 3}},
    "point": {"point": {"form": "bottleneck", "on": ["attention"], "size": 3, "composition": "gated"}},
}


def bytes_of(folder):
    with TensorReader(folder) as reader:
        return {name: reader.read(name) for name in reader.names}


def plain_weights(model):
    return {name: value for name, value in model.state_dict().items() if not name.startswith("graft_adapters.")}


@pytest.mark.parametrize("method", list(KINDS.values()), ids=list(KINDS))
def test_an_adapter_learns_and_the_frozen_model_stays_to_the_bit(tmp_path, base, method):  # noqa: F811
    found = run(tmp_path, base, method=method, budget="12 steps", learning_rate=0.03)
    loaded = models.load(tmp_path / "out")
    frozen = bytes_of(base)
    assert all(torch.equal(value, frozen[name]) for name, value in plain_weights(loaded).items() if name in frozen)
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < losses[0]
    assert 0 < found["trained_parameters"] < found["parameters"] / 2
    assert not list((tmp_path / "out").glob("model*.safetensors"))


def test_frozen_parts_hold_no_gradients_and_no_optimizer_state(tmp_path, base):  # noqa: F811
    run(tmp_path, base, method=LORA, checkpoint_every="2 steps")
    (state, *_) = sorted((tmp_path / "scratch").glob("state-*.safetensors"), reverse=True)
    from safetensors import safe_open

    with safe_open(state, framework="pt") as opened:
        names = [name for name in opened.keys() if not name.startswith("buffer.")]  # noqa: SIM118
        held = sum(opened.get_tensor(name).numel() for name in names if "step" not in name)
    trained = run(tmp_path / "again", base, method=LORA)["trained_parameters"]
    assert held == 3 * trained  # the weights and two moments
    assert all(name.startswith(("model.graft_adapters", "optimizer.")) for name in names)


@pytest.mark.parametrize("format", list(ROWS))
def test_every_format_is_tuned_on(tmp_path, base, format):  # noqa: F811
    assert run(tmp_path, base, format, method=LORA)["dev_loss"] > 0


@pytest.mark.parametrize(
    ("architecture", "positions", "method"),
    [
        ("encoder", "learned", "bitfit"),
        ("encoder", "rotary", {"prompt": {"length": 3}}),
        ("encoder-decoder", "relative", {"mix_and_match": {"width": 4, "length": 3}}),
        ("encoder-decoder", "learned", LORA),
    ],
)
def test_encoders_and_encoder_decoders_too(tmp_path, architecture, positions, method):
    tokenizer, ids = tokenizer_and_ids(tmp_path, size=500, sentinels=True)
    shape = Shape(32, 1, 2, len(tokenizer), 64, 0.0, ids)
    models.save(build(config_for(architecture, positions, shape)), tokenizer, tmp_path / "start")
    for format in ("text", "labelled" if architecture == "encoder" else "pairs"):
        assert run(tmp_path / format, tmp_path / "start", format, method=method)["dev_loss"] > 0
        assert adapters_of(models.load(tmp_path / format / "out")) is not None


def test_learned_positions_leave_room_for_learned_tokens(tmp_path, base):  # noqa: F811
    tokenizer, ids = tokenizer_and_ids(tmp_path)
    models.save(
        build(config_for("decoder", "learned", Shape(32, 1, 2, len(tokenizer), 32, 0.0, ids))),
        tokenizer,
        tmp_path / "s",
    )
    assert run(tmp_path / "t", tmp_path / "s", method={"prompt": {"length": 5, "gate": False}})["dev_loss"] > 0


def test_a_killed_training_of_an_adapter_goes_on_with_the_same_bytes(tmp_path, base, monkeypatch):  # noqa: F811
    how = {"method": {"lora": {"rank": 2, "dropout": 0.2}}, "budget": "6 steps", "checkpoint_every": "1 steps"}
    goes_on_with_the_same_bytes(tmp_path, base, monkeypatch, how)


def test_up_rate_moves_what_starts_at_zero_faster(tmp_path, base):  # noqa: F811
    sizes = []
    for rate in (1, 16):
        out = tmp_path / str(rate)
        run(out, base, method={"lora": {"rank": 2, "up_rate": rate}}, budget="1 steps", learning_rate=1e-4, clip=None)
        (site, *_) = adapters_of(models.load(out / "out")).sites["m"].values()
        sizes.append(float(site.up.abs().mean()))
    assert sizes[1] == pytest.approx(16 * sizes[0], rel=0.02)


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_gates_open_at_a_rate_of_their_own(tmp_path, base, name):  # noqa: F811
    opened, keys = [], []
    for rate in (1, 20):
        out = tmp_path / str(rate)
        how = {name: {"length": 3, "gate_rate": rate}}
        run(out, base, method=how, budget="1 steps", learning_rate=1e-4, clip=None)
        (site, *_) = adapters_of(models.load(out / "out")).sites["m"].values()
        opened.append(float((site.gate if name == "prefix" else site.gates[0]).abs().mean()))
        keys.append(site.keys if name == "prefix" else site.embeddings)
    assert opened[1] == pytest.approx(20 * opened[0], rel=0.02)
    torch.testing.assert_close(*keys)  # behind a gate of zero nothing else has learned yet


def test_a_rate_without_a_gate_is_refused():
    with pytest.raises(SettingsError, match=r"expected gate_rate with `gate: true`, found 3 without a gate"):
        VERB.parse({"from": "base", "data": "d", "method": {"prefix": {"gate": False, "gate_rate": 3}}})
    plain = {"form": "linear", "on": ["query"], "size": 2, "gate_rate": 3}
    with pytest.raises(SettingsError, match=r"expected gate_rate beside a gate, found it with form 'linear'"):
        VERB.parse({"from": "base", "data": "d", "method": {"point": plain}})


def test_kept_checkpoints_and_the_average_are_adapters_too(tmp_path, base):  # noqa: F811
    run(tmp_path, base, method=LORA, ema=0.9, keep={"last": 1}, evaluate_every=2)
    for name in ("step-4", "ema"):
        assert adapters_of(models.load(tmp_path / "out" / "checkpoints" / name)) is not None


def test_folding_gives_the_same_model_whole(tmp_path, base):  # noqa: F811
    run(tmp_path / "apart", base, method=LORA, learning_rate=0.03)
    run(tmp_path / "whole", base, method=LORA, learning_rate=0.03, fold=True)
    apart, whole = (models.load(tmp_path / name / "out") for name in ("apart", "whole"))
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.allclose(apart(ids).logits, whole(ids).logits, atol=1e-5)
    assert adapters_of(whole) is None
    assert bytes_of(tmp_path / "whole" / "out").keys() == bytes_of(base).keys()


def test_an_adapter_is_trained_further_and_another_is_put_on_top(tmp_path, base):  # noqa: F811
    for kind in ("prefix", "lora"):
        first = tmp_path / kind
        run(first, base, method=KINDS[kind])
        run(first / "more", first / "out", method="further")
        model = models.load(first / "more" / "out")
        assert list(adapters_of(model).points) == ["m"]
        before, after = (path / "out" / "adapter.safetensors" for path in (first, first / "more"))
        assert before.read_bytes() != after.read_bytes()
        run(first / "top", first / "out", method=LORA)
        assert list(adapters_of(models.load(first / "top" / "out")).points) == ["m", "m-2"]


def test_what_is_trained_on_adapters_that_are_there_is_counted_before(tmp_path, base):  # noqa: F811
    for name in "ab":
        run(tmp_path / name, base, method=LORA, budget="1 steps")
    both = graft.adapt(tmp_path / "both", adapters=[str(tmp_path / name / "out") for name in "ab"])
    config = json.dumps(dict(facts_of(both).config), sort_keys=True, default=str)
    for how in ("further", "fusion", "mixture"):
        settings = VERB.parse({"from": "base", "data": "d", "method": how})
        found = run(tmp_path / how, both, method=how, budget="1 steps")
        assert counted(json.dumps(settings.method, sort_keys=True), config) == found["trained_parameters"]
        assert VERB.estimate(settings, {"base": facts_of(both)}).memory_bytes > 0


def test_what_cannot_work_is_refused_before_training(tmp_path, base):  # noqa: F811
    with pytest.raises(RequestError, match="'nowhere', found none"):
        run(tmp_path / "a", base, method={"lora": {"on": ["nowhere"]}})
    with pytest.raises(RequestError, match=r"expected adapters that fold.*bottleneck.*`fold: false`"):
        run(tmp_path / "b", base, method="houlsby", fold=True)
    with pytest.raises(SettingsError, match="expected an adapter to fold"):
        VERB.parse({"from": "a", "data": "b", "fold": True})
    with pytest.raises(SettingsError, match="expected layers such as 0:6"):
        VERB.parse({"from": "a", "data": "b", "method": {"lora": {"layers": "all"}}})


def facts(folder):
    return facts_of(folder)


def test_the_check_tries_the_points_on_a_skeleton(base):  # noqa: F811
    start = facts(base)

    def problems(**raw):
        return VERB.check(VERB.parse({"from": "base", "data": "d", **raw}), {"base": start})

    assert problems(method=LORA) == problems(method="mix_and_match") == []
    assert "expected a rank of at most 32" in problems(method={"lora": {"rank": 33}})[0]
    assert "expected layers with biases, found none" in problems(method="bitfit")[0]
    assert "does not fold" in problems(method="pfeiffer", fold=True)[0]
    assert "no adapters for the method further" in problems(method="further")[0]


def test_the_plan_of_an_adapter_that_lies_apart_counts_what_is_written(tmp_path, base):  # noqa: F811
    made, start = run(tmp_path, base, method=LORA, budget="1 steps"), facts(base)

    def planned(**raw):
        return VERB.estimate(VERB.parse({"from": "base", "data": "d", "method": LORA, **raw}), {"base": start})

    written = load_file(tmp_path / "out" / "adapter.safetensors")
    assert planned().parameters == made["parameters"] == start.parameters + made["trained_parameters"]
    assert planned().disk_bytes == sum(4 * value.numel() for value in written.values())
    whole = planned(fold=True)
    assert (whole.parameters, whole.disk_bytes) == (start.parameters, 4 * start.parameters)


def test_adapted_models_are_no_whole_weights():
    start = Facts("decoder", "i", "v", 10, 40, {"model_type": "llama"})
    apart = VERB.facts(VERB.parse({"from": "a", "data": "b", "method": "lora"}), {"a": start}, "key")
    assert (apart.mergeable, apart.initialisation, apart.config["model_type"]) == (False, "i", "graft_adapted")
    assert "full tuning needs whole weights" in VERB.check(VERB.parse({"from": "a", "data": "b"}), {"a": apart})[0]
    folded = VERB.facts(VERB.parse({"from": "a", "data": "b", "method": "lora", "fold": True}), {"a": apart}, "key")
    assert folded == start


RECIPE = """
family: small
data:
  code: {source: python-library, keep: code, packages: [json, email, http], splits: {dev: 0.2, test: 0.2}}
models:
  base: {load: ./base}
  low: {tune: {from: base, data: code, method: {lora: {rank: 2}}, budget: 2 steps, batch_size: 4}}
  wide: {tune: {from: base, data: code, method: {pfeiffer: {width: 4}}, budget: 2 steps, batch_size: 4}}
  both: {adapt: {adapters: {low: 0.5, wide: 1.0}}}
  whole: {adapt: {adapters: [low], fold: true}}
  soup: {merge: {models: [base, whole]}}
  duo: {ensemble: {members: [low, wide]}}
evaluate:
  - {measure: bits_per_byte, on: [code.test], limit: 4}
"""


def test_a_recipe_with_adapters_runs_measures_and_is_cached(tmp_path, base, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "family.yaml").write_text(RECIPE)
    done = CliRunner().invoke(app, ["run", "family.yaml", "--json"])
    assert done.exit_code == 0, done.output
    made = tmp_path / "runs" / "small" / "models"
    rows = [json.loads(line) for line in (tmp_path / "runs" / "small" / "results.jsonl").read_text().splitlines()]
    assert {row["model"] for row in rows if "model" in row} == {"base", "low", "wide", "both", "whole", "soup", "duo"}
    assert list(adapters_of(graft.load(made / "both")).points) == ["low", "wide"]
    again = graft.run("family.yaml")
    assert again.made == []
    assert graft.chat(made / "low", "def ", max_tokens=2) is not None
    damaged = made / "low" / "adapter.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\x00\x01\x02\x03")
    os.utime(damaged)
    assert any("low" in line for line in graft.plan("family.yaml").damaged)


def test_a_merge_of_adapters_says_how_it_would_work(tmp_path, base, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "f.yaml").write_text(RECIPE.replace("[base, whole]", "[base, low]"))
    assert CliRunner().invoke(app, ["plan", "f.yaml"]).exit_code == 0
    for name in ("wide", "both"):
        (tmp_path / "f.yaml").write_text(RECIPE.replace("[base, whole]", f"[base, {name}]"))
        done = CliRunner().invoke(app, ["plan", "f.yaml"])
        assert done.exit_code == 2
        assert "is no change of weights: put adapters together on their model" in " ".join(done.output.split())


def test_the_command_and_the_function_tune_an_adapter(tmp_path, base, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["text"]))
    words = ["tune", "low", "--from", str(base), "--data", "rows.jsonl", "--method", "lora"]
    words += ["--set", "method.lora.rank=3", "--budget", "2 steps", "--batch-size", "4"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert adapters_of(graft.load("low")).points["low"][0].size == 3
    how = {"from_": base, "data": "rows.jsonl", "budget": "2 steps", "batch_size": 4}
    graft.tune("ia3", method="ia3", **how)
    assert CliRunner().invoke(app, ["adapt", "two", "low=0.5", "ia3=1", "--json"]).exit_code == 0
    assert adapters_of(graft.load("two")).active == [("low", 0.5), ("ia3", 1.0)]
    folded = graft.adapt("whole", adapters=["two"], fold=True)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.allclose(graft.load(folded)(ids).logits, graft.load("two")(ids).logits, atol=1e-5)


def test_methods_prints_the_table_of_the_design_space(base):  # noqa: F811
    rows = json.loads(CliRunner().invoke(app, ["tune", "--methods", "--json"]).output)
    table = {row["method"]: row for row in rows}
    assert table["lora"]["composition"] == "h + sΔh, s = 2"
    assert table["houlsby"]["Δh"] == "relu(h Wdown) Wup"
    assert table["parallel_adapter"]["inserted"] == "parallel"
    assert "full" not in table
    counted = json.loads(CliRunner().invoke(app, ["tune", "--methods", "--from", str(base), "--json"]).output)
    here = {row["method"]: row["in this model"] for row in counted}
    assert here["prompt"].startswith(f"{16 * 32 + 2 * 2:,} (")
    assert here["bitfit"].startswith("not here: expected layers with biases")
    shown = CliRunner().invoke(app, ["tune", "--methods"]).output
    assert "mix_and_match" in shown
    assert "k channels of keys" in shown
    assert {row["method"] for row in rows if row["folds"] == "yes"} == {"bitfit", "ia3", "lora"}


@pytest.mark.slow
def test_an_adapter_loads_in_a_fresh_process(tmp_path, base, fresh):  # noqa: F811
    run(tmp_path, base, method=LORA)
    load = f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})"
    show = "print(type(model).__name__, 'graft_adapters' in dict(model.named_children()))"
    code = f"import graft; from transformers import AutoModelForCausalLM; {load}; {show}"
    done = fresh.run(code)
    assert done.stdout.split() == ["LlamaForCausalLM", "True"], done.stderr


def test_peft_folders_come_in_and_go_out_by_the_verb(tmp_path, base, monkeypatch):  # noqa: F811
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    made = peft.get_peft_model(models.load(base), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    made.eval().save_pretrained("theirs")
    ids = torch.arange(3, 30)[None]
    done = CliRunner().invoke(app, ["adapt", "ours", "--peft", "theirs", "--from", str(base), "--export", "peft"])
    assert done.exit_code == 0, done.output
    back = peft.PeftModel.from_pretrained(models.load(base), "ours/peft").eval()
    with torch.no_grad():
        expected = made(ids).logits
        assert torch.allclose(graft.load("ours")(ids).logits, expected, atol=1e-5)
        assert torch.allclose(back(ids).logits, expected, atol=1e-5)
    missing = CliRunner().invoke(app, ["adapt", "more", "--peft", "nowhere", "--from", str(base)])
    assert missing.exit_code == 2
    assert "expected a peft folder" in missing.output


def test_an_adapter_is_brought_into_a_family(tmp_path, base, monkeypatch):  # noqa: F811
    run(tmp_path / "made", base, method=LORA, learning_rate=0.03)
    monkeypatch.chdir(tmp_path)
    recipe = {
        "family": "f",
        "models": {"low": {"load": "made/out"}, "whole": {"adapt": {"adapters": ["low"], "fold": True}}},
    }
    (tmp_path / "f.yaml").write_text(json.dumps(recipe))
    done = CliRunner().invoke(app, ["run", "f.yaml", "--json"])
    assert done.exit_code == 0, done.output
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        expected = models.load(tmp_path / "made" / "out")(ids).logits
        assert torch.equal(models.load("runs/f/models/low")(ids).logits, expected)
        assert torch.allclose(models.load("runs/f/models/whole")(ids).logits, expected, atol=1e-5)


def test_a_fusion_of_adapters_is_trained_over_them(tmp_path, base):  # noqa: F811
    from graft.adapters.folder import add_from, save

    for name in "ab":
        run(tmp_path / name, base, method={"pfeiffer": {"width": 4}}, learning_rate=0.03)
    model = models.load(tmp_path / "a" / "out")
    add_from(model, tmp_path / "b" / "out")
    adapters_of(model).use(["m", "m-2"])
    save(model, tmp_path / "both")
    models.load_tokenizer(base).save_pretrained(tmp_path / "both")
    run(tmp_path / "fused", tmp_path / "both", method="fusion", learning_rate=0.03)
    fused = models.load(tmp_path / "fused" / "out")
    assert adapters_of(fused).points["m-3"][0].of == ["m", "m-2"]
    with adapters_of(fused).watching() as seen, torch.no_grad():
        fused(torch.arange(3, 30)[None])
    assert {tuple(shares.shape) for shares in seen.values()} == {(1, 27, 2)}
    assert all(torch.allclose(shares.sum(-1), torch.ones(())) for shares in seen.values())
