"""Poly: skills that are mixed by the row's task, on one task and on several, in training and afterwards."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import graft
from graft import models
from graft.adapters import foreign, tasks_of
from graft.cli import app
from graft.errors import CheckpointError, RequestError, SettingsError, UnknownName
from graft.facts import facts_of
from graft.multitask.served import ManyTasks
from graft.tune import VERB

from .in_processes import settled_skills
from .test_full import base, goes_on_with_the_same_bytes, run, tokenizer_and_ids  # noqa: F401  (a fixture)
from .test_several import TASKS, Stops, assert_close, encoder, job, killed_at  # noqa: F401  (a fixture)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
POLY = {"peft_type": "POLY", "r": 2, "n_skills": 3, "n_splits": 2, "target_modules": "all-linear"}
TEXTS = {"colour": "colours", "tag": "words", "place": "places"}
IDS = torch.arange(3, 33).view(2, 15)


def several(folder, start, tasks=TEXTS, config=POLY, **given):
    """A training on several tasks; its folder."""
    VERB.run(job(folder, start, tasks, method={"peft": config}, **{"learning_rate": 0.03, **given}))
    return folder / "out"


def theirs(model, task, ids=IDS):
    """What peft's own wrapper gives for rows of the task of this number."""
    wrapper = model.__dict__[foreign.HOLDER].wrapper.base_model
    with torch.no_grad():
        return wrapper(ids, task_ids=torch.full((len(ids),), task)).logits


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def test_poly_is_trained_on_the_first_task_and_saved_loaded_and_exported(tmp_path, base):  # noqa: F811
    import peft

    run(tmp_path / "a", base, method={"peft": {**POLY, "n_tasks": 2}}, learning_rate=0.03, budget="12 steps")
    log = [json.loads(line) for line in (tmp_path / "a" / "out" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < losses[0]
    loaded = models.load(tmp_path / "a" / "out")
    assert tasks_of(loaded).names == ["0", "1"]
    with torch.no_grad():
        changed = loaded(IDS).logits
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(models.load(tmp_path / "again")), changed)
        written = graft.adapt(tmp_path / "written", adapters=[str(tmp_path / "a" / "out")], export="peft")
        foreigner = peft.PeftModel.from_pretrained(models.load(base), written / "peft").eval()
        first, second = (foreigner.base_model(IDS, task_ids=torch.full((2,), task)).logits for task in (0, 1))
        assert torch.equal(first, changed)
        assert not torch.allclose(second, changed, atol=1e-5)
        assert torch.equal(theirs(loaded, 1), second)
        long = loaded.generate(IDS, max_new_tokens=4, do_sample=False, num_beams=2)
        assert torch.equal(long, loaded.generate(IDS, max_new_tokens=4, do_sample=False, num_beams=2, use_cache=False))
    with pytest.raises(RequestError, match="does not fold"):
        run(tmp_path / "fold", base, method={"peft": POLY}, fold=True)


def test_a_killed_training_of_poly_goes_on_with_the_same_bytes(tmp_path, base, monkeypatch):  # noqa: F811
    """Which draws skills anew in every step."""
    how = {"method": {"peft": POLY}, "budget": "5 steps", "checkpoint_every": "1 steps", "gradient_checkpointing": True}
    goes_on_with_the_same_bytes(tmp_path, base, monkeypatch, how)


@pytest.mark.parametrize("batches", ["mixed", "in_turn"])
def test_layers_are_told_the_task_of_the_rows_that_they_read(tmp_path, base, monkeypatch, batches):  # noqa: F811
    """Also where layers are computed a second time, in the backward pass of several tasks at once."""
    from peft.tuners.poly.router import PolyRouter

    read, plain = [], PolyRouter.forward

    def forward(self, task_ids, input_ids):
        read.append((tuple(task_ids.tolist()), self.training))
        return plain(self, task_ids, input_ids)

    monkeypatch.setattr(PolyRouter, "forward", forward)
    given = {"mixing": {"batches": batches}, "gradient_checkpointing": True, "budget": "3 steps"}
    several(tmp_path, base, **given)
    trained = [tasks for tasks, training in read if training]
    assert all(len(set(tasks)) == 1 for tasks in trained)  # tasks of a batch are read one after the other
    layers = len(load_file(tmp_path / "out" / "adapter.safetensors")) // 3
    # two rows of each task in a step, or six of one; each layer computes forwards and again
    rows = {"mixed": 2, "in_turn": 6}[batches]
    wanted = {"mixed": 3 * 2 * layers, "in_turn": 2 * layers}[batches]
    assert {task: trained.count((task,) * rows) for task in range(3)} == dict.fromkeys(range(3), wanted)


@pytest.mark.parametrize("batches", ["mixed", "in_turn"])
def test_computing_layers_twice_changes_nothing(tmp_path, base, batches):  # noqa: F811
    """The same skills are drawn, of the same tasks."""
    given = {"mixing": {"batches": batches}, "accumulate": 2}
    a, b = (load_file(several(tmp_path / str(twice), base, gradient_checkpointing=twice, **given)
                      / "adapter.safetensors") for twice in (False, True))  # fmt: skip
    assert_close(a, b, rtol=1e-4, atol=1e-5)
    routers = [tensor for name, tensor in a.items() if name.endswith("module_logits")]
    assert all(tensor.abs().amax(1).min() > 0.01 for tensor in routers)  # drawn up to 0.001; all tasks have learned


def test_eight_rows_in_pieces_are_eight_rows_at_once(tmp_path, base, monkeypatch):  # noqa: F811
    settled_skills(monkeypatch)
    a, b = (load_file(several(tmp_path / str(pieces), base, batch_size=8, accumulate=pieces) / "adapter.safetensors")
            for pieces in (1, 8))  # fmt: skip
    assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_a_killed_training_on_several_tasks_ends_with_the_same_bytes(tmp_path, encoder, monkeypatch):  # noqa: F811
    given = {"checkpoint_every": "1 step", "accumulate": 2, "gradient_checkpointing": True}
    whole = several(tmp_path / "whole", encoder, TASKS, **given)
    with monkeypatch.context() as patch:
        killed_at(patch, 7)
        with pytest.raises(Stops):
            several(tmp_path / "cut", encoder, TASKS, **given)
    cut = several(tmp_path / "cut", encoder, TASKS, **given)
    files = lambda out: {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*.safetensors"))}  # noqa: E731
    assert files(cut) == files(whole)
    assert len(files(cut)) == 3


@pytest.mark.parametrize("mixing", [{"learn": {"every": 2}}, {"meta": {"steps": 1, "rows": 2}}], ids=["learn", "meta"])
def test_gradients_beside_the_training_are_of_the_tasks_too(tmp_path, base, monkeypatch, mixing):  # noqa: F811
    settled_skills(monkeypatch)
    given = {"mixing": mixing, "budget": "3 steps", "batch_size": 3}
    a, b = (load_file(several(tmp_path / str(twice), base, gradient_checkpointing=twice, **given)
                      / "adapter.safetensors") for twice in (False, True))  # fmt: skip
    assert_close(a, b, rtol=1e-3, atol=2e-5)


@pytest.fixture(scope="module")
def low(base, tmp_path_factory):  # noqa: F811
    """An adapter that mixes skills for three tasks as text."""
    return several(tmp_path_factory.mktemp("low"), base)


def test_rows_are_of_the_chosen_task_or_each_of_its_own(low):
    model = models.load(low)
    tasks = tasks_of(model)
    assert (tasks.names, tasks.chosen) == (list(TEXTS), "colour")
    each = {name: theirs(model, number) for number, name in enumerate(TEXTS)}
    assert not torch.allclose(each["colour"], each["tag"], atol=1e-3)
    assert torch.equal(logits(model), each["colour"])
    with tasks.using("tag"):
        assert torch.equal(logits(model), each["tag"])
        with tasks.each_row(["place", "colour"]):
            both = logits(model)
            beams = model.generate(IDS, max_new_tokens=4, do_sample=False, num_beams=2)
            with pytest.raises(RequestError, match="expected a batch of 2 rows, one for each task named, found 3"):
                logits(model, IDS[[0, 1, 0]])
        assert torch.equal(logits(model), each["tag"])
    for row, task in enumerate(("place", "colour")):
        torch.testing.assert_close(both[row], each[task][row], rtol=1e-5, atol=1e-5)
        with tasks.using(task):
            alone = model.generate(IDS[row : row + 1], max_new_tokens=4, do_sample=False, num_beams=2)
        assert torch.equal(beams[row], alone[0])
    tasks.use("place")
    assert torch.equal(logits(model), each["place"])
    for ask in (tasks.use, tasks.using, lambda name: tasks.each_row([name])):
        with pytest.raises(UnknownName, match="did you mean 'colour'"):
            ask("color")


def test_the_chosen_task_is_saved_and_chosen_by_name(tmp_path, low):
    model = models.load(low)
    wanted = {name: theirs(model, number) for number, name in enumerate(TEXTS)}
    tasks_of(model).use("tag")
    model.save_pretrained(tmp_path / "tag")
    assert torch.equal(logits(models.load(tmp_path / "tag")), wanted["tag"])
    made = graft.adapt(tmp_path / "made", adapters=[str(low)], task="place")
    assert torch.equal(logits(models.load(made)), wanted["place"])
    kept = graft.adapt(tmp_path / "kept", adapters=[str(made)])
    assert tasks_of(models.load(kept)).chosen == "place"
    ask = lambda name, task: CliRunner().invoke(app, ["adapt", str(tmp_path / name), str(low), "--task", task])  # noqa: E731
    assert ask("told", "tag").exit_code == 0
    assert torch.equal(logits(models.load(tmp_path / "told")), wanted["tag"])
    refused = ask("none", "tags")
    assert refused.exit_code == 2
    assert "did you mean 'tag'?" in refused.stderr


RECIPE = """
family: poly
data:
  colours: {source: jsonl, path: colours.jsonl, splits: {dev: 0.2, test: 0.2}}
  words: {source: jsonl, path: words.jsonl, splits: {dev: 0.2, test: 0.2}}
models:
  base: {load: ./base}
  low:
    tune:
      from: base
      tasks: {colour: colours, tag: words}
      method: {peft: {peft_type: POLY, r: 2, n_skills: 3, target_modules: all-linear}}
      budget: 6 steps
      batch_size: 4
      learning_rate: 0.03
  tags: {adapt: {adapters: [low], task: tag}}
evaluate:
  - {measure: bits_per_byte, on: [words.test], models: [low, tags]}
"""


def test_a_recipe_trains_and_measures_by_task(tmp_path, low, base, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    for name in ("colours", "words"):
        (tmp_path / f"{name}.jsonl").write_bytes((low.parent / f"{name}.jsonl").read_bytes())
    (tmp_path / "f.yaml").write_text(RECIPE.replace("task: tag}", "task: tags}"))
    with pytest.raises(RequestError, match=r"unknown task of low 'tags' \(did you mean 'tag'\?\)"):
        graft.plan("f.yaml")
    (tmp_path / "f.yaml").write_text(RECIPE)
    done = graft.run("f.yaml", device="cpu")
    found = {row["model"]: row["value"] for row in done.rows if row["kind"] == "score"}
    assert found.keys() == {"low", "tags"}
    assert found["low"] != found["tags"]


def test_heads_beside_it_are_read_as_their_tasks(tmp_path, encoder):  # noqa: F811
    out = several(tmp_path, encoder, TASKS, learning_rate=0.1)
    ids, mask = IDS, torch.ones_like(IDS)
    many = ManyTasks([out])(["tag", "colour"], ids, mask)
    for row, task in enumerate(("tag", "colour")):
        head = models.load(out / "heads" / task)
        assert tasks_of(head).chosen == task
        own = logits(head)
        torch.testing.assert_close(many[row]["logits"], own[row], rtol=1e-4, atol=1e-5)
        with tasks_of(head).using("lm"):
            assert not torch.allclose(logits(head), own, atol=1e-4)
        head.save_pretrained(tmp_path / "again" / task)
        models.load_tokenizer(out).save_pretrained(tmp_path / "again" / task)
        assert torch.equal(logits(models.load(tmp_path / "again" / task / "heads" / task)), own)


def test_what_does_not_fit_is_said_before_anything_runs(tmp_path, base, low):  # noqa: F811
    given = {"from": "base", "tasks": TEXTS, "method": {"peft": POLY}}
    settings = VERB.parse(given)
    assert settings.method["peft"]["config"]["n_tasks"] == 3
    assert VERB.check(settings, {"base": facts_of(base)}) == []
    for wrong in (2, 4):
        with pytest.raises(SettingsError, match=rf"n_tasks: 3`, .*\(colour, tag, place\), found {wrong}: leave it out"):
            VERB.parse({**given, "method": {"peft": {**POLY, "n_tasks": wrong}}})
    both = VERB.parse({**given, "compile": True, "gradient_checkpointing": True})
    assert "expected `compile` or `gradient_checkpointing`" in VERB.check(both, {"base": facts_of(base)})[0]
    run(tmp_path / "lora", base, method="lora", budget="1 steps")
    with pytest.raises(RequestError, match="out has no tasks to choose from"):
        graft.adapt(tmp_path / "made", adapters=[str(tmp_path / "lora" / "out")], task="tag")


@pytest.mark.parametrize(
    "tasks", [{"names": ["a", "b"], "chosen": "a"}, {"names": ["a", "b", "b"], "chosen": "a"}, ["a"],
              {"names": ["a", "b", "c"], "chosen": "d"}]
)  # fmt: skip
def test_damaged_tasks_are_told(tmp_path, low, tasks):
    models.load(low).save_pretrained(tmp_path / "bad")
    said = json.loads((tmp_path / "bad" / "config.json").read_text())
    said["graft_adapted"]["tasks"] = tasks
    (tmp_path / "bad" / "config.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="expected the names of 3 tasks and the chosen one of them"):
        models.load(tmp_path / "bad")
