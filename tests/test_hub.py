"""Models on the hub, without the network: a cache laid out by hand, and processes that are told to stay offline."""

from __future__ import annotations

import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graft.errors import RequestError
from graft.hub import fetch
from graft.models import save

SHA = "0123456789abcdef0123456789abcdef01234567"


def tiny(folder: Path, seed: int) -> Path:
    """A model's folder with a tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<pad>"))
    save(LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>"), folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A hub cache that holds `org/one` and `org/two`: `models--ORG--NAME/{refs/main,snapshots/SHA}`."""
    home = tmp_path_factory.mktemp("hub")
    for seed, name in enumerate(("one", "two")):
        repo = home / f"models--org--{name}"
        tiny(repo / "snapshots" / SHA, seed)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(SHA)
    return home


PROGRAM = """
import json, sys
from pathlib import Path
import graft
from graft.errors import GraftError
from graft.models import load_tokenizer

def told(action):
    try:
        return action()
    except GraftError as error:
        return [type(error).__name__, str(error)]

Path("family.yaml").write_text(
    "family: f\\nmodels:\\n  a: {load: {path: org/one, hub: true}}\\n"
    "  b: {load: {path: org/two, hub: true, revision: main}}\\n  soup: {merge: {models: [a, b], anyway: true}}\\n"
)
Path("wrong.yaml").write_text(
    "family: f\\nmodels:\\n  a: {load: {path: org/none, hub: true}}\\n"
    "  b: {load: {path: org/one, hub: true, revision: v2}}\\n"
)
found = {
    "loaded": told(lambda: sorted(graft.load("org/one", hub=True).state_dict())),
    "words": told(lambda: load_tokenizer("org/one", hub=True)("b")["input_ids"]),
    "made": told(lambda: graft.run("family.yaml", "run").made),
    "merged": told(lambda: str(graft.merge("out", models=["org/one", "org/two"], hub=True, anyway=True))),
    "not allowed": told(lambda: graft.load("org/one")),
    "no model": told(lambda: graft.load("org/none", hub=True)),
    "no tokenizer": told(lambda: load_tokenizer("org/none", hub=True)),
    "no parent": told(lambda: graft.merge("out2", models=["org/one", "org/none"], hub=True)),
    "no node": told(lambda: graft.plan("wrong.yaml", "wrong")),
}
Path("found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def place(cache, fresh) -> Path:
    """Where a process has worked on this cache that may not use the network."""
    place = cache.parent / "work"
    place.mkdir()
    env = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache.parent / "home"), "HF_HUB_OFFLINE": "1"}
    done = fresh.run(PROGRAM, env=env, cwd=place)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="module")
def found(place):
    return json.loads((place / "found.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_what_is_in_the_cache_is_loaded_by_its_id_without_the_network(cache, found):
    stored = weights(cache / "models--org--one" / "snapshots" / SHA)
    assert set(stored) <= set(found["loaded"])
    assert found["words"] == [3]


def test_a_recipe_loads_and_merges_ids(cache, place, found):
    assert found["made"] == ["a", "b", "soup"]
    one, two = (weights(cache / f"models--org--{name}" / "snapshots" / SHA) for name in ("one", "two"))
    assert all(torch.equal(one[name], tensor) for name, tensor in weights(place / "run" / "models" / "a").items())
    for folder in (place / "run" / "models" / "soup", place / "out"):
        for name, tensor in weights(folder).items():
            torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)
    assert found["merged"] == "out"
    parents = json.loads((place / "out" / "graft.json").read_text())["parents"]
    assert [parent["name"] for parent in parents] == ["org/one", "org/two"]


def test_what_is_not_in_the_cache_is_a_wrong_request_that_says_how_to_get_it(found):
    missing = (
        "org/none: expected a model on the hub, found none: it is not in this machine's cache, and HF_HUB_OFFLINE=1 "
        "forbids the network: unset that once to get it"
    )
    assert found["no model"] == found["no tokenizer"] == found["no parent"] == ["RequestError", missing]
    kind, problems = found["no node"]
    assert kind == "RecipeError"
    assert problems.splitlines() == [
        f"line 3: models.a.load: {missing}",
        f"line 4: models.b.load: {missing.replace('org/none', 'org/one').replace('hub,', 'hub at revision v2,')}",
    ]
    assert found["not allowed"][0] == "RequestError"
    assert "needs the network allowed: `hub=True` (--hub)" in found["not allowed"][1]


def answer(kind: type[Exception]) -> Exception:
    """An error as the hub's answer raises it."""
    return kind.__new__(kind, "404")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (answer(errors.RepositoryNotFoundError), "there is no model of that name, or it is private: check the name"),
        (answer(errors.GatedRepoError), "give it on https://huggingface.co/org/x, then `hf auth login`"),
        (answer(errors.RevisionNotFoundError), "it has no such commit, tag or branch"),
        (errors.LocalEntryNotFoundError("x"), "the hub cannot be reached: check the connection"),
        (errors.HFValidationError("x"), "an id has the form ORG/NAME"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_the_hubs_answers_are_told_in_words_that_can_be_acted_on(monkeypatch, error, words):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(RequestError) as told:
        fetch("org/x", "v1")
    assert str(told.value).startswith("org/x: expected a model on the hub at revision v1, found none: ")
    assert words in str(told.value)
