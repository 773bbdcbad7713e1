"""Heads beside adapters that lie apart: trained, saved, loaded, measured and served without folding."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import graft
from graft import lineage, models
from graft._load import VERB as LOAD
from graft.adapters import adapters_of
from graft.errors import CheckpointError, RequestError, UnknownName
from graft.facts import facts_of
from graft.head import VERB as HEAD
from graft.multitask.folder import heads_in
from graft.multitask.served import ManyTasks
from graft.tune import VERB

from .test_full import base, tokenizer_and_ids  # noqa: F401  (a fixture)
from .test_several import SETS, TASKS, Stops, encoder, job, killed_at  # noqa: F401  (a fixture)

HEADED = {name: task for name, task in TASKS.items() if name != "lm"}
LORA = {"lora": {"rank": 4}}
IDS = torch.arange(3, 30)[None]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """An encoder whose body has a pooler for a head only."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer, ids = tokenizer_and_ids(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"vocab_size": len(tokenizer), "max_position_embeddings": 80, "pad_token_id": ids["pad"]}
    models.save(transformers.BertForMaskedLM(transformers.BertConfig(**shape, **more)), tokenizer, folder)
    return folder


@torch.no_grad()
def logits(folder, ids=IDS):
    return models.load(folder)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def small(folder):
    return {path.relative_to(folder) for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("kind", ["encoder", "decoder", "pooled"])
def test_an_adapter_with_heads_apart_is_the_folded_model(tmp_path, encoder, base, bert, kind):  # noqa: F811
    start = {"encoder": encoder, "decoder": base, "pooled": bert}[kind]
    frozen = {path: path.read_bytes() for path in start.glob("*.safetensors")}
    for name, fold in (("apart", False), ("whole", True)):
        VERB.run(job(tmp_path / name, start, HEADED, method=LORA, fold=fold))
    out = tmp_path / "apart" / "out"
    assert all(path.read_bytes() == held for path, held in frozen.items())
    assert {str(path) for path in small(out)} == {
        "adapter.safetensors", "heads/colour/head.safetensors", "heads/tag/head.safetensors",
    }  # fmt: skip
    for task in HEADED:
        mine, folded = (logits(tmp_path / name / "out" / "heads" / task) for name in ("apart", "whole"))
        torch.testing.assert_close(mine, folded, rtol=1e-3, atol=1e-4)
    root = models.load(out)
    assert heads_in(out).keys() == HEADED.keys()
    assert adapters_of(root) is not None


@pytest.mark.parametrize(
    "method",
    [{"mix_and_match": {"width": 4, "length": 3}}, {"prompt": {"length": 3, "gate": False}}, {"prefix": {"length": 3}}],
    ids=["mix_and_match", "prompt", "prefix"],
)
@pytest.mark.parametrize("kind", ["decoder", "pooled"])
def test_learned_keys_and_tokens_reach_the_head(tmp_path, base, bert, method, kind):  # noqa: F811
    start = base if kind == "decoder" else bert
    found = VERB.run(job(tmp_path, start, HEADED, method=method, learning_rate=0.05))
    assert found["dev_loss/colour"] > 0
    head = models.load(tmp_path / "out" / "heads" / "colour")
    with torch.no_grad():
        tuned = head(input_ids=IDS).logits
        with adapters_of(head).using(None):
            bare = head(input_ids=IDS).logits
    assert not torch.allclose(tuned, bare, atol=1e-5)


def test_heads_load_by_the_auto_classes_and_are_saved_again_with_their_adapter(tmp_path, bert):
    VERB.run(job(tmp_path / "a", bert, HEADED, method=LORA))
    place = tmp_path / "a" / "out" / "heads" / "colour"
    head = transformers.AutoModelForSequenceClassification.from_pretrained(place)
    assert type(head).__name__ == "BertForSequenceClassification"
    assert head.config.id2label == {0: "blue", 1: "green", 2: "red"}
    with torch.no_grad():
        expected = head(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert torch.equal(logits(place), expected)
    head.save_pretrained(tmp_path / "again")
    assert {str(p) for p in small(tmp_path / "again")} == {"adapter.safetensors", "heads/colour/head.safetensors"}
    models.load_tokenizer(place).save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again" / "heads" / "colour"), expected)
    assert type(models.load(tmp_path / "again")).__name__ == "BertForMaskedLM"


def test_a_killed_training_of_heads_and_an_adapter_ends_with_the_same_bytes(tmp_path, bert, monkeypatch):
    given = {"method": LORA, "checkpoint_every": "1 steps"}
    VERB.run(job(tmp_path / "whole", bert, HEADED, **given))
    with monkeypatch.context() as patch, pytest.raises(Stops):
        killed_at(patch, 4)
        VERB.run(job(tmp_path / "cut", bert, HEADED, **given))
    VERB.run(job(tmp_path / "cut", bert, HEADED, **given))
    files = lambda name: {p: (tmp_path / name / "out" / p).read_bytes() for p in small(tmp_path / name / "out")}  # noqa: E731
    assert files("cut") == files("whole")


def test_a_later_tuning_keeps_the_heads_that_it_names(tmp_path, bert):
    VERB.run(job(tmp_path / "one", bert, HEADED, method=LORA))
    given = {"learning_rate": 1e-9, "weight_decay": 0.0, "method": "further"}
    VERB.run(job(tmp_path / "two", tmp_path / "one" / "out", {"colour": HEADED["colour"]}, **given))
    assert heads_in(tmp_path / "two" / "out").keys() == {"colour"}
    one, two = (logits(tmp_path / name / "out" / "heads" / "colour") for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_a_head_beside_an_adapter_on_a_quantised_base(tmp_path, base):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    graft.quantize(tmp_path / "packed", from_=base, bits=4)
    VERB.run(job(tmp_path, tmp_path / "packed", HEADED, method=LORA))
    assert logits(tmp_path / "out" / "heads" / "colour").shape == (1, 3)
    assert small(tmp_path / "out") == {p for p in small(tmp_path / "out") if "model" not in p.name}


def test_a_head_beside_an_adapter_of_peft(tmp_path, base):  # noqa: F811
    pytest.importorskip("peft")
    how = {"peft": {"peft_type": "LOHA", "r": 2, "target_modules": "all-linear"}}
    VERB.run(job(tmp_path, base, HEADED, method=how, learning_rate=0.05))
    assert set(load_file(tmp_path / "out" / "heads" / "colour" / "head.safetensors")) == {"score.weight"}
    assert logits(tmp_path / "out" / "heads" / "tag").shape == (1, 27, 4)


RECIPE = """
family: apart
data:
  colours: {source: jsonl, path: colours.jsonl, splits: {dev: 0.2, test: 0.3}}
models:
  base: {load: ./base}
  low:
    tune:
      {from: base, tasks: {colour: {data: colours, head: classification}}, method: {lora: {rank: 4}}, budget: 40 steps,
       batch_size: 8, learning_rate: 1e-2}
  again: {load: low-folder}
evaluate:
  - {measure: classification, on: [colours.test], metrics: [accuracy], models: [low]}
"""


def test_a_recipe_trains_measures_and_caches_it(tmp_path, bert, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(bert)
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SETS["colours"]))
    (tmp_path / "f.yaml").write_text(RECIPE.replace("  again: {load: low-folder}\n", ""))
    done = graft.run("f.yaml", device="cpu")
    (row,) = [row for row in done.rows if row["kind"] == "score"]
    assert row["value"] > 0.5  # a third by chance
    assert graft.run("f.yaml", device="cpu").made == []
    made = done.folder / "models" / "low"
    assert facts_of(made / "heads" / "colour").heads == {"colour": "classification"}
    before = lineage.hash_model(made)
    head = made / "heads" / "colour" / "head.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(head).items()}, head)
    assert lineage.hash_model(made) != before


def test_an_adapter_with_heads_is_brought_into_a_family(tmp_path, bert, monkeypatch):
    VERB.run(job(tmp_path / "made", bert, HEADED, method=LORA))
    monkeypatch.chdir(tmp_path)
    recipe = {"family": "f", "models": {"low": {"load": "made/out"}}}
    (tmp_path / "f.yaml").write_text(json.dumps(recipe))
    graft.run("f.yaml", device="cpu")
    for task in HEADED:
        ours = logits(tmp_path / "runs" / "f" / "models" / "low" / "heads" / task)
        assert torch.equal(ours, logits(tmp_path / "made" / "out" / "heads" / task))


def test_what_cannot_work_with_such_heads_is_refused(tmp_path, bert):
    VERB.run(job(tmp_path, bert, HEADED, method=LORA))
    place = tmp_path / "out" / "heads" / "colour"
    with pytest.raises(RequestError, match="is a head beside an adapter, which cannot stand alone"):
        LOAD.located(LOAD.parse(str(place)), tmp_path)
    facts = {"low": facts_of(bert)}
    apart = VERB.facts(VERB.parse({"from": "low", "tasks": HEADED, "method": "lora"}), facts, "key")
    assert apart.heads == {"colour": "classification", "tag": "tagging"}
    assert "needs the adapter folded" in HEAD.check(HEAD.parse({"from": "low", "task": "tag"}), {"low": apart})[0]
    held = load_file(place / "head.safetensors")
    save_file({name: t for name, t in held.items() if "bias" not in name}, place / "head.safetensors")
    with pytest.raises(CheckpointError, match=r"expected the weights of a head .*classifier.bias"):
        models.load(place)
    save_file({**held, "classifier.bias": torch.zeros(7)}, place / "head.safetensors")
    with pytest.raises(CheckpointError, match=r"found .*classifier.bias \[7\]"):
        models.load(place)


def test_rows_of_many_tasks_are_read_in_one_batch_each_with_its_own_adapter_and_head(tmp_path, bert):
    VERB.run(job(tmp_path / "a", bert, HEADED, method=LORA, learning_rate=0.05))
    other = {"shade": {"data": "colours", "head": "classification"}}
    VERB.run(job(tmp_path / "b", bert, other, method={"lora": {"rank": 2}}, learning_rate=0.05))
    third = {"spot": {"data": "places", "head": "spans"}}
    VERB.run(job(tmp_path / "c", bert, third, method={"pfeiffer": {"width": 4}}, learning_rate=0.05))
    many = ManyTasks([tmp_path / name / "out" for name in "abc"])
    tasks = ["shade", "colour", "spot", "tag", "shade", "colour"]
    ids = torch.randint(5, 300, (6, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    where = {"colour": "a", "tag": "a", "shade": "b", "spot": "c"}
    for row, given in enumerate(many(tasks, ids, mask)):
        alone = models.load(tmp_path / where[tasks[row]] / "out" / "heads" / tasks[row])
        with torch.no_grad():
            expected = alone(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1])
        names = ("start_logits", "end_logits") if tasks[row] == "spot" else ("logits",)
        assert set(given) == set(names)
        for name in names:
            torch.testing.assert_close(given[name], expected[name][0], rtol=1e-4, atol=1e-5)
    with pytest.raises(UnknownName, match="colour"):
        many(["colours"], ids[:1], mask[:1])
    with pytest.raises(RequestError, match="expected a task for each of 6 rows, found 3"):
        many(tasks[:3], ids, mask)
    with pytest.raises(RequestError, match="expected tasks of other names, found shade"):
        ManyTasks([tmp_path / "b" / "out", tmp_path / "b" / "out"])
    with pytest.raises(RequestError, match="expected heads and one adapter"):
        VERB.run(job(tmp_path / "d", bert, {"lm": "prose"}, method=LORA))
        ManyTasks([tmp_path / "a" / "out", tmp_path / "d" / "out"])
