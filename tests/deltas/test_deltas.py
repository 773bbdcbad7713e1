"""What is told of task vectors is what a few lines of torch find, and the advice follows from it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shlex
import shutil
from itertools import combinations

import pytest
import small_adapters
import small_family
import torch
import trained_family
from safetensors.torch import load_file
from typer.testing import CliRunner

import graft
from graft.cli import app
from graft.deltas import Deltas, Part, advise, common_base, deltas
from graft.deltas.measure import placed
from graft.errors import CannotCombine, CheckpointError, RequestError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return small_family.family(tmp_path_factory.mktemp("family"), 3)


@pytest.fixture(scope="module")
def found(folders):
    return deltas(folders["base"], {name: folders[name] for name in "abc"})


def with_rows(folder, count):
    """The model in a folder with so many rows of embeddings."""
    made = graft.load(folder)
    made.resize_token_embeddings(count)
    return made


def by_hand(folders, keep):
    """[models, elements] of all task vectors and [elements] of the base, over the tensors that `keep` wants."""
    base = {n: t for n, t in small_family.tensors(folders["base"]).items() if keep(n)}
    tuned = [small_family.tensors(folders[name]) for name in "abc"]
    start = torch.cat([t.flatten() for t in base.values()]).double()
    vectors = torch.stack([torch.cat([own[n].flatten() for n in base]).double() for own in tuned]) - start
    return vectors, start


def test_lengths_cosines_and_conflicts_are_those_found_by_hand(folders, found):
    parts = [(found.whole, lambda name: True)]
    parts += [
        (next(p for p in found.parts if (p.layer, p.kind) == (1, "attention")), lambda n: "layers.1.self_attn" in n),
        (next(p for p in found.parts if (p.layer, p.kind) == (0, "feed-forward")), lambda n: "layers.0.mlp" in n),
    ]
    for part, keep in parts:
        vectors, start = by_hand(folders, keep)
        assert part.elements == len(start)
        assert part.relative == pytest.approx((vectors.norm(dim=1) / start.norm()).tolist(), rel=1e-5)
        for i, j in combinations(range(3), 2):
            cosine = torch.cosine_similarity(vectors[i], vectors[j], dim=0).item()
            assert part.cosines[i][j] == pytest.approx(cosine, abs=1e-5)
        signs = vectors.float().sign()
        shared = (signs != 0).sum(0) >= 2
        against = shared & (signs > 0).any(0) & (signs < 0).any(0)
        assert part.conflicts == pytest.approx((against.sum() / shared.sum()).item(), abs=1e-3)


def test_every_tensor_has_one_place_and_the_parts_are_the_whole(found):
    assert sum(part.elements for part in found.parts) == found.whole.elements
    assert placed("model.layers.3.mlp.up_proj.weight") == (3, "feed-forward")
    assert placed("transformer.h.0.ln_1.weight") == (0, "norms")
    assert placed("model.layers.2.self_attn.q_norm.weight") == (2, "norms")
    assert placed("transformer.h.11.attn.c_attn.weight") == (11, "attention")
    assert placed("model.embed_tokens.weight") == (None, "embeddings")
    assert placed("model.layers.0.block_sparse_moe.experts.1.w1.weight") == (0, "feed-forward")


def test_changes_drawn_independently_contradict_as_chance_has_it(found):
    """Dense independent changes of three models: signs agree in a quarter of the elements."""
    assert found.by_chance == 0.75
    assert found.whole.conflicts == pytest.approx(0.75, abs=0.03)


def test_a_model_that_did_not_move_has_no_direction(folders):
    found = deltas(folders["base"], {"still": folders["base"], "a": folders["a"]})
    assert found.whole.relative[0] == 0
    assert found.whole.cosines[0] == [None, None]
    assert found.whole.conflicts is None


def told(cosine=0.0, conflicts=0.5, largest=0.4, models=2, moved=0.05):
    names = [f"m{i}" for i in range(models)]
    cosines = [[1.0 if i == j else cosine for j in range(models)] for i in range(models)]
    whole = Part(None, "all", 100, [moved] * models, cosines, conflicts)
    return Deltas("base", names, whole, [], [largest] * models, 1 - 2.0 ** (1 - models))


@pytest.mark.parametrize(
    ("found", "method"),
    [
        (told(cosine=0.9), "linear"),
        (told(largest=0.95), "ties"),
        (told(), "task_arithmetic"),
        (told(models=1), "task_arithmetic"),
    ],
)
def test_the_advice_follows_from_the_numbers_and_names_them(found, method):
    advice = advise(found)
    assert advice.method == method
    assert advice.why
    settings = {"method": method, "models": found.models, **advice.settings}
    if method != "linear":
        settings["base"] = "base"
    graft.merge.VERB.parse(settings)


def test_a_model_that_has_gone_far_is_warned_of():
    assert "m0 has moved by 80% of its base's length" in advise(told(moved=0.8)).why[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    trained_family.write_data(root)
    return root, trained_family.family(root)


def test_held_out_data_show_parents_mean_ensemble_and_barriers(trained, tmp_path):
    root, folders = trained
    page = tmp_path / "deltas.html"
    named = {name: folders[name] for name in ("up", "down")}
    _, _, seen = graft.deltas(folders["base"], named, on=str(root / "all.jsonl"), points=3, page=page, limit=10)
    assert list(seen.scores) == ["base", "up", "down", "mean of the weights", "ensemble"]
    measures = [{"measure": "bits_per_byte", "on": [str(root / "all.jsonl")], "limit": 10}]
    (row,) = graft.evaluate({"up": folders["up"]}, measures, out=tmp_path / "rows")
    assert seen.scores["up"] == pytest.approx(row["value"], rel=1e-6)
    (line,) = seen.lines.values()
    assert line.values[0] == pytest.approx(seen.scores["up"], rel=1e-5)
    assert line.values[2] == pytest.approx(seen.scores["down"], rel=1e-5)
    assert line.values[1] == pytest.approx(seen.scores["mean of the weights"], rel=1e-5)
    # a mixture loses less than the mean of its members' losses (Jensen)
    assert seen.scores["ensemble"] < (seen.scores["up"] + seen.scores["down"]) / 2
    written = page.read_text()
    assert written.count("<svg") >= 5
    assert "http" not in written.replace("http://www.w3.org", "")


def test_a_merge_that_is_asked_for_is_measured_beside_the_mean(trained):
    root, folders = trained
    named = {name: folders[name] for name in ("up", "down")}
    asked = {"on": str(root / "all.jsonl"), "points": 3, "limit": 10}
    seen = {
        scale: graft.deltas(folders["base"], named, merge={"method": "task_arithmetic", "scale": scale}, **asked)[
            2
        ].scores
        for scale in (0.5, 0.0)
    }
    # half the sum of two task vectors is their mean, and none of it the base
    assert seen[0.5]["task_arithmetic"] == pytest.approx(seen[0.5]["mean of the weights"], rel=1e-5)
    assert seen[0.0]["task_arithmetic"] == pytest.approx(seen[0.0]["base"], rel=1e-6)
    assert graft.deltas(folders["base"], named, merge="slerp", **asked)[2].scores["slerp"] > 0


def test_a_merge_that_cannot_be_is_refused_before_weights_are_read(trained, monkeypatch):
    root, folders = trained
    named = {name: folders[name] for name in ("up", "down")}
    monkeypatch.setattr(importlib.import_module("graft.deltas"), "deltas", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(RequestError, match="expected held-out data"):
        graft.deltas(folders["base"], named, merge="ties")
    on = str(root / "all.jsonl")
    with pytest.raises(RequestError, match="unknown"):
        graft.deltas(folders["base"], named, merge="tise", on=on)
    with pytest.raises(RequestError, match="did you mean 'density'"):
        graft.deltas(folders["base"], named, merge={"method": "ties", "denisty": 0.2}, on=on)
    with pytest.raises(RequestError, match="expected a method"):
        graft.deltas(folders["base"], named, merge={"density": 0.2}, on=on)


def test_the_command_measures_a_merge_with_its_settings(trained):
    root, folders = trained
    words = ["deltas", *(str(folders[name]) for name in ("base", "up", "down")), "--on", str(root / "all.jsonl")]
    words += ["--limit", "4", "--method", "ties", "--set", "density=0.4", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["outcome"]["scores"]["ties"] > 0


def test_a_sample_stands_for_the_whole(folders, found):
    named = {name: folders[name] for name in "abc"}
    every = deltas(folders["base"], named, sample=1 << 12)
    assert dataclasses.replace(every, notes={}) == found, "no tensor has more values than the sample"
    some = deltas(folders["base"], named, sample=128)
    assert some.whole.elements == found.whole.elements
    assert some.whole.relative == pytest.approx(found.whole.relative, rel=0.1)
    assert some.whole.conflicts == pytest.approx(found.whole.conflicts, abs=0.05)
    assert [(part.layer, part.kind) for part in some.parts] == [(part.layer, part.kind) for part in found.parts]
    assert some.notes == {"sample": 128}


def test_findings_are_read_again_under_other_names(found):
    again = Deltas.from_plain(json.loads(json.dumps(found.plain())), "below", ["x", "y", "z"])
    assert again == dataclasses.replace(found, base="below", models=["x", "y", "z"])


def test_the_command_prints_tables_or_one_json_value(folders):
    words = ["deltas", str(folders["base"]), str(folders["a"]), str(folders["b"])]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "try first: " in shown.output
    plain = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert plain["deltas"]["models"] == ["a", "b"]
    assert plain["outcome"] is None


def test_explaining_a_merge_merges_nothing(folders, tmp_path):
    out = tmp_path / "out"
    words = ["merge", str(out), str(folders["a"]), str(folders["b"]), "--base", str(folders["base"]), "--explain"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "try first: " in shown.output
    assert "  because " in shown.output
    assert not out.exists()
    told = shown.output.splitlines()[-1].split()
    assert told[:5] == ["graft", *words[:4]]
    assert told[5:7] == words[4:6]
    assert CliRunner().invoke(app, told[1:]).exit_code == 0
    assert out.is_dir()


@pytest.mark.parametrize(("models", "based"), [("ag", True), ("ga", False), ("g", True)])
def test_relatives_with_more_tokens_are_merged_by_token_as_told(folders, tmp_path, models, based):
    grown = with_rows(folders["b"], 52)
    there = {**folders, "g": small_family.save(grown, tmp_path / "g", words=52)}
    words = ["merge", str(tmp_path / "out"), *(str(there[name]) for name in models)]
    words += ["--base", str(there["base"])] if based else []
    shown = CliRunner().invoke(app, [*words, "--explain"])
    assert shown.exit_code == 0, shown.output
    assert "`vocabulary: union` (or base) matches them by token" in shown.output
    told = shlex.split(shown.output.splitlines()[-1])
    assert told[:4] == ["graft", *words[:3]]
    assert told[-2:] == ["--vocabulary", "union"]
    done = CliRunner().invoke(app, told[1:])
    assert done.exit_code == 0, done.output
    assert graft.load(tmp_path / "out").config.vocab_size == 52


def test_a_stranger_among_relatives_with_more_tokens_is_told_first(folders, tmp_path):
    more = small_family.save(with_rows(folders["b"], 52), tmp_path / "more", words=52)
    stranger = small_family.save(small_family.model(77), tmp_path / "stranger")
    assert graft.explain([folders["a"], more, stranger]).method == "rebasin"
    assert graft.explain([folders["a"], more, folders["b"]]).method == "linear"


def test_a_method_without_a_base_is_told_without_the_one_given(folders, tmp_path):
    near = small_family.save(small_family.model(5, near=graft.load(folders["a"]), step=1e-4), tmp_path / "near")
    words = ["merge", str(tmp_path / "out"), str(folders["a"]), str(near), "--base", str(folders["base"])]
    told = shlex.split(CliRunner().invoke(app, [*words, "--explain"]).output.splitlines()[-1])
    assert told == ["graft", *words[:4], "--method", "linear"]
    assert CliRunner().invoke(app, told[1:]).exit_code == 0


@pytest.mark.parametrize("more", [["--method", "ties"], ["--density", "0.3"], ["--models", "{a: 0.3, b: 0.7}"]])
def test_what_an_explanation_does_not_take_is_refused(more, folders):
    models = [] if more[0] == "--models" else [str(folders["a"]), str(folders["b"])]
    shown = CliRunner().invoke(app, ["merge", "out", *models, "--explain", *more])
    assert shown.exit_code == 2
    assert "beside --explain, which suggests the rest, found " in shown.stderr


def alike(found, cosine, largest):
    """The findings with task vectors that have these cosines, and this share in the largest fifth."""
    cosines = [[1.0 if i == j else cosine for j in range(3)] for i in range(3)]
    whole = dataclasses.replace(found.whole, cosines=cosines, conflicts=0.4)
    return dataclasses.replace(found, whole=whole, largest=[largest] * 3)


def test_trimming_is_suggested_only_where_it_costs_little(found):
    assert advise(alike(found, 0.05, 0.65)).method == "task_arithmetic"
    assert advise(alike(found, 0.05, 0.8)).method == "task_arithmetic"
    assert "fisher or regmean" in " ".join(advise(alike(found, 0.05, 0.8)).also)
    assert advise(alike(found, 0.05, 0.95)).method == "ties"
    said = {cosine: " ".join(advise(alike(found, cosine, 0.65)).why) for cosine in (-0.4, 0.05, 0.4)}
    assert "go against each other (mean cosine -0.40)" in said[-0.4]
    assert "hardly overlap (mean cosine 0.05)" in said[0.05]
    assert "go the same way in part (mean cosine 0.40)" in said[0.4]
    assert advise(alike(found, 0.8, 0.95)).method == "linear"


def test_without_a_base_the_relation_decides(folders, tmp_path):
    assert graft.explain([folders["a"], folders["b"]]).method == "linear"
    stranger = small_family.save(small_family.model(77), tmp_path / "stranger")
    advice = graft.explain([folders["a"], stranger])
    assert advice.method == "rebasin"
    assert "ensemble" in advice.also[0]
    with pytest.raises(RequestError, match="expected two models"):
        graft.explain([folders["a"]])
    with pytest.raises(RequestError, match="expected each model once"):
        graft.explain([folders["a"], folders["a"].parent / "b" / ".." / "a"])


def test_the_base_is_found_in_the_manifests(trained, tmp_path, monkeypatch):
    _, folders = trained
    made = []
    for name in ("up", "down"):
        out = tmp_path / name
        graft.merge(out, models=[str(folders[name])], method="linear")
        made.append(out)
    assert common_base(made) is None
    same = []
    for seed in (1, 2):
        out = tmp_path / f"same{seed}"
        graft.merge(out, models=[str(folders["up"])], method="linear", seed=seed)
        same.append(out)
    assert common_base(same) == folders["up"].resolve()


def test_what_does_not_correspond_or_is_damaged_is_named(folders, tmp_path):
    wide = small_family.save(small_family.model(0, hidden_size=32), tmp_path / "wide")
    with pytest.raises(CannotCombine, match="differ in shape"):
        deltas(folders["base"], {"wide": wide})
    sick = small_family.model(0)
    with torch.no_grad():
        sick.lm_head.weight[0, 0] = float("nan")
    small_family.save(sick, tmp_path / "sick")
    with pytest.raises(CheckpointError, match=r"sick: NaN or Inf in lm_head\.weight"):
        deltas(folders["base"], {"sick": tmp_path / "sick"})


@pytest.fixture(scope="module")
def adapted(folders, tmp_path_factory):
    """Two adapters on the base, and the models that peft folds them into: name → folder."""
    root = tmp_path_factory.mktemp("adapted")
    made = {}
    for seed, (name, layer) in enumerate({"x": "q_proj", "y": "lm_head"}.items()):
        made[name] = small_adapters.adapter(folders["base"], root / name, seed, target_modules=[layer, "up_proj"])
        whole = small_family.model(0)
        whole.load_state_dict(small_adapters.folded(folders["base"], made[name]))
        made[f"{name} folded"] = small_family.save(whole, root / f"{name}-folded")
    return made


def test_adapters_have_the_task_vectors_of_the_models_that_they_make(folders, adapted):
    found = deltas(folders["base"], {"x": adapted["x"], "y": adapted["y"]})
    wanted = deltas(folders["base"], {"x": adapted["x folded"], "y": adapted["y folded"]})
    assert found.whole.relative == pytest.approx(wanted.whole.relative, rel=1e-4)
    assert found.whole.cosines[0][1] == pytest.approx(wanted.whole.cosines[0][1], abs=1e-4)
    assert [(part.layer, part.kind) for part in found.parts] == [(part.layer, part.kind) for part in wanted.parts]
    shown = CliRunner().invoke(app, ["deltas", *map(str, (folders["base"], adapted["x"], adapted["y"])), "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["deltas"]["models"] == ["x", "y"]


def test_adapters_are_explained_on_the_base_that_they_name(folders, adapted):
    both = [adapted["x"], adapted["y"]]
    assert common_base(both) == folders["base"].resolve()
    whole = graft.explain([adapted["x folded"], adapted["y folded"]], base=folders["base"])
    found = graft.explain(both)
    assert (found.method, dict(found.settings)) == (whole.method, dict(whole.settings))


def test_an_adapter_that_names_no_base_here_is_explained_on_the_one_given(folders, adapted, tmp_path):
    lost = shutil.copytree(adapted["x"], tmp_path / "lost")
    config = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/not-here"}))
    wanted = graft.explain([adapted["x"], adapted["y"]], base=folders["base"])
    assert graft.explain([lost, adapted["y"]], base=folders["base"]).why == wanted.why
    assert graft.explain([lost, adapted["y"]], base=folders["base"], adapters_of=folders["base"]).why == wanted.why
    with pytest.raises(CannotCombine, match="the model it names is not on this machine"):
        graft.explain([folders["a"], lost])


def pickled(folder, out):
    """A copy with its weights in a pickle."""
    old = shutil.copytree(folder, out)
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    return old


def test_pickles_are_explained_where_they_are_allowed(folders, tmp_path):
    old = pickled(folders["a"], tmp_path / "old")
    words = ["merge", str(tmp_path / "out"), str(old), str(folders["b"]), "--base", str(folders["base"]), "--explain"]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "--allow-pickle" in refused.output
    told = CliRunner().invoke(app, [*words, "--allow-pickle", "--json"])
    assert told.exit_code == 0, told.output
    wanted = graft.explain([folders["a"], folders["b"]], base=folders["base"])
    assert json.loads(told.stdout)["why"] == list(wanted.why)


def test_pickles_are_compared_and_measured_where_they_are_allowed(trained, tmp_path):
    root, folders = trained
    old = {name: pickled(folders[name], tmp_path / name) for name in ("base", "up")}
    words = ["deltas", str(old["base"]), str(old["up"]), str(folders["down"]), "--on", str(root / "all.jsonl")]
    words += ["--limit", "4", "--method", "slerp", "--json"]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert f"{old['base']}, {old['up']} are stored as pickles" in json.loads(refused.stdout)["error"]
    shown = CliRunner().invoke(app, [*words, "--allow-pickle"])
    assert shown.exit_code == 0, shown.output
    words[1:3] = [str(folders["base"]), str(folders["up"])]
    told, wanted = (json.loads(each) for each in (shown.stdout, CliRunner().invoke(app, words).stdout))
    assert told["deltas"].pop("base") == str(old["base"])
    assert wanted["deltas"].pop("base") == str(folders["base"])
    assert told == wanted


def test_folders_of_one_name_are_told_apart(folders, tmp_path):
    places = []
    for name in "ab":
        places.append(tmp_path / name / "base")
        shutil.copytree(folders[name], places[-1])
    found, _, _ = graft.deltas(folders["base"], places)
    assert found.models == [str(place) for place in places]
    wanted, _, _ = graft.deltas(folders["base"], [folders["a"], folders["b"]])
    assert found.whole == wanted.whole
    alone, _, _ = graft.deltas(folders["base"], places[:1])
    assert (alone.models, alone.whole.relative[0]) == (["base"], wanted.whole.relative[0])
    with pytest.raises(RequestError, match="expected each model once, found"):
        graft.deltas(folders["base"], [folders["a"], folders["a"]])


def test_findings_are_plain_values(found):
    json.dumps(found.plain())
    assert dataclasses.is_dataclass(found)
