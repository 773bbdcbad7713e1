"""Hugging Face data sets: folders of either kind, and the hub without a network, from a cache laid out by hand."""

import json
import os
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from huggingface_hub import errors

from graft import data
from graft.data import hugging_face
from graft.errors import DataError, RecipeError
from graft.plan.keys import data_uses
from graft.recipe import read_recipe

SHA, NEWER = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"


def texts(first, last):
    return [{"text": f"document {n}"} for n in range(first, last)]


@pytest.fixture(params=["saved", "data files"])
def folder(request, tmp_path):
    """Makes `set`, a folder with these splits, as `save_to_disk` writes it or of data files that `datasets` finds."""

    def make(**parts):
        if request.param == "saved":
            made = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
            made.save_to_disk(str(tmp_path / "set"))
        else:
            data_files(tmp_path / "set", **parts)
        return tmp_path

    return make


def data_files(folder, **parts):
    folder.mkdir(parents=True, exist_ok=True)
    listed = [{"split": name, "path": f"{name}.jsonl"} for name in parts]
    (folder / "README.md").write_text(
        f"---\nconfigs: {json.dumps([{'config_name': 'all', 'data_files': listed}])}\n---\n"
    )
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def opened(root, **more):
    return data.open_corpus({"s": data.parse({"source": "huggingface", "name": "set", **more})}, "s", root)


def sizes(corpus):
    return [corpus.describe()["splits"][split]["documents"] for split in ("train", "dev", "test")]


@pytest.mark.parametrize("name", ["validation", "valid", "dev"])
def test_a_folder_keeps_its_own_splits(folder, name):
    root = folder(**{"train": texts(0, 20), name: texts(20, 30), "test": texts(30, 40)})
    corpus = opened(root)
    assert sizes(corpus) == [20, 10, 10]
    assert list(corpus.records("dev")) == texts(20, 30)
    assert data.problems(corpus.settings, root) == []
    assert sizes(opened(root, limit=3)) == [3, 3, 3]


def test_a_test_split_stays_whole_and_train_loses_what_it_shares(folder):
    corpus = opened(folder(train=texts(0, 100), validation=texts(40, 60), test=texts(50, 110)))
    assert sizes(corpus) == [40, 10, 60]
    assert list(corpus.records("test")) == texts(50, 110)


def test_what_is_in_no_split_of_ours_goes_into_none_that_is_given(folder):
    corpus = opened(folder(unsupervised=texts(0, 300), test=texts(300, 310)), splits={"dev": 0.2, "test": 0.5})
    train, dev, test = sizes(corpus)
    assert test == 10
    assert train + dev == 300
    assert 30 < dev < 90


def test_one_split_is_split_by_hash(folder):
    corpus = opened(folder(train=texts(0, 5), test=texts(5, 205)), split="test", splits={"dev": 0.3, "test": 0.3})
    assert sum(sizes(corpus)) == 200
    assert all(size > 20 for size in sizes(corpus))


def test_a_split_that_is_not_there_is_found_before_work_starts(folder):
    corpus = opened(folder(train=texts(0, 5), test=texts(5, 9)), split="nope")
    expected = "set: no split 'nope'; there are: train, test"
    assert data.problems(corpus.settings, corpus.root) == [expected]
    with pytest.raises(DataError, match=expected):
        list(corpus.records("train"))


def test_a_wrong_record_is_found_before_work_starts_in_whichever_split(folder):
    root = folder(train=texts(0, 5), test=[{"text": None}])
    (problem,) = data.problems(opened(root).settings, root)
    assert problem.startswith("set, test 1: expected a value in the field 'text'")


def test_a_measure_that_does_not_fit_a_folder_is_found_before_work_starts(folder):
    root = folder(train=texts(0, 40), validation=texts(40, 45), test=texts(45, 50))
    (root / "recipe.yaml").write_text(
        "family: f\ndata:\n  s: {source: huggingface, name: set}\n"
        "models:\n  a: {pretrain: {data: s, size: 1M, budget: 1M}}\n"
        "evaluate:\n  - {measure: generation, on: [s.test]}\n"
    )
    with pytest.raises(RecipeError, match=r"generation on s\.test: expected data of the format .*, found text"):
        read_recipe(root / "recipe.yaml")


