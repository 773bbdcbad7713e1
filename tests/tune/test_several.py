"""Several tasks in one training: heads on a shared body or all as text, in turn or mixed, in phases."""

import json

import numpy as np
import pytest
import torch
import transformers

from graft import data, models
from graft.errors import DataError, RequestError, SettingsError
from graft.multitask.folder import find_head, heads_in
from graft.pretrain.architectures import Shape, build, config_for
from graft.settings import parse
from graft.tune import VERB
from graft.tune.several import phases
from graft.tune.tasks import Mixing
from graft.verb import Job

from .test_full import base, tokenizer_and_ids  # noqa: F401  (a fixture)

COLOURS = ("red", "green", "blue")
SETS = {
    "prose": [{"text": f"plain text number {n} of many"} for n in range(40)],
    "colours": [{"text": f"thing {n} is {COLOURS[n % 3]}", "label": COLOURS[n % 3]} for n in range(60)],
    "words": [{"tokens": ["a", "dog", "ran", str(n)], "tags": ["DET", "NOUN", "VERB", "NUM"]} for n in range(50)],
    "places": [
        {"question": "where?", "context": f"number {n} is in {COLOURS[n % 3]} town", "answer": COLOURS[n % 3]}
        for n in range(40)
    ],
}
TASKS = {
    "lm": "prose",
    "colour": {"data": "colours", "head": "classification"},
    "tag": {"data": "words", "head": "tagging"},
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer, ids = tokenizer_and_ids(folder)
    torch.manual_seed(0)
    made = build(config_for("encoder", "rotary", Shape(32, 2, 2, len(tokenizer), 64, 0.0, ids)))
    models.save(made, tokenizer, folder)
    return folder


def job(folder, start, tasks, rows=SETS, sources=None, **raw):
    folder.mkdir(parents=True, exist_ok=True)
    sets = {}
    for name, records in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
        source = {"source": "jsonl", "path": f"{name}.jsonl", "splits": {"dev": 0.2, "test": 0}}
        sets[name] = data.parse({**source, **(sources or {}).get(name, {})})
    given = {"from": "base", "tasks": tasks, "budget": "6 steps", "batch_size": 6, "learning_rate": 3e-3, **raw}
    for name in ("out", "scratch", "cache"):
        (folder / name).mkdir(exist_ok=True)
    places = (folder / "out", folder / "scratch", folder / "cache")
    return Job("m", VERB.parse(given), 0, *places, {"base": start}, sets, folder, device="cpu")


def weights(folder):
    """All tensors of the model and its heads."""
    found = {"": models.load(folder).state_dict()}
    found |= {name: models.load(head.folder).state_dict() for name, head in heads_in(folder).items()}
    return {f"{task}/{name}": tensor for task, held in found.items() for name, tensor in held.items()}


def assert_close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("batches", ["mixed", "in_turn"])
def test_tasks_of_all_kinds_are_trained_on_one_body(tmp_path, encoder, batches):
    tasks = {**TASKS, "place": {"data": "places", "head": "spans"}}
    found = VERB.run(job(tmp_path, encoder, tasks, mixing={"batches": batches}))
    assert {name for name in found if name.startswith("dev_loss/")} == {f"dev_loss/{name}" for name in tasks}
    heads = heads_in(tmp_path / "out")
    assert {name: head.kind for name, head in heads.items()} == {
        "colour": "classification",
        "tag": "tagging",
        "place": "spans",
    }
    assert heads["colour"].labels == ("blue", "green", "red")
    assert (heads["tag"].task, heads["tag"].data) == ("tag", "words")
    start = models.load(encoder).state_dict()
    body = {name for name, tensor in models.load(tmp_path / "out").state_dict().items()
            if not torch.equal(tensor, start[name])}  # fmt: skip
    assert any(name.startswith("model.layers") for name in body)


def test_every_head_loads_with_transformers_alone_and_shares_the_weights_on_disk(tmp_path, encoder):
    VERB.run(job(tmp_path, encoder, TASKS))
    out = tmp_path / "out"
    root = transformers.AutoModelForMaskedLM.from_pretrained(out)
    colour = transformers.AutoModelForSequenceClassification.from_pretrained(out / "heads" / "colour")
    tag = transformers.AutoModelForTokenClassification.from_pretrained(out / "heads" / "tag")
    assert colour.config.id2label == {0: "blue", 1: "green", 2: "red"}
    for head in (colour, tag):
        for name, tensor in root.model.state_dict().items():
            assert torch.equal(head.model.state_dict()[name], tensor), name
        ids = torch.arange(3, 20)[None]
        ours = models.load(out / "heads" / ("tag" if head is tag else "colour"))
        torch.testing.assert_close(head.eval()(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-6)
    size = lambda folder: sum(path.stat().st_size for path in folder.glob("*.safetensors"))  # noqa: E731
    assert size(out / "heads" / "tag") < size(out) / 3
    assert find_head(out, kind="tagging").task == find_head(out, data="words").task == "tag"


def test_one_task_as_text_is_tuning_on_its_data(tmp_path, base):  # noqa: F811
    several = job(tmp_path / "a", base, {"only": "prose"}, batch_size=4)
    VERB.run(several)
    plain = several.settings.model_copy(update={"tasks": {}, "data": "prose"})
    (tmp_path / "b").mkdir()
    one = Job("m", plain, 0, tmp_path / "b", tmp_path / "s", tmp_path / "c", several.models, several.data, several.root,
              device="cpu")  # fmt: skip
    VERB.run(one)
    assert_close(weights(tmp_path / "a" / "out"), weights(tmp_path / "b"), rtol=0, atol=0)


@pytest.mark.parametrize("mixing", [{"learn": {"every": 2}}, {"batches": "in_turn"}], ids=["mixed", "in_turn"])
def test_eight_rows_in_pieces_are_eight_rows_at_once(tmp_path, encoder, mixing):
    for pieces in (1, 8):
        settings = {"batch_size": 8, "accumulate": pieces, "mixing": mixing}
        VERB.run(job(tmp_path / str(pieces), encoder, TASKS, **settings))
    a, b = (weights(tmp_path / str(pieces) / "out") for pieces in (1, 8))
    assert_close(a, b, rtol=1e-3, atol=2e-5)


class Stops(Exception):
    pass


def killed_at(monkeypatch, call):
    """The forward pass of call `call` raises, as a kill would."""
    from graft.train.multitask import MultiTask

    calls, plain = [0], MultiTask.forward

    def forward(self, batch, **given):
        calls[0] += self.training
        if calls[0] == call:
            raise Stops
        return plain(self, batch, **given)

    monkeypatch.setattr(MultiTask, "forward", forward)


@pytest.mark.parametrize(
    "mixing",
    [
        {"batches": "in_turn", "order": "cumulative"},
        {"learn": {"every": 2, "rows": 2}},
        {"meta": {"steps": 1, "rows": 1, "how": "reptile"}},
    ],
    ids=["in_turn", "learned", "meta"],
)
def test_a_killed_training_ends_with_the_same_bytes(tmp_path, encoder, monkeypatch, mixing):
    given = {"mixing": mixing, "checkpoint_every": "1 step"}
    VERB.run(job(tmp_path / "whole", encoder, TASKS, **given))
    with monkeypatch.context() as patch:
        killed_at(patch, 4)
        with pytest.raises(Stops):
            VERB.run(job(tmp_path / "killed", encoder, TASKS, **given))
    VERB.run(job(tmp_path / "killed", encoder, TASKS, **given))
    files = lambda name: {p.relative_to(tmp_path / name): p.read_bytes()  # noqa: E731
                          for p in sorted((tmp_path / name / "out").rglob("*.safetensors"))}  # fmt: skip
    assert files("whole") == files("killed")


def test_a_decoder_has_heads_too_and_an_adapter_may_carry_them_when_it_is_folded(tmp_path, base):  # noqa: F811
    tasks = {name: task for name, task in TASKS.items() if name != "lm"}
    VERB.run(job(tmp_path, base, tasks, method={"lora": {"rank": 4}}, fold=True))
    start = models.load(base)
    made = models.load(tmp_path / "out")
    head = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "out" / "heads" / "tag")
    assert type(head).__name__ == "LlamaForTokenClassification"
    assert torch.equal(made.lm_head.weight, start.lm_head.weight)
    moved = [name for name, tensor in start.state_dict().items() if not torch.equal(tensor, made.state_dict()[name])]
    assert moved
    assert all("proj" in name for name in moved)
    assert all(torch.equal(head.model.state_dict()[n], t) for n, t in made.model.state_dict().items())


def test_a_head_is_taken_along_by_the_name_of_its_task(tmp_path, encoder):
    VERB.run(job(tmp_path / "one", encoder, TASKS))
    given = {"learning_rate": 1e-9, "weight_decay": 0.0}
    VERB.run(job(tmp_path / "two", tmp_path / "one" / "out", {"colour": TASKS["colour"]}, **given))
    assert heads_in(tmp_path / "two" / "out").keys() == {"colour"}
    one, two = (models.load(tmp_path / name / "out" / "heads" / "colour").classifier.weight for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-7)
    other = {**SETS, "colours": [{"text": str(n), "label": "ab"[n % 2]} for n in range(30)]}
    with pytest.raises(RequestError, match="a head of this name for the labels blue, green, red"):
        VERB.run(job(tmp_path / "three", tmp_path / "one" / "out", {"colour": TASKS["colour"]}, rows=other))


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ({"t": {"data": "prose", "head": "tagging"}}, "learns from tagged data, and prose is text"),
        ({"t": {"data": "colours", "head": "classification", "labels": ["red", "green"]}}, "found 'blue'"),
    ],
)
def test_data_that_do_not_fit_a_head_are_refused(tmp_path, encoder, tasks, words):
    with pytest.raises(RequestError, match=words):
        VERB.run(job(tmp_path, encoder, tasks))


