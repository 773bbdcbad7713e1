"""X-LoRA: LoRA adapters mixed by a classifier of the frozen model's hidden states; trained, saved, called as any model."""

import json

import pytest
import torch
from safetensors.torch import load_file

import graft
from graft import data, models
from graft.adapters import adapters_of
from graft.errors import RequestError
from graft.facts import facts_of
from graft.tune import VERB
from graft.verb import Job

from .test_full import base, run  # noqa: F401  (a fixture)

XLORA = {"peft_type": "XLORA", "adapters": {"novels": "novelist", "medicine": "doctor"}, "layerwise_scalings": True}
LARGE = torch.arange(3, 60)[None]


@pytest.fixture(scope="module")
def experts(tmp_path_factory, base):  # noqa: F811
    """Folders of two experts, at different places and of different ranks, trained far enough to matter."""
    folder = tmp_path_factory.mktemp("experts")
    how = {"learning_rate": 0.05, "budget": "12 steps"}
    run(folder / "novelist", base, method={"lora": {"rank": 3, "on": ["attention_linears"]}}, **how)
    run(folder / "doctor", base, "completion", method={"lora": {"rank": 2, "on": ["query", "down"]}}, **how)
    return {name: folder / name / "out" for name in ("novelist", "doctor")}


def mix(folder, base, experts, **raw):  # noqa: F811
    """Trains a mixture into `folder / "out"`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"text": f"plain text number {n}"} for n in range(15)]
    rows += [{"text": f"count {n}: {n + 1}"} for n in range(15)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = {"rows": data.parse({"source": "jsonl", "path": "rows.jsonl", "splits": {"dev": 0.2, "test": 0}})}
    given = {"budget": "6 steps", "batch_size": 4, "learning_rate": 0.03, "method": {"peft": XLORA}, **raw}
    settings = VERB.parse({"from": "base", "data": "rows", **given})
    for name in ("out", "scratch", "cache"):
        (folder / name).mkdir(exist_ok=True)
    places = {"base": base, **experts}
    job = Job(
        "mix", settings, 0, folder / "out", folder / "scratch", folder / "cache", places, sets, folder, device="cpu"
    )
    return VERB.run(job)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, base, experts):  # noqa: F811
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("mixture")
    found = mix(folder, base, experts)
    return folder / "out", found


def test_a_mixture_trains_its_classifier_alone_and_comes_back_with_its_experts(tmp_path, base, experts, mixture):  # noqa: F811
    folder, found = mixture
    places = 4 * 2 + 2  # all of attention in two blocks, and two layers of the feed-forward
    assert found["trained_parameters"] == (32 + 1) * 2 * places
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < losses[0]
    held = load_file(folder / "adapter.safetensors")
    for name, expert in (("novels", "novelist"), ("medicine", "doctor")):
        theirs = load_file(experts[expert] / "adapter.safetensors")
        assert all(torch.equal(held[f"{name}.{key.partition('.')[2]}"], value) for key, value in theirs.items())
    loaded = models.load(folder)
    with torch.no_grad():
        changed = loaded(LARGE).logits
        assert not torch.allclose(changed, models.load(base)(LARGE).logits, atol=1e-3)
        for name in ("novels", "medicine"):
            with adapters_of(loaded).using(name):
                assert not torch.allclose(loaded(LARGE).logits, changed, atol=1e-3)
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(models.load(tmp_path / "again")(LARGE).logits, changed)
