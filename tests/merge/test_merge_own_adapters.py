"""Graft's own adapters as parents: what a merge makes of them is what it makes of the models that they fold into."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from folded_twins import CLOSE, METHODS, check_as_folded
from own_adapters import folded, named, own, points, save_folded
from safetensors.torch import load_file, save_file
from small_adapters import adapter
from small_adapters import folded as folded_by_peft
from small_family import family, merge, model, save, tensors
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import graft
from graft.cli import app
from graft.errors import CannotCombine, CheckpointError, GraftError, RecipeError, RequestError
from graft.facts import facts_of
from graft.recipe import read_recipe

PIECE = 100
"""Pieces that begin and end inside of rows."""
LORA = named("lora", rank=4)

pytestmark = pytest.mark.usefixtures("many_pieces")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    made = family(root, 1)
    torch.manual_seed(0)
    turned = GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    with torch.no_grad():
        for name, weight in turned.named_parameters():
            weight.add_(0.1 * torch.randn_like(weight) if name.endswith("bias") else 0)
    made["turned"] = save(turned, root / "turned")
    made["x"] = own(made["base"], root / "x", LORA, seed=1)
    made["y"] = own(made["base"], root / "y", named("lora", rank=2, on=["query", "output"], rslora=True), seed=2)
    for name in "xy":
        made[f"{name} folded"] = save_folded(made[name], root / f"{name}-folded")
    return made


def same(found, wanted):
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


LINEAR = {"form": "linear", "size": 2}
GATED = {"composition": "gated"}
SCALED = {"composition": "scaled", "insertion": "after", "form": "scale"}
KINDS = {
    "lora": [LORA],
    "rank-stabilised": [named("lora", rank=3, rslora=True, alpha=5)],
    "some layers of some blocks": [named("lora", rank=3, on=["attention"], layers="1:")],
    "from the largest singular values": [named("lora", rank=2, pissa=True)],
    "added as it is": [points({**LINEAR, "on": ["linears"]})],
    "a learned scale": [points({**LINEAR, "on": ["linears"], "composition": "scaled", "scale": "learned"})],
    "points of two scales": [
        points(
            {**LINEAR, "on": ["attention_linears"], "composition": "scaled", "scale": 3},
            {**LINEAR, "on": ["feed_forward_linears", "output"], "composition": "scaled", "scale": 0.5},
        )
    ],
    "factors of channels": [named("ia3")],
    "factors, scaled": [points({**SCALED, "on": ["linears", "before down"], "scale": 0.3})],
    "factors before, between and after": [LORA, named("ia3"), named("lora", rank=2)],
    "a pattern that fits the output matrix too": [named("lora", rank=2, on=["*_proj", "lm_head"])],
    "lengths of rows": [named("lora", rank=3, dora=True)],
    "lengths of rows, of a part": [named("lora", rank=2, pissa=True, dora=True, on=["output", "up"])],
    "lengths of rows between others": [LORA, named("lora", rank=2, dora=True), named("ia3")],
    "behind a layer": [points({**LINEAR, "on": ["output", "up"], "insertion": "after"})],
    "behind a layer that was changed, scaled": [
        LORA,
        points({**LINEAR, "on": ["linears"], "insertion": "after", "composition": "scaled", "scale": 0.3}),
    ],
    "before layers, one after the other": [
        points({**LINEAR, "on": ["before down", "before output"]}),
        points({**SCALED, "on": ["before down"]}),
        points({**LINEAR, "on": ["intermediate"], "composition": "scaled", "scale": "learned"}),
    ],
    "gates beside, behind and before": [
        points({**LINEAR, **GATED, "on": ["linears"]}),
        points({**LINEAR, **GATED, "on": ["output"], "insertion": "after"}),
        points({**LINEAR, **GATED, "on": ["before down"], "insertion": "after"}),
        points({"form": "scale", **GATED, "on": ["up", "before output"], "insertion": "after"}),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["base", "turned"])
def test_an_adapter_alone_is_what_folding_makes_of_it(base, kind, folders, tmp_path):
    if base == "turned" and "pattern" in kind:
        pytest.skip("it ties its output matrix, into which nothing folds")
    own(folders[base], tmp_path / "added", *KINDS[kind], seed=3)
    out, _ = merge({"method": "linear", "models": ["added"]}, {"added": tmp_path / "added"}, tmp_path / "out")
    same(out, folded(tmp_path / "added"))


def test_biases_are_shifted_and_multiplied_with_their_rows(folders, tmp_path):
    added = own(folders["turned"], tmp_path / "added", named("bitfit"), named("ia3"), named("bitfit"), LORA)
    out, _ = merge({"method": "linear", "models": ["added"]}, {"added": added}, tmp_path / "out")
    same(out, folded(added))


BIAS = {"form": "bias", "on": ["biases"]}
BIASED = {
    "stretched with the rows": [named("bitfit"), named("lora", rank=2, dora=True)],
    "mixed behind the layer": [named("bitfit"), points({**LINEAR, "on": ["output", "up"], "insertion": "after"})],
    "behind a gate": [points({**BIAS, **GATED}), points({**LINEAR, **GATED, "on": ["linears"]})],
    "multiplied behind a gate": [points({"form": "scale", **GATED, "on": ["biases"], "insertion": "after"})],
}


@pytest.mark.parametrize("kind", BIASED)
def test_biases_go_through_what_comes_after_them(kind, folders, tmp_path):
    active = {f"adapter-{number}": 0.7 for number in range(len(BIASED[kind]))}
    added = own(folders["turned"], tmp_path / "added", *BIASED[kind], active=active)
    out, _ = merge({"method": "linear", "models": ["added"]}, {"added": added}, tmp_path / "out")
    same(out, folded(added))


@pytest.mark.parametrize("base", ["base", "turned"])
@pytest.mark.parametrize("kind", ["lengths of rows", "behind a layer", "before layers, one after the other"])
def test_what_a_change_needs_of_the_whole_weight_is_read_a_few_rows_at_a_time(
    base, kind, folders, tmp_path, monkeypatch
):
    """Row lengths, and products with the weight: no more than a piece, or a row, is ever held of it."""
    from graft.checkpoint import TensorReader
    from graft.merge.inputs import Input

    added, read, real = own(folders[base], tmp_path / "added", *KINDS[kind]), [], TensorReader.read
    with Input(added, folders[base]).open() as reader:

        def counted(self, name, start=0, count=None):
            read.extend([count] if self is reader.base else [])
            return real(self, name, start, count)

        monkeypatch.setattr(TensorReader, "read", counted)
        for name in reader._under:
            real(reader, name, 3, 7)
    assert None not in read
    assert len(read) > 4 * len(reader._under)
    assert max(read) <= 64


def test_each_step_that_needs_the_whole_weight_is_found_once(folders, tmp_path, monkeypatch):
    from graft.merge.adapted import AdaptedReader

    found, real = [], AdaptedReader._found
    monkeypatch.setattr(AdaptedReader, "_found", lambda self, *what: found.append(what) or real(self, *what))
    added = own(folders["base"], tmp_path / "added", LORA, named("lora", rank=2, dora=True))
    merge(
        {"method": "ties", "base": "base", "models": ["added"], "density": 0.4},
        folders | {"added": added},
        tmp_path / "o",
    )
    assert len(found) == len(set(found)) == 7 * 2 * 2


def test_adapters_count_as_much_as_they_are_active(folders, tmp_path):
    active = {"adapter-0": 0.25, "adapter-2": -0.5}
    added = own(folders["base"], tmp_path / "added", LORA, LORA, named("ia3"), active=active)
    out, _ = merge({"method": "linear", "models": ["added"]}, {"added": added}, tmp_path / "out")
    same(out, folded(added))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_them_as_it_takes_the_folded_models(name, folders, tmp_path):
    graft.load(check_as_folded(name, folders, tmp_path))


@pytest.mark.slow
def test_where_adapters_stand_is_found_in_another_process_as_here(folders, monkeypatch):
    from graft.adapters import affine

    asked = []
    monkeypatch.setattr(affine, "placed", lambda said: asked.append(said) or "[]")
    affine._known.cache_clear()
    affine.read_affine(folders["y"], folders["base"])
    affine._known.cache_clear()
    monkeypatch.undo()
    (said,) = asked
    assert affine._elsewhere(said) == affine.placed(said)
    assert len(json.loads(affine.placed(said))) == 4


def test_task_vectors_come_from_the_factors(folders):
    from graft.merge.inputs import Input

    with Input(folders["x"], folders["base"]).open() as reader:
        name = "model.layers.0.mlp.up_proj.weight"
        start, factors = "adapter-0.model.layers.0.mlp.up_proj", load_file(folders["x"] / "adapter.safetensors")
        exact = 4.0 * factors[f"{start}.up"] @ factors[f"{start}.down"]
        torch.testing.assert_close(reader.change(name, 30, 50), exact.view(-1)[30:80])
        assert reader.change("model.norm.weight", 0, 4) is None


def test_models_and_adapters_of_both_forms_are_merged_with_each_other(folders, tmp_path):
    theirs = adapter(folders["base"], tmp_path / "theirs", 4)
    settings = {"method": "linear", "models": {"a": 1, "x": 2, "theirs": 1}}
    out, _ = merge(settings, folders | {"theirs": theirs}, tmp_path / "out")
    a, x, peft = tensors(folders["a"]), folded(folders["x"]), folded_by_peft(folders["base"], theirs)
    same(out, {name: 0.25 * a[name] + 0.5 * x[name] + 0.25 * peft[name] for name in out})


def change(base, found):
    before = tensors(base)
    return {name: found[name] - value for name, value in before.items()}


def test_adapters_of_both_forms_are_added_up(folders, tmp_path):
    theirs = adapter(folders["base"], tmp_path / "theirs", 4)
    settings = {"method": "add_adapters", "models": {"x": 0.5, "theirs": -1, "y": 2}}
    _, found = merge(settings, folders | {"theirs": theirs}, tmp_path / "out")
    assert found["notes"]["ranks"]["model.layers.0.self_attn.q_proj"] == 10
    base = folders["base"]
    made = change(base, folded_by_peft(base, tmp_path / "out"))
    x, y, peft = (change(base, f) for f in (folded(folders["x"]), folded(folders["y"]), folded_by_peft(base, theirs)))
    for name, value in made.items():
        torch.testing.assert_close(value, 0.5 * x[name] - peft[name] + 2 * y[name], rtol=1e-4, atol=2e-6)


def test_biases_and_turned_weights_are_added_up(folders, tmp_path):
    made = {
        "u": own(folders["turned"], tmp_path / "u", LORA, named("bitfit"), seed=1),
        "v": own(folders["turned"], tmp_path / "v", named("lora", rank=2, pissa=True), seed=2),
    }
    merge({"method": "add_adapters", "models": {"u": 0.5, "v": 2}}, made, tmp_path / "both")
    out, _ = merge({"method": "linear", "models": ["both"]}, {"both": tmp_path / "both"}, tmp_path / "out")
    before, u, v = tensors(folders["turned"]), folded(made["u"]), folded(made["v"])
    for name, value in out.items():
        wanted = before[name] + 0.5 * (u[name] - before[name]) + 2 * (v[name] - before[name])
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
    same(out, folded_by_peft(folders["turned"], tmp_path / "both"))


def test_what_is_no_sum_of_factors_is_not_added_up(folders, tmp_path):
    turned = own(folders["base"], tmp_path / "dora", named("lora", rank=2, dora=True))
    with pytest.raises(CannotCombine, match=r"the adapter multiplies model.layers.0.*, which is no sum"):
        merge({"method": "add_adapters", "models": ["x", "dora"]}, folders | {"dora": turned}, tmp_path / "0")
    factors = own(folders["base"], tmp_path / "ia3", named("ia3"))
    with pytest.raises(CannotCombine, match=r"the adapter multiplies model.layers.0.*k_proj.weight, which is no sum"):
        merge({"method": "add_adapters", "models": ["x", "ia3"]}, folders | {"ia3": factors}, tmp_path / "1")
    biases = own(folders["turned"], tmp_path / "biases", named("bitfit"))
    with pytest.raises(CannotCombine, match="biases change no linear layers: put adapters together"):
        merge({"method": "add_adapters", "models": ["biases"]}, {"biases": biases}, tmp_path / "2")
    with pytest.raises(CannotCombine, match="base is a model: `extract_lora` makes an adapter"):
        merge({"method": "add_adapters", "models": ["x", "base"]}, folders, tmp_path / "3")


NOT_READ = {
    "bottleneck on attention, feed_forward, is no change of weights": named("houlsby"),
    "softmax on attention, is no change of weights": named("prefix"),
    "tokens on input, is no change of weights": named("prompt"),
    "bias on before down, moves a bias by the whole weight times it: fold it first": points(
        {"form": "bias", "on": ["before down"], "insertion": "after"}
    ),
    "linear on attention, spans layers": points({**LINEAR, "on": ["attention"]}),
}


@pytest.mark.parametrize("message", NOT_READ)
def test_other_points_are_refused_by_name_with_what_works(message, folders, tmp_path):
    added = own(folders["base"], tmp_path / "added", NOT_READ[message])
    pattern = rf"added is an adapter that no merge can read: adapter-0, {message}.*\{{adapt: "
    for settings in ({"method": "linear", "models": ["a", "added"]}, {"method": "add_adapters", "models": ["added"]}):
        with pytest.raises(CannotCombine, match=pattern):
            merge(settings, folders | {"added": added}, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def moved(folder, out, **base):
    """A copy of an adapter's folder, its base named anew."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    config["graft_adapted"]["base"] |= base
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_one_that_was_pointed_at_another_model_is_refused_before_anything_is_made(folders, tmp_path):
    other = save(model(9), tmp_path / "other")
    strange = moved(folders["x"], tmp_path / "strange", path=str(other))
    words, out = r"made for another base: expected the weights with hash \w+, found \w+ in .*other", tmp_path / "out"
    pair = [str(strange), str(folders["y"])]
    with pytest.raises(RecipeError, match=words):
        graft.merge(out, method="linear", models=pair)
    recipe = tmp_path / "family.yaml"
    recipe.write_text(
        f"family: f\nmodels:\n  x: {{load: {strange}}}\n  y: {{load: {folders['y']}}}\n"
        "  mean: {merge: {method: linear, models: [x, y]}}\n"
    )
    with pytest.raises(RecipeError, match=words):
        graft.plan(recipe, tmp_path / "run")
    for make in (graft.ensemble, graft.adapt):
        with pytest.raises(RequestError, match=words):
            make(out, **{"members" if make is graft.ensemble else "adapters": pair})
    assert not out.exists()
    made = graft.merge(out, method="linear", models=pair, adapters_of=str(folders["base"]))
    same(
        tensors(made), tensors(graft.merge(tmp_path / "right", method="linear", models=[str(folders[n]) for n in "xy"]))
    )


