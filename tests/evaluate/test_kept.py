"""Rows in `results.jsonl` are used again for the very same question, and for no other; what it cost stands there."""

import json
import shutil
import threading

import numpy as np
import pytest
from filelock import FileLock

import graft
from graft import data, models
from graft.checkpoint import LORA
from graft.errors import Locked
from graft.evaluate import evaluate, parse, work
from graft.evaluate.results import VERSION, Results
from graft.evaluate.scorer import Scorer
from graft.evaluate.work import disk_bytes
from graft.lora import CONFIG
from graft.plan import Places

from .conftest import make

PERPLEXITY = [{"measure": "perplexity", "on": ["plain.test"]}]


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("family") / "llama"
    models.save(make("llama"), tokenizer, folder)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(place, words="long"):
    return write(place / "plain.jsonl", [{"text": f"sentence number {n} is {words}"} for n in range(8)])


def measured(folders, raw, place, seed=0):
    sets = {"plain": data.parse({"source": "jsonl", "test": str(place / "plain.jsonl")})}
    return evaluate(folders, parse(raw), data=sets, root=place, out=place / "out", seed=seed)


def rows_in(place):
    return [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]


def test_other_data_under_the_same_name_is_measured_anew(llama, tmp_path):
    texts(tmp_path)
    (before,) = measured({"llama": llama}, PERPLEXITY, tmp_path)
    texts(tmp_path, "short")
    (after,) = measured({"llama": llama}, PERPLEXITY, tmp_path)
    assert before["data"] != after["data"]
    assert before["value"] != after["value"]
    texts(tmp_path)
    assert measured({"llama": llama}, PERPLEXITY, tmp_path) == [before]


def test_another_seed_draws_anew(llama, tmp_path):
    texts(tmp_path)
    (one,), (other,) = (measured({"llama": llama}, PERPLEXITY, tmp_path, seed) for seed in (0, 1))
    assert (one["seed"], other["seed"]) == (0, 1)
    assert one["value"] == other["value"]
    assert (one["low"], one["high"]) != (other["low"], other["high"])


def test_other_weights_in_the_same_folder_are_measured_anew(llama, tmp_path):
    texts(tmp_path)
    folder = shutil.copytree(llama, tmp_path / "llama")
    (before,) = measured({"llama": folder}, PERPLEXITY, tmp_path)
    model = models.load(folder)
    model.lm_head.weight.data.mul_(0.5)
    model.save_pretrained(folder)
    (after,) = measured({"llama": folder}, PERPLEXITY, tmp_path)
    assert before["value"] != after["value"]


TASK = (
    "name: sizes\nversion: {version}\ndata: {{source: jsonl, format: raw, test: sizes.jsonl}}\n"
    "prompt: '{{{{ q }}}}'\nchoices: ['small', 'large']\ntarget: '{target}'\nmetrics: [accuracy]\n"
)


def of_task(llama, place, version, target):
    (place / "sizes.yaml").write_text(TASK.format(version=version, target=target))
    (row,) = measured({"llama": llama}, [{"task": "sizes.yaml"}], place)
    return row


def test_other_settings_and_versions_of_a_task_are_measured_anew(llama, tmp_path):
    texts(tmp_path)
    write(tmp_path / "sizes.jsonl", [{"q": f"{n} is"} for n in range(7)])
    small = of_task(llama, tmp_path, 1, "0")
    large = of_task(llama, tmp_path, 1, "1")
    assert small["value"] + large["value"] == pytest.approx(1)
    later = of_task(llama, tmp_path, 2, "0")
    assert (small["task_version"], later["task_version"]) == (1, 2)
    assert small["key"] != later["key"]
    assert of_task(llama, tmp_path, 1, "0") == small


@pytest.mark.parametrize("name", ["VERSION", "COMPARED"])
def test_what_an_older_graft_computed_otherwise_is_made_anew(llama, tmp_path, monkeypatch, name):
    texts(tmp_path)
    both = {"one": llama, "two": llama}
    before = measured(both, PERPLEXITY, tmp_path)
    monkeypatch.setattr(work, name, getattr(work, name) + 1)
    after = measured(both, PERPLEXITY, tmp_path)
    anew = {row["kind"] for row, old in zip(after, before, strict=True) if row["key"] != old["key"]}
    assert anew == ({"score", "comparison"} if name == "VERSION" else {"comparison"})


def test_a_row_that_does_not_say_who_measured_it_is_told_so_without_being_measured_again(llama, tmp_path, monkeypatch):
    texts(tmp_path)
    folders = {"a": llama, "b": llama}
    found = measured(folders, PERPLEXITY, tmp_path)
    assert {row["evaluation"] for row in found} == {VERSION}
    kept = tmp_path / "out" / "results.jsonl"
    write(kept, [{k: v for k, v in row.items() if k != "evaluation"} for row in rows_in(tmp_path / "out")])
    monkeypatch.setattr(work, "_measure", None)
    assert measured(folders, PERPLEXITY, tmp_path) == found
    assert len(rows_in(tmp_path / "out")) == 2 * len(found)
    assert measured(folders, PERPLEXITY, tmp_path) == found
    assert len(rows_in(tmp_path / "out")) == 2 * len(found)


