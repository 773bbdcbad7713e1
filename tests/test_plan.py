"""A plan says what is there, what is to be made, and what that costs; a node's key is the hash of all that makes it."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from graft import machine
from graft.cli import app
from graft.errors import RequestError, SettingsError
from graft.machine import cores, size
from graft.plan import Places, make_plan, plain, render, render_memory
from graft.plan.fit import fits, memory_limit, told, too_large
from graft.plan.keys import keys_of
from graft.plan.table import clock, count
from graft.pretrain.architectures import Shape, build, config_for
from graft.recipe import read_recipe
from graft.run import NodesFailed, run
from graft.train.estimate import BYTES_A_TOKEN, LEARNED, TOKENISED, cpu_flops
from graft.train.memory import PROCESS

RECIPE = """
family: f
data:
  notes: {source: jsonl, path: notes.jsonl}
models:
  base: {grow: {steps: 3, data: notes}}
  left: {grow: {parents: [base], steps: 90}}
  alone: {grow: {steps: 1}}
"""


@pytest.fixture
def recipe(tmp_path, growing):
    (tmp_path / "notes.jsonl").write_text('{"text": "one"}\n')
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def keys(recipe, old="", new=""):
    assert old in RECIPE
    recipe.write_text(RECIPE.replace(old, new))
    return keys_of(read_recipe(recipe))


def changed(recipe, old, new):
    before, after = keys(recipe), keys(recipe, old, new)
    return {name for name in before if before[name] != after[name]}


def test_a_key_changes_with_everything_that_makes_a_node_and_with_nothing_else(recipe):
    assert changed(recipe, "steps: 3", "steps: 4") == {"base", "left"}
    assert changed(recipe, "steps: 90}}", "steps: 90}, seed: 5}") == {"left"}
    assert changed(recipe, "family: f", "family: g") == set()
    assert changed(recipe, "family: f", "# a comment\nfamily: f") == set()
    assert changed(recipe, "family: f", "family: f\nseed: 1") == {"base", "left", "alone"}
    assert changed(recipe, "steps: 1}", "steps: 1, kind: decoder}") == set()


def test_a_key_follows_the_content_of_the_data_not_its_place(recipe, tmp_path):
    before = keys(recipe)
    (tmp_path / "notes.jsonl").rename(tmp_path / "moved.jsonl")
    assert keys(recipe, "notes.jsonl", "moved.jsonl") == before
    (tmp_path / "moved.jsonl").write_text('{"text": "two"}\n')
    after = keys(recipe, "notes.jsonl", "moved.jsonl")
    assert {name for name in before if before[name] != after[name]} == {"base", "left"}


def test_a_key_changes_with_the_version_of_the_verb(recipe, monkeypatch):
    before = keys(recipe)
    monkeypatch.setattr(type(read_recipe(recipe).models["base"].verb), "version", 2)
    assert not set(before.values()) & set(keys(recipe).values())


def test_states_follow_the_folder(recipe, tmp_path):
    places = Places(tmp_path / "run")
    run(recipe, places.folder, only=["base"])
    begun = places.work("left")
    begun.mkdir(parents=True)
    (begun / "key").write_text(keys(recipe)["left"])
    (begun / "scratch").mkdir()
    (begun / "scratch" / "state.json").write_text("{}")
    (places.work("alone")).mkdir(parents=True)
    (places.work("alone") / "key").write_text("another")
    states = {name: step.state for name, step in make_plan(read_recipe(recipe), places).steps.items()}
    assert states == {"base": "cached", "left": "resume", "alone": "run"}


def test_a_node_that_failed_before_its_first_step_is_to_be_made_not_gone_on_with(recipe, tmp_path):
    recipe.write_text(RECIPE.replace("steps: 1}", "steps: 1, fails: true}"))
    places = Places(tmp_path / "run")
    with pytest.raises(NodesFailed):
        run(recipe, places.folder)
    steps = make_plan(read_recipe(recipe), places).steps
    assert (places.work("alone") / "key").read_text() == steps["alone"].key
    assert {name: step.state for name, step in steps.items()} == {"base": "cached", "left": "cached", "alone": "run"}


def test_records_that_are_read_as_plain_text_are_pointed_out_below_the_table(recipe, tmp_path):
    def shown():
        out = io.StringIO()
        Console(file=out, width=160).print(render(make_plan(read_recipe(recipe), Places(tmp_path / "run"))))
        return out.getvalue()

    hint = "notes: notes.jsonl is read as plain text: `source: jsonl` reads the records in it"
    assert hint not in shown()
    recipe.write_text(RECIPE.replace("source: jsonl", "source: text"))
    assert hint in shown()


def test_totals_count_what_is_still_to_be_made(recipe, tmp_path):
    places = Places(tmp_path / "run")
    everything = plain(make_plan(read_recipe(recipe), places))["total"]
    assert everything == {"disk_bytes": 3000, "memory_bytes": 2000, "seconds": 94.0}
    run(recipe, places.folder, only=["base"])
    assert plain(make_plan(read_recipe(recipe), places))["total"]["seconds"] == 91.0


def test_the_table_shows_each_node_and_the_total(recipe, tmp_path):
    out = io.StringIO()
    Console(file=out, width=120).print(render(make_plan(read_recipe(recipe), Places(tmp_path / "run"))))
    text = out.getvalue()
    assert "left" in text
    assert "grow of base" in text
    assert "1.5 min" in text
    assert "1.6 min" in text
    assert "3 kB" in text


READ = """
family: f
data:
  d: {source: text, document: line, path: d.txt}
  e: {source: text, document: line, path: e.txt, splits: {dev: 0}}