def test_its_model_is_found_where_it_says_else_as_the_base_of_the_merge_and_nowhere_else(folders, tmp_path):
    lost = moved(folders["x"], tmp_path / "lost", path="../nowhere")
    here = folders | {"lost": lost, "other": save(model(9), tmp_path / "other")}
    wanted = folded(folders["x"])
    settings = {"method": "linear", "models": ["lost"], "adapters_of": "base"}
    same(merge(settings, here, tmp_path / "1")[0], wanted)
    added = merge({"method": "task_arithmetic", "base": "base", "models": ["lost"]}, here, tmp_path / "1b")
    same(added[0], wanted)
    with pytest.raises(CheckpointError, match=r"made for another base: expected the weights with hash \w+, found"):
        merge({**settings, "adapters_of": "other"}, here, tmp_path / "2")
    with pytest.raises(CannotCombine, match="lost is an adapter, and the model it names is not on this machine"):
        merge({"method": "linear", "models": ["lost"]}, here, tmp_path / "3")


def test_an_adapter_on_packed_weights_is_merged_on_the_unpacked_ones(folders, tmp_path):
    packed = shutil.copytree(folders["base"], tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    here = folders | {"low": moved(folders["x"], tmp_path / "low", path=str(packed), hash="of what was packed")}
    with pytest.raises(CannotCombine, match=r"low stands on a quantised model.*name what comes of it as `adapters_of`"):
        merge({"method": "linear", "models": ["low"]}, here, tmp_path / "1")
    given = {"method": "linear", "models": ["low"], "adapters_of": "base"}
    same(merge(given, here, tmp_path / "2")[0], folded(folders["x"]))


def test_adapters_of_two_models_are_not_added_up_as_if_they_were_of_one(folders, tmp_path):
    from graft.merge.add_adapters import _other_bases

    again = shutil.copytree(folders["base"], tmp_path / "again")
    assert list(_other_bases({"x": folders["base"], "y": again, "lost": None})) == []
    (told,) = _other_bases({"x": folders["base"], "y": folders["a"]})
    assert told.startswith("y and x stand on different bases")


def test_damaged_weights_are_told_of(folders, tmp_path):
    held = load_file(folders["x"] / "adapter.safetensors")
    first = next(iter(sorted(held)))
    path = str(folders["base"])
    moved(folders["x"], tmp_path / "sick", path=path)
    moved(folders["x"], tmp_path / "gone", path=path)
    less = moved(folders["x"], tmp_path / "less", path=path)
    save_file({name: t for name, t in held.items() if name != first}, less / "adapter.safetensors")
    save_file({name: t * float("nan") for name, t in held.items()}, tmp_path / "sick" / "adapter.safetensors")
    (tmp_path / "gone" / "adapter.safetensors").unlink()
    for name, message in (
        ("less", f"expected the tensor {first}, found none"),
        ("sick", r"sick: NaN or Inf in model.layers.*\(.*sick/adapter.safetensors\)"),
        ("gone", "gone: expected the adapters' weights in adapter.safetensors, found no such file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            merge({"method": "linear", "models": [name]}, {name: tmp_path / name}, tmp_path / f"out {name}")


@pytest.mark.parametrize(
    "said",
    ["a word", {"base": {}}, {"active": [["other", 1.0]]}, {"format": 2}, {"adapters": {"adapter-0": [{"form": "?"}]}}],
)
def test_what_a_damaged_folder_says_of_its_adapters_is_told_of(said, folders, tmp_path):
    shutil.copytree(folders["x"], tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    config["graft_adapted"]["base"]["path"] = str(folders["base"])
    entry = said if isinstance(said, str) else config["graft_adapted"] | said
    (tmp_path / "x" / "config.json").write_text(json.dumps(config | {"graft_adapted": entry}))
    with pytest.raises(GraftError, match=r"found it damaged|of format 1, found 2|adapter-0\.form: "):
        merge({"method": "linear", "models": ["x"]}, {"x": tmp_path / "x"}, tmp_path / "out")


RECIPE = """
family: adapted
data: {{t: {{source: jsonl, train: t.jsonl, splits: {{dev: 0, test: 0}}}}}}
models:
  base: {{load: {base}}}
  x: {{load: {x}}}
  y: {{load: {y}}}
  {more}
"""


def written(folders, root, more):
    (root / "t.jsonl").write_text("".join(f'{{"text": "w3 w5 w{i} w6 w7 w8"}}\n' for i in range(8)))
    (root / "r.yaml").write_text(RECIPE.format(**{n: folders[n] for n in ("base", "x", "y")}, more=more))
    return root / "r.yaml"


TRAINED = """tuned: {{tune: {{from: base, data: t, method: {{{method}}}, budget: 1 steps, batch_size: 1}}}}
  both: {{merge: {{method: task_arithmetic, base: base, models: {{x: 0.7, tuned: 0.3}}}}}}"""


@pytest.mark.parametrize("dora", ["false", "true"])
def test_a_recipe_tunes_adapters_and_merges_them(dora, folders, tmp_path):
    recipe = written(folders, tmp_path, TRAINED.format(method=f"lora: {{rank: 2, dora: {dora}}}"))
    facts = read_recipe(recipe).facts()
    assert (facts["tuned"].mergeable, facts["both"].mergeable, facts["both"].stored) == (False, True, "safetensors")
    assert facts["both"].config["model_type"] == "llama"
    done = graft.run(recipe, tmp_path / "run")
    made = done.folder / "models"
    base, x, tuned = tensors(folders["base"]), folded(folders["x"]), folded(made / "tuned")
    same(tensors(made / "both"), {n: base[n] + 0.7 * (x[n] - base[n]) + 0.3 * (tuned[n] - base[n]) for n in base})
    assert facts_of(made / "both").initialisation == facts_of(folders["base"]).initialisation
    assert graft.run(recipe, tmp_path / "run").made == []


@pytest.mark.parametrize("method", ["houlsby: {}", "prefix: {}", "peft: {config: {peft_type: VERA}}"])
def test_a_recipe_knows_before_anything_runs_which_adapters_are_not_merged(method, folders, tmp_path):
    with pytest.raises(RecipeError, match="tuned is an adapter that no merge can read"):
        read_recipe(written(folders, tmp_path, TRAINED.format(method=method)))


def test_adapters_put_together_are_merged_as_they_run(folders, tmp_path):
    more = """both: {adapt: {adapters: {x: 0.5, y: 0.25}}}
  soup: {merge: {method: linear, models: [base, both]}}"""
    done = graft.run(written(folders, tmp_path, more), tmp_path / "run")
    base, both = tensors(folders["base"]), folded(done.folder / "models" / "both")
    same(tensors(done.folder / "models" / "soup"), {n: (base[n] + both[n]) / 2 for n in base})


def test_the_command_merges_and_explains_them(folders, tmp_path):
    words = [str(tmp_path / "out"), str(folders["x"]), str(folders["y"]), "--base", str(folders["base"])]
    told = CliRunner().invoke(app, ["merge", *words, "--method", "task_arithmetic", "--json"])
    assert told.exit_code == 0, told.output
    base, x, y = tensors(folders["base"]), folded(folders["x"]), folded(folders["y"])
    same(tensors(tmp_path / "out"), {n: x[n] + y[n] - base[n] for n in base})
    told = CliRunner().invoke(app, ["merge", *words[:3], "--explain", "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["method"]


def test_the_command_names_the_point_that_is_not_read(folders, tmp_path):
    added = own(folders["base"], tmp_path / "added", named("houlsby"))
    told = CliRunner().invoke(app, ["merge", str(tmp_path / "out"), str(folders["a"]), str(added)])
    assert told.exit_code == 2
    assert "added is an adapter that no merge can read: adapter-0, bottleneck on attention" in told.stderr


def test_they_are_related_as_the_models_that_they_make(folders, tmp_path):
    found = graft.relate(folders["x"], folders["a"])
    assert (found.kind, found.weights) == ("same initialisation", "yes")
    stuck = own(folders["base"], tmp_path / "stuck", named("houlsby"))
    assert graft.relate(stuck, folders["a"]).kind == "adapter"


def test_facts_of_a_merge_are_those_of_the_model(folders):
    verb = graft.merge.VERB
    settings = verb.parse({"method": "linear", "models": ["x", "y"]})
    made = verb.facts(settings, {n: facts_of(folders[n]) for n in "xy"}, "key")
    plain = facts_of(folders["base"])
    assert replace(made, start=None, config={}) == replace(plain, start=None, config={}, folder="")
    assert made.config["model_type"] == "llama"
    assert "graft_adapted" not in made.config