def test_models_are_compared_on_the_same_items_only(llama, tmp_path):
    texts(tmp_path)
    one, two, pair = measured({"one": llama, "two": llama}, PERPLEXITY, tmp_path)
    assert pair["kind"] == "comparison"
    results = Results(tmp_path / "out")
    ids, statistics = results.read_items(two)
    results.write_items(two["items"].removeprefix("items/").split(".")[0], [*ids[1:], "other"], statistics, [{}] * 8)
    lines = [json.dumps(row) for row in rows_in(tmp_path / "out") if row["kind"] == "score"]
    (tmp_path / "out" / "results.jsonl").write_text("\n".join(lines) + "\n")
    assert measured({"one": llama, "two": llama}, PERPLEXITY, tmp_path) == [one, two]


def test_a_row_says_how_much_was_read_in_what_time_and_memory(llama, tmp_path):
    texts(tmp_path)
    (row,) = measured({"llama": llama}, PERPLEXITY, tmp_path)
    scorer = Scorer(models.load(llama), models.load_tokenizer(llama))
    scorer.documents([f"sentence number {n} is long" for n in range(8)])
    cost = row["cost"]
    assert cost["tokens_per_s"] * cost["seconds"] == pytest.approx(scorer.tokens_read)
    assert scorer.tokens_read >= 8 * len("sentence number 0 is long")
    assert cost["peak_memory_bytes"] > cost["disk_bytes"] == sum(p.stat().st_size for p in llama.iterdir())


def folder_of(place, config=None, **files):
    place.mkdir(parents=True)
    if config is not None:
        (place / "config.json").write_text(json.dumps(config))
    for name, size in files.items():
        (place / name).write_bytes(bytes(size))
    return place


def own(place):
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def test_the_bytes_of_a_model_are_its_own_with_those_it_is_made_of_each_once(tmp_path):
    base = folder_of(tmp_path / "base", {"model_type": "llama"}, weights=1000)
    other = folder_of(tmp_path / "other", {"model_type": "llama"}, weights=500)
    folder_of(base / "checkpoints" / "step-1", {"model_type": "llama"}, weights=300)
    (base / "log.jsonl").write_bytes(bytes(900))
    whole = 1000 + (base / "config.json").stat().st_size
    assert disk_bytes(base) == whole
    assert disk_bytes(base / "checkpoints" / "step-1") == own(base / "checkpoints" / "step-1") > 300
    beside = folder_of(tmp_path / "beside", {"graft_adapted": {"base": {"path": "../base"}}}, weights=10)
    assert disk_bytes(beside) == own(beside) + whole
    lora = folder_of(tmp_path / "lora", **{LORA: 20})
    (lora / CONFIG).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "../base"}))
    assert disk_bytes(lora) == own(lora) + whole
    members = [{"path": f"../{name}"} for name in ("other", "beside", "lora", "other")]
    duo = folder_of(tmp_path / "duo", {"members": members})
    assert disk_bytes(duo) == own(duo) + own(other) + own(beside) + own(lora) + whole
    inside = folder_of(tmp_path / "inside", {"members": [{"path": "members/a"}]})
    folder_of(inside / "members" / "a", {"model_type": "llama"}, weights=70)
    assert disk_bytes(inside) == own(inside)


def asked(llama, place, **more):
    sets = {"plain": {"source": "jsonl", "test": str(place / "plain.jsonl")}}
    return graft.evaluate({"llama": llama}, PERPLEXITY, data_sets=sets, out=place / "out", **more)


def test_measuring_waits_for_whoever_works_in_the_folder_or_refuses(llama, tmp_path):
    texts(tmp_path)
    (tmp_path / "out").mkdir()
    with FileLock(Places(tmp_path / "out").lock):
        with pytest.raises(Locked, match=r"another run works on .*out: wait for its end, or run into another folder"):
            asked(llama, tmp_path, wait=False)
        assert not (tmp_path / "out" / "results.jsonl").exists()
    assert asked(llama, tmp_path, wait=False) == rows_in(tmp_path / "out")


def test_two_who_measure_into_one_folder_at_once_write_every_row_once(llama, tmp_path, monkeypatch):
    texts(tmp_path)
    reading, plain = threading.Barrier(2), Results.__init__

    def together(self, folder):
        plain(self, folder)
        try:  # without the lock both would stand here before either had written
            reading.wait(timeout=0.5)
        except threading.BrokenBarrierError:
            return

    monkeypatch.setattr(Results, "__init__", together)
    found = []
    both = [threading.Thread(target=lambda: found.append(asked(llama, tmp_path))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1] == rows_in(tmp_path / "out")


def test_statistics_come_back_as_they_were_written(tmp_path):
    results = Results(tmp_path)
    name = results.write_items("k" * 40, ["a", "b"], np.array([[1.5, 2.0], [0.0, np.inf]]), [{}, {"note": "x"}])
    ids, statistics = results.read_items({"items": name})
    assert ids == ["a", "b"]
    np.testing.assert_array_equal(statistics, [[1.5, 2.0], [0.0, np.inf]])
    assert results.read_items({"items": "items/none.jsonl.gz"}) is None