models:
  base: {pretrain: {data: d, size: 60k, length: 16, tokenizer: {size: 300}, budget: 1k tokens}}
  again: {pretrain: {data: d, size: 60k, length: 16, tokenizer: {size: 300}, budget: 1k tokens}, seed: 1}
  child: {tune: {from: base, data: d, budget: 1k tokens}}
  other: {tune: {from: base, data: e, budget: 2 epochs}}
"""


def test_a_training_counts_what_comes_before_its_first_step_once(tmp_path):
    for name, lines in (("d", 4000), ("e", 1000)):
        (tmp_path / f"{name}.txt").write_text("".join(f"line {n:05}\n" for n in range(lines)))
    path = tmp_path / "f.yaml"
    path.write_text(READ)
    recipe = read_recipe(path)
    steps = make_plan(recipe, Places(tmp_path / "run")).steps
    facts = recipe.facts()
    before = {
        name: step.estimate.seconds
        - (step.node.verb.estimate(step.node.settings, {m: facts[m] for m in step.node.models}).seconds or 0)
        for name, step in steps.items()
    }
    size, dev, test = 4000 * 11, 0.05, 0.05
    tokens = size * (1 - test) / (TOKENISED * cores())
    assert before["base"] == pytest.approx(tokens + size * (1 - dev - test) / (LEARNED["bpe"] * cores()))
    assert before["again"] == before["child"] == 0
    epoch = 1000 * 11 * (1 - test) / BYTES_A_TOKEN
    work = 6 * facts["base"].parameters * round(2 * epoch) / cpu_flops()
    assert steps["other"].estimate.seconds == pytest.approx(work + 1000 * 11 * (1 - test) / (TOKENISED * cores()))
    assert f"an epoch taken for {epoch:,.0f} tokens" in steps["other"].estimate.note


def test_what_is_there_already_costs_nothing_and_a_loaded_model_the_process(tmp_path):
    (tmp_path / "model").mkdir()
    shape = Shape(16, 1, 2, 40, 16, 0.0, {"pad": 0, "bos": 1, "eos": 2})
    build(config_for("decoder", "rotary", shape)).save_pretrained(tmp_path / "model")
    path = tmp_path / "f.yaml"
    path.write_text("family: f\nmodels: {a: {load: model}}\n")
    step = make_plan(read_recipe(path), Places(tmp_path / "run")).steps["a"]
    assert step.estimate.memory_bytes == PROCESS + step.facts.bytes
    run(path, tmp_path / "run")
    assert plain(make_plan(read_recipe(path), Places(tmp_path / "run")))["total"]["memory_bytes"] == 0


def test_figures_are_written_short():
    assert [size(n) for n in (999, 12_400_000, 3.2e9)] == ["999 B", "12.4 MB", "3.2 GB"]
    assert [count(n) for n in (40, 3_100_000, 1.1e9)] == ["40", "3.1M", "1.1B"]
    assert [clock(s) for s in (None, 0.3, 42, 210, 7560, 676_800)] == [
        "?", "under 1 s", "42 s", "3.5 min", "2.1 h", "7.8 days",
    ]  # fmt: skip


TRAINED = """
family: f
data:
  d: {source: text, document: line, path: d.txt}
