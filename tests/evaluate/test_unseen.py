"""Text that a model was trained on is known again: under the same settings, and in the same files under others."""

import json

import pytest

import graft
from graft import data
from graft.errors import CannotCombine
from graft.evaluate.unseen import check_unseen
from graft.lineage import read_manifest

WORDS = ["the", "rain", "falls", "on", "a", "green", "hill", "and", "sea"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two texts and two models: one trained on the first as on the command line, one tuned from it on the second."""
    root = tmp_path_factory.mktemp("unseen")
    for name, step in (("notes", 5), ("other", 7)):
        lines = [" ".join(WORDS[(n * step + k * k) % len(WORDS)] for k in range(9)) + f" {n}" for n in range(80)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    small = {"budget": "1 steps", "batch_size": 2}
    shape = {"hidden": 32, "layers": 1, "length": 16, "tokenizer": {"size": 300}}
    base = graft.pretrain(root / "base", data=str(root / "notes.jsonl"), **shape, **small)
    graft.tune(root / "later", from_=base, data=str(root / "other.jsonl"), length=16, **small)
    return root


def check(trained, model, split="train", **settings):
    sets = {"asked": data.parse({"source": "jsonl", **settings})}
    check_unseen({model: trained / model}, [f"asked.{split}"], sets, trained)


def test_a_model_is_not_judged_by_the_file_it_was_trained_on_however_that_is_named(trained):
    for model in ("base", "later"):
        with pytest.raises(CannotCombine, match=rf"{model} was trained on .*notes\.jsonl\.train: .*held-out text"):
            check(trained, model, path="notes.jsonl")
        with pytest.raises(CannotCombine, match=r"which is read from the same files as asked\.train"):
            check(trained, model, path="notes.jsonl", splits={"dev": 0, "test": 0})
        with pytest.raises(CannotCombine, match=r"which is read from the same files as asked\.test"):
            check(trained, model, "test", path="other.jsonl", test="notes.jsonl")
    with pytest.raises(CannotCombine, match="later was trained on"):
        check(trained, "later", path="other.jsonl", limit=70)


def test_documents_of_that_file_that_were_held_out_may_judge(trained):
    for split in ("dev", "test"):
        check(trained, "later", split, path="notes.jsonl")
        check(trained, "later", split, path="notes.jsonl", limit=60)
    with pytest.raises(CannotCombine, match="later was trained on"):
        check(trained, "later", "dev", path="notes.jsonl", splits={"dev": 0.5})
    check(trained, "base", path="other.jsonl")


def test_a_copy_as_another_kind_of_file_is_known_again(trained):
    lines = [json.loads(line)["text"] for line in (trained / "notes.jsonl").read_text().splitlines()]
    (trained / "notes.csv").write_text("text\n" + "".join(f"{line}\n" for line in lines))
    sets = {"asked": data.parse({"source": "csv", "path": "notes.csv"})}
    with pytest.raises(
        CannotCombine, match=r"base was trained on .*notes\.jsonl\.train, which holds documents of asked"
    ):
        check_unseen({"base": trained / "base"}, ["asked.train"], sets, trained)
    check_unseen({"base": trained / "base"}, ["asked.dev", "asked.test"], sets, trained)


def test_files_stand_in_the_manifest_of_what_was_trained_on_them(trained):
    (use,) = read_manifest(trained / "base").data
    (content,) = use.contents
    assert len(content.files) == 1
    assert (content.low, content.high) == (0.1, 1.0)
    assert (use.name, use.split) == (str(trained / "notes.jsonl"), "train")


def test_what_ancestors_were_trained_on_stands_in_the_manifest_too(trained):
    base, later = (read_manifest(trained / name) for name in ("base", "later"))
    own = [f"{manifest.data[0].fingerprint}.train" for manifest in (base, later)]
    assert base.trained_on == own[:1]
    assert later.trained_on == sorted(own)