def test_a_folder_that_datasets_cannot_read_is_told(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.bin").write_text("x")
    (problem,) = data.problems(opened(tmp_path).settings, tmp_path)
    assert problem.startswith("set: expected a data set, found none that loads: ")
    (tmp_path / "set" / "a.bin").unlink()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": \n')
    with pytest.raises(DataError, match="set: expected a data set"):
        list(opened(tmp_path).records("train"))


def test_the_fingerprint_of_a_folder_follows_its_content(tmp_path):
    data_files(tmp_path / "set", train=texts(0, 5))
    first = opened(tmp_path).fingerprint
    assert opened(tmp_path).fingerprint == first
    data_files(tmp_path / "set", train=texts(0, 6))
    assert opened(tmp_path).fingerprint != first


def test_a_data_set_on_the_hub_needs_the_network_allowed(tmp_path):
    corpus = opened(tmp_path, name="some/set")
    with pytest.raises(DataError, match="hub: true"):
        list(corpus.records("train"))
    assert "hub: true" in data.problems(corpus.settings, tmp_path)[0]


@pytest.fixture
def network(monkeypatch, tmp_path):
    """A hub as `huggingface_hub` and `datasets` see it: its commit, and what was asked of it."""

    class Hub:
        commit = SHA
        asked: list = []

        def snapshot(self, name, *, repo_type, revision, local_files_only=False, allow_patterns=None):
            self.asked.append((name, repo_type, revision, local_files_only))
            if local_files_only:
                raise errors.LocalEntryNotFoundError("not here")
            return str(tmp_path / "cache" / (self.commit if revision in (None, "main") else revision))

        def load(self, name, subset, *, revision, streaming):
            self.asked.append((name, subset, revision, streaming))
            rows = texts(0, 9) if revision == SHA else texts(0, 12)
            return {"train": datasets.Dataset.from_list(rows).to_iterable_dataset()}

    made = Hub()
    made.asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot)
    monkeypatch.setattr(datasets, "load_dataset", made.load)
    hugging_face.look_again()
    yield made
    hugging_face.look_again()


def test_a_data_set_on_the_hub_is_streamed_at_its_commit(network, tmp_path):
    corpus = opened(tmp_path, name="some/set", subset="small", hub=True)
    assert list(corpus.records("train")) == texts(0, 9)
    assert network.asked == [
        ("some/set", "dataset", None, False), ("some/set", "dataset", SHA, True), ("some/set", "small", SHA, True),
    ]  # fmt: skip
    assert corpus.commit == SHA


def test_new_content_under_one_id_is_noticed_when_the_recipe_is_read_again(network, tmp_path):
    make = lambda **more: opened(tmp_path, name="some/set", hub=True, **more)  # noqa: E731
    first = make().fingerprint
    assert make(revision=SHA).fingerprint == first
    network.commit = NEWER
    assert make().fingerprint == first
    assert list(make().records("train")) == texts(0, 9)
    assert data.problems(make().settings, tmp_path) == []
    assert make().fingerprint != first
    assert len(list(make().records("train"))) == 12
    assert make(revision=SHA).fingerprint == first
    assert list(make(revision=SHA).records("train")) == texts(0, 9)


def test_the_commit_stands_in_the_manifest_of_what_was_trained_on_it(network, tmp_path):
    hub = {"source": "huggingface", "name": "some/set", "hub": True}
    raw = {
        "near": {"source": "python-library", "packages": ["json"]},
        "far": hub,
        "both": {"mix": {"near": 1, "far": 1}},
    }
    recipe = SimpleNamespace(data={name: data.parse(value) for name, value in raw.items()}, root=tmp_path)
    uses = data_uses(recipe, SimpleNamespace(data=["both", "near.dev"]))
    assert [(use.name, use.split, use.commits) for use in uses] == [
        ("both", "train", {"far": SHA}),
        ("near", "dev", {}),
    ]


def test_a_hub_that_breaks_off_is_told_with_what_to_do(network, tmp_path, monkeypatch):
    def torn():
        yield {"text": "one"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": torn()})
    with pytest.raises(DataError, match=r"some/set: .* the hub cannot be reached.*: check the connection"):
        list(opened(tmp_path, name="some/set", hub=True).records("train"))


PROGRAM = """
import json, sys
from pathlib import Path
from graft import data
from graft.errors import GraftError

def told(action):
    try:
        return action()
    except GraftError as error:
        return [type(error).__name__, str(error)]

def of(name, **more):
    raw = {"source": "huggingface", "name": name, "hub": True, **more}
    return data.open_corpus({"s": data.parse(raw)}, "s", Path())

print(json.dumps({
    "rows": told(lambda: [r["text"] for r in of("org/one").records("train")]),
    "commit": told(lambda: of("org/one").commit),
    "pinned": told(lambda: of("org/one", revision=sys.argv[1]).fingerprint == of("org/one").fingerprint),
    "none": told(lambda: list(of("org/none").records("train"))),
    "problems": data.problems(of("org/none").settings, Path()),
    "about": told(lambda: list(of("org/about").records("train"))),
}))
"""


def test_without_the_network_the_cache_is_read_at_the_commit_that_it_knows(tmp_path, fresh):
    """As `hf download --repo-type dataset org/one` leaves it; of `org/about` only the description was fetched."""
    for name in ("one", "about"):
        repo = tmp_path / "hub" / f"datasets--org--{name}"
        data_files(repo / "snapshots" / SHA, train=texts(0, 4), test=texts(3, 6))
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(SHA)
    for path in repo.rglob("*.jsonl"):
        path.unlink()
    places = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_DATASETS_CACHE": str(tmp_path / "sets"), "HF_HUB_OFFLINE": "1"}
    done = fresh.run(PROGRAM, SHA, cwd=tmp_path, env={**os.environ, **places})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["rows"] == [f"document {n}" for n in range(3)]
    assert found["commit"] == SHA
    assert found["pinned"] is True
    kind, words = found["none"]
    assert kind == "DataError"
    assert words.startswith("org/none: expected a data set on the hub, found none: it is not in this machine's cache")
    assert found["problems"] == [words]
    kind, words = found["about"]
    assert kind == "DataError"
    assert "the hub cannot be reached, and this machine's cache does not hold all of it" in words