models:
  base: {pretrain: {data: d, size: 5M, length: 512, batch_size: 16, budget: 10 steps}}
"""


def test_how_often_a_training_is_saved_and_who_is_told_of_it_are_no_part_of_its_key(tmp_path):
    (tmp_path / "d.txt").write_text("".join(f"text {n}\n" for n in range(200)))
    path = tmp_path / "recipe.yaml"
    path.write_text(TRAINED)
    plain_one = read_recipe(path)
    more = "batch_size: 16, checkpoint_every: 5 minutes, track: [tensorboard]"
    path.write_text(TRAINED.replace("batch_size: 16", more))
    told_of = read_recipe(path)
    assert told_of.models["base"].settings.track == ["tensorboard"]
    assert keys_of(told_of) == keys_of(plain_one)
    path.write_text(TRAINED.replace("batch_size: 16", "batch_size: 8"))
    assert keys_of(read_recipe(path))["base"] != keys_of(plain_one)["base"]
    # the keys of what was made before anything was left out stay as they were
    settings = plain_one.models["base"].settings
    assert settings.content() == {name: value for name, value in settings.plain().items() if name != "parallel"}


def test_what_does_not_fit_is_told_the_kindest_change_first_and_each_change_fits(tmp_path):
    (tmp_path / "d.txt").write_text("".join(f"text {n}\n" for n in range(200)))
    path = tmp_path / "f.yaml"
    path.write_text(TRAINED)
    plan = make_plan(read_recipe(path), Places(tmp_path / "run"))
    whole = plan.steps["base"].estimate.memory_bytes
    (found,) = fits(plan, whole)
    assert (found.fits, found.changes) == (True, [])
    (found,) = fits(plan, int(whole * 0.7))
    assert not found.fits
    assert found.changes[0][0] == {"accumulate": 2}
    assert all(needed <= whole * 0.7 for _, needed in found.changes)
    written = TRAINED.replace("batch_size: 16", "batch_size: 16, accumulate: 2")
    path.write_text(written)
    again = make_plan(read_recipe(path), Places(tmp_path / "run"))
    assert again.steps["base"].estimate.memory_bytes == found.changes[0][1]
    change, needed = found.changes[-1]
    assert change == {"parallel": {"method": "fsdp", "devices": 2}}
    assert f"parallel: {{method: fsdp, devices: 2}} ({needed / 1e9:.2f} GB each)" in told(found)
    path.write_text(TRAINED.replace("batch_size: 16", "batch_size: 16, parallel: {method: fsdp, devices: 2}"))
    again = make_plan(read_recipe(path), Places(tmp_path / "run"))
    assert again.steps["base"].estimate.memory_bytes == needed
    (found,) = fits(plan, 1000)
    assert found.changes == []
    assert "no setting makes it small enough" in told(found)
    assert memory_limit("24GB") == 24 * 10**9
    with pytest.raises(SettingsError, match="expected a size such as 24GB"):
        memory_limit("much")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The plan of a model of 500 million parameters, its tunings, and it in 4 bits."""
    tmp_path = tmp_path_factory.mktemp("large")
    (tmp_path / "d.txt").write_text("".join(f"text {n}\n" for n in range(200)))
    path = tmp_path / "f.yaml"
    path.write_text(
        "family: f\ndata:\n  d: {source: text, document: line, path: d.txt}\nmodels:\n"
        "  base: {pretrain: {data: d, size: 500M, length: 256, tokenizer: {size: 300}, batch_size: 8}}\n"
        "  whole: {tune: {from: base, data: d, length: 64, batch_size: 4, budget: 5 steps}}\n"
        "  few: {tune: {from: base, data: d, length: 64, batch_size: 4, budget: 5 steps, method: lora}}\n"
        "  four: {quantize: {from: base}}\n"
    )
    return make_plan(read_recipe(path), Places(tmp_path / "run"))