def test_weights_are_learned_for_an_end_task_which_must_have_dev_data(tmp_path, encoder):
    mixing = {"learn": {"for": ["tag"], "every": 1, "rows": 4}}
    found = VERB.run(job(tmp_path / "a", encoder, TASKS, mixing=mixing))
    weights = {name: found[f"weight/{name}"] for name in TASKS}
    assert sum(weights.values()) == pytest.approx(3)
    assert max(weights, key=weights.get) == "tag"
    none = {"words": {"splits": {"dev": 0, "test": 0}}}
    with pytest.raises(RequestError, match="expected dev data for the task tag"):
        VERB.run(job(tmp_path / "b", encoder, TASKS, sources=none, mixing=mixing))
    VERB.run(job(tmp_path / "c", encoder, TASKS, sources=none, mixing={"learn": {"for": ["lm"]}}, budget="1 steps"))


def test_how_it_learns_to_be_tuned_may_stand_alone():
    assert parse(Mixing, {"meta": "reptile"}).meta == parse(Mixing, {"meta": {"how": "reptile"}}).meta
    with pytest.raises(SettingsError, match=r"meta\.how: expected 'fomaml' or 'reptile', found 'reptle'"):
        parse(Mixing, {"meta": "reptle"})


def test_meta_learning_of_tasks_as_text(tmp_path, base):  # noqa: F811
    tasks, mixing = {"colour": "colours", "tag": "words"}, {"meta": {"steps": 2, "rows": 2}}
    found = VERB.run(job(tmp_path, base, tasks, batch_size=2, mixing=mixing))
    assert found["dev_loss"] > 0
    assert found["dev_loss/tag"] > 0


