"""Pretraining makes a complete model, the same every time."""

import pytest
import torch

from graft import checkpoint, data, lineage, models
from graft.pretrain import VERB
from graft.verb import Job

SETS = {"json": data.parse({"source": "python-library", "packages": ["json", "html"], "splits": {"dev": 0.2}})}


def run(folder, raw, seed=0, sets=SETS, models_=None):
    settings = VERB.parse(
        {"data": "json", "hidden": 32, "layers": 1, "length": 64, "batch_size": 8, "budget": "6 steps", **raw}
    )
    for name in ("out", "scratch", "cache"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    job = Job(
        "m", settings, seed, folder / "out", folder / "scratch", folder / "cache", models_ or {}, sets, device="cpu"
    )
    return VERB.run(job)


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ({"architecture": "decoder", "tokenizer": {"size": 500}}, "LlamaForCausalLM"),
        (
            {"architecture": "decoder", "objective": "prefix", "positions": "alibi", "tokenizer": {"size": 500}},
            "MptForCausalLM",
        ),
        ({"architecture": "encoder", "tokenizer": {"size": 600, "algorithm": "wordpiece"}}, "ModernBertForMaskedLM"),
        (
            {"architecture": "encoder-decoder", "tokenizer": {"size": 600, "algorithm": "unigram"}},
            "T5ForConditionalGeneration",
        ),
    ],
)
def test_every_architecture_becomes_a_complete_folder(tmp_path, raw, name):
    found = run(tmp_path, raw)
    model = models.load(tmp_path / "out")
    tokenizer = models.load_tokenizer(tmp_path / "out")
    assert type(model).__name__ == name
    assert model.num_parameters() == found["parameters"]
    assert tokenizer.decode(tokenizer("any zqx text")["input_ids"], skip_special_tokens=True) == "any zqx text"
    assert found["dev_loss"] > 0
    assert (tmp_path / "out" / "log.jsonl").exists()
    assert (tmp_path / "out" / "generation_config.json").exists() == model.can_generate()
    checkpoint.check_weights(tmp_path / "out")


def test_the_same_settings_and_seed_give_the_same_bytes_and_another_seed_does_not(tmp_path):
    raw = {"tokenizer": {"size": 500}, "dropout": 0.1}
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / folder, raw, seed)
    first, again, other = (lineage.hash_weights(tmp_path / folder / "out") for folder in "abc")
    assert first == again != other


def test_a_tokenizer_can_be_another_models(tmp_path):
    run(tmp_path / "base", {"tokenizer": {"size": 500}})
    run(tmp_path / "other", {"tokenizer": {"of": "base"}}, models_={"base": tmp_path / "base" / "out"})
    assert lineage.vocabulary_hash(tmp_path / "base" / "out") == lineage.vocabulary_hash(tmp_path / "other" / "out")


def test_training_lowers_the_loss_on_real_text(tmp_path):
    run(tmp_path, {"tokenizer": {"size": 500}, "budget": "40 steps", "learning_rate": 1e-2, "hidden": 64})
    corpus = data.open_corpus(SETS, "json", tmp_path)
    from graft.evaluate.scorer import Scorer

    text = next(iter(corpus.records("dev")))["text"]
    (found,) = Scorer(models.load(tmp_path / "out"), models.load_tokenizer(tmp_path / "out")).documents([text])
    loss = -found.log_probs.mean()
    assert loss < 0.9 * torch.log(torch.tensor(500.0))