def test_what_no_setting_makes_fit_is_spread_with_changes_or_tuned_by_few_weights(large):
    found = {fit.node: fit for fit in fits(large, int(3.25e9))}
    assert not any(f.fits for f in found.values() if f.node != "few")
    assert found["few"].fits
    whole = [change for change, _ in found["whole"].changes]
    assert whole[-1] == {"method": "lora"}
    (changed, alone), devices = whole[:2], [change["parallel"]["devices"] for change in whole[:2]]
    assert devices[0] < devices[1]
    assert (list(alone), len(changed) > 1) == (["parallel"], True)
    tune = large.steps["whole"].node
    for change, needed in found["whole"].changes:
        settings = tune.verb.parse({**tune.settings.plain(), **change})
        assert tune.verb.estimate(settings, {"base": large.steps["base"].facts}).memory_bytes == needed <= 3.25e9


def test_few_weights_stand_on_four_bits_where_plain_ones_are_too_many(large, tmp_path):
    pytest.importorskip("bitsandbytes")
    found = {fit.node: fit for fit in fits(large, int(1.2e9))}
    on_four = {"from": {"quantize": {"from": "base", "bits": 4}}}
    assert {"method": "lora", **on_four} == {name: found["whole"].changes[-1][0][name] for name in ("from", "method")}
    assert found["few"].changes[-1][0]["from"] == on_four["from"]
    way = told(found["few"]).split("; or ")[-1]
    changed, beside = way[way.index("from: ") :].split(" (")[0], way.split("beside a model ")[1]
    assert changed.startswith("from: base-4bit")
    few, packed = f"few: {{tune: {{{changed}, ", f"{beside}\n  "
    text = large.recipe.text.replace("few: {tune: {from: base, ", packed + few)
    path = large.recipe.root / "told.yaml"
    path.write_text(text)
    again = make_plan(read_recipe(path), Places(tmp_path / "run"))
    assert again.steps["base-4bit"].node.verb.name == "quantize"
    assert again.steps["few"].node.settings.plain()["from"] == "base-4bit"
    assert again.steps["few"].estimate.memory_bytes == found["few"].changes[-1][1]


def test_what_a_training_holds_is_told_by_kind(large):
    parts = {name: step.estimate.parts for name, step in large.steps.items()}
    numbers = large.steps["whole"].estimate.parameters
    held = {"process": PROCESS, "weights": 4 * numbers, "moments": 8 * numbers, "gradients": 4 * numbers}
    assert {name: parts["whole"][name] for name in held} == held
    alternating = max(parts["whole"]["gradients"], parts["whole"]["activations"])
    at_once = PROCESS + 12 * numbers + alternating
    assert large.steps["whole"].estimate.memory_bytes == pytest.approx(at_once, abs=2)
    assert parts["few"]["moments"] < parts["few"]["weights"] / 10
    assert parts["four"] == {}
    out = io.StringIO()
    Console(file=out, width=200).print(render_memory(large))
    assert "moments" in out.getvalue()
    assert "four" not in out.getvalue()
    assert plain(large)["models"][1]["memory"] == parts["whole"]


def test_where_nothing_is_trained_no_table_of_memory_is_shown(large):
    packed = {name: step for name, step in large.steps.items() if name == "four"}
    assert "nothing is left to train" in str(render_memory(replace(large, steps=packed)))