def test_a_single_label_is_nothing_to_learn(tmp_path, encoder):
    rows = {"colours": [{"text": str(n), "label": "red"} for n in range(9)]}
    with pytest.raises(DataError, match="expected two labels or more, found red"):
        VERB.run(job(tmp_path, encoder, {"c": TASKS["colour"]}, rows=rows))


def test_an_architecture_without_such_a_head_is_told_of_text(tmp_path):
    tokenizer, ids = tokenizer_and_ids(tmp_path, size=500, sentinels=True)
    shape = Shape(32, 1, 2, len(tokenizer), 64, 0.0, ids)
    models.save(build(config_for("encoder-decoder", "relative", shape)), tokenizer, tmp_path / "start")
    with pytest.raises(RequestError, match="found t5: give the task `head: text`"):
        VERB.run(job(tmp_path / "a", tmp_path / "start", {"colour": TASKS["colour"]}))
    text = {"colour": "colours", "prose": "prose"}
    assert VERB.run(job(tmp_path / "b", tmp_path / "start", text))["dev_loss/colour"] > 0


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({}, "expected `data` or `tasks`, found neither"),
        ({"data": "a", "tasks": {"t": "b"}}, "found both"),
        ({"data": "a", "mixing": {"batches": "in_turn"}}, "`mixing` beside `tasks` only"),
        ({"tasks": {"t": "b"}, "bootstrap": 1}, "`bootstrap` with one data set"),
        ({"tasks": {"t": {"data": "b", "labels": ["x", "y"]}}}, "labels of a classification"),
        ({"tasks": {"t": "b"}, "mixing": {"learn": {}, "meta": {}}}, "`learn` or `meta`, found both"),
        ({"tasks": {"t": {"data": "b", "haed": "text"}}}, "did you mean 'head'"),
    ],
)
def test_settings_that_say_nothing_are_refused(raw, words):
    with pytest.raises(SettingsError, match=words):
        VERB.parse({"from": "m", **raw})


def test_names_are_checked():
    settings = VERB.parse({"from": "m", "tasks": {"a/b": "x", "c": "y"}, "mixing": {"order": [{"tasks": ["d"]}]}})
    found = "\n".join(settings.misnamed("decoder"))
    for words in ("found 'a/b'", "unknown task 'd'; there are: a/b, c", "found c in none"):
        assert words in found


def test_phases():
    names, shares = ["a", "b"], [0.25, 0.75]
    of = lambda **raw: phases(Mixing.model_validate(raw), names, shares, 100)  # noqa: E731
    assert of() == [(100, shares)]
    assert of(order="sequence") == [(25, [1, 0]), (75, [0, 1])]
    assert of(order="cumulative") == [(50, [0.25, 0]), (50, shares)]
    assert of(order=[{"tasks": ["b"], "share": 3}, {"tasks": {"a": 2, "b": 1}}]) == [(75, [0, 1]), (25, [2, 1])]


def test_pretrain_then_tune_and_both_at_once_differ_in_one_word(tmp_path, base):  # noqa: F811
    for order in ("together", "sequence"):
        VERB.run(job(tmp_path / order, base, {"lm": "prose", "colour": "colours"}, mixing={"order": order}))
    a, b = (weights(tmp_path / order / "out") for order in ("together", "sequence"))
    assert any(not np.array_equal(a[name], b[name]) for name in a)