def test_packing_a_model_that_does_not_fit_the_machine_is_refused_before_it_is_loaded(large, monkeypatch):
    pytest.importorskip("bitsandbytes")
    only = replace(large, steps={"four": large.steps["four"]})
    needed = large.steps["four"].estimate.memory_bytes
    assert needed > PROCESS + large.steps["base"].facts.bytes
    monkeypatch.setattr(machine, "memory", lambda device: needed)
    assert too_large(only) == ""
    monkeypatch.setattr(machine, "memory", lambda device: needed // 2)
    assert "found four: does not fit" in too_large(only)


def test_a_training_that_does_not_fit_the_machine_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "d.txt").write_text("".join(f"text {n}\n" for n in range(200)))
    path = tmp_path / "f.yaml"
    path.write_text(TRAINED)
    whole = make_plan(read_recipe(path), Places(tmp_path / "run")).steps["base"].estimate.memory_bytes
    monkeypatch.setattr(machine, "memory", lambda device: int(whole * 0.7))
    with pytest.raises(RequestError, match=r"expected models whose making fits into .*base: does not.*accumulate: 2"):
        run(path, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "models").exists()
    assert not list((tmp_path / "run").glob("work/*"))
    shown = CliRunner().invoke(app, ["plan", str(path)])
    assert shown.exit_code == 0
    assert "base: does not fit" in shown.stderr


def test_a_machine_tells_its_memory_and_a_container_its_limit(tmp_path, monkeypatch):
    whole = machine.memory("cpu")
    assert whole > 2**28
    (tmp_path / "max").write_text("12345\n")
    monkeypatch.setattr(machine, "LIMITS", (str(tmp_path / "max"), str(tmp_path / "none")))
    assert machine.memory("cpu") == 12345
    (tmp_path / "max").write_text("max\n")
    assert machine.memory("cpu") >= whole


def test_what_the_figures_rest_on_stands_below_the_table(tmp_path):
    (tmp_path / "d.txt").write_text("".join(f"text {n}\n" for n in range(200)))
    path = tmp_path / "f.yaml"
    path.write_text(TRAINED)
    out = io.StringIO()
    Console(file=out, width=160).print(render(make_plan(read_recipe(path), Places(tmp_path / "run"))))
    assert "base: 4+4+K bytes a trained parameter, K = 8 (adamw)" in out.getvalue()


def test_an_ensembles_time_is_that_of_fitting_its_weights_and_its_memory_counts_the_process(tmp_path):
    (tmp_path / "d.txt").write_text("".join(f"text {n}\n" for n in range(200)))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "family: f\ndata:\n  d: {source: text, document: line, path: d.txt}\nmodels:\n"
        "  base: {pretrain: {data: d, hidden: 64, layers: 2, budget: 1k tokens}}\n"
        "  even: {ensemble: {members: {base: 1}}}\n"
        "  fitted: {ensemble: {members: [base], weights: {fit: d.dev, documents: 10}}}\n"
        "  passes: {ensemble: {members: [{model: base, dropout: {passes: 4, share: 0.1}}], "
        "weights: {fit: d.dev, documents: 10}}}\n"
    )
    steps = make_plan(read_recipe(path), Places(tmp_path / "run")).steps
    parameters = steps["base"].facts.parameters
    cost = {name: step.estimate for name, step in steps.items()}
    assert cost["even"].seconds == 0
    assert cost["fitted"].seconds == pytest.approx(2 * parameters * 10 * 500 / cpu_flops())
    assert cost["passes"].seconds == pytest.approx(4 * cost["fitted"].seconds)
    assert cost["even"].memory_bytes == PROCESS + 4 * parameters
    plan = plain(make_plan(read_recipe(path), Places(tmp_path / "run")))
    assert plan["total"]["seconds"] == pytest.approx(sum(model["seconds"] for model in plan["models"]))


def test_a_finished_run_says_that_nothing_is_left_to_fit(tmp_path, monkeypatch, growing):
    from typer.testing import CliRunner

    from graft.cli import app

    (tmp_path / "f.yaml").write_text("family: f\nmodels:\n  a: {grow: {}}\n")
    monkeypatch.chdir(tmp_path)
    asked = ["plan", "f.yaml", "--out", "run", "--fit", "1GB"]
    first = CliRunner().invoke(app, asked)
    assert "a: fits, with" in first.stdout, first.output
    assert CliRunner().invoke(app, ["run", "f.yaml", "--out", "run", "--json"]).exit_code == 0
    assert "everything is made already" in CliRunner().invoke(app, asked).stdout
