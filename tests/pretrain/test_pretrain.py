"""Pretraining makes a complete model, the same every time."""

import shutil

import pytest
import torch

from graft import data, hashing, models
from graft.data.bootstrap import weights_of
from graft.data.settings import Shares
from graft.errors import RequestError
from graft.finite import check_weights
from graft.pretrain import VERB, TokenizerAt
from graft.verb import Job
from graft.vocabulary import vocabulary_hash

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
    check_weights(tmp_path / "out")


def test_what_is_done_before_the_first_step_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GRAFT_QUIET", "0")
    run(tmp_path, {"tokenizer": {"size": 300}, "length": 32})
    told = capsys.readouterr().err.splitlines()
    parameters = f"{models.load(tmp_path / 'out').num_parameters():,}"
    assert told[:5] == [
        "m: a tokenizer of 300 tokens (bpe) from json",
        "finding 300 tokens",
        "m: building the model",
        f"m: {parameters} parameters; reading json.train",
        next(line for line in told if line.startswith("m: training on ") and line.endswith(" rows of up to 32 tokens")),
    ]


def test_the_same_settings_and_seed_give_the_same_bytes_and_another_seed_does_not(tmp_path):
    raw = {"tokenizer": {"size": 500}, "dropout": 0.1}
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / folder, raw, seed)
    first, again, other = (hashing.hash_weights(tmp_path / folder / "out") for folder in "abc")
    assert first == again != other


def test_a_tokenizer_can_be_another_models(tmp_path):
    run(tmp_path / "base", {"tokenizer": {"size": 500}})
    run(tmp_path / "other", {"tokenizer": {"of": "base"}}, models_={"base": tmp_path / "base" / "out"})
    assert vocabulary_hash(tmp_path / "base" / "out") == vocabulary_hash(tmp_path / "other" / "out")


def test_a_tokenizer_can_stand_in_a_folder_and_counts_by_its_content(tmp_path):
    run(tmp_path / "base", {"tokenizer": {"size": 500}})
    models.load_tokenizer(tmp_path / "base" / "out").save_pretrained(tmp_path / "tokens")
    found = run(tmp_path / "other", {"tokenizer": {"path": str(tmp_path / "tokens")}})
    assert vocabulary_hash(tmp_path / "base" / "out") == vocabulary_hash(tmp_path / "other" / "out")
    written = VERB.parse({"data": "json", "hidden": 32, "layers": 1, "length": 64, "tokenizer": {"path": "tokens"}})
    located = VERB.located(written, tmp_path)
    facts = VERB.facts(located, {}, "k")
    assert facts.vocabulary == vocabulary_hash(tmp_path / "tokens")
    assert facts.parameters == pytest.approx(found["parameters"], rel=0.02)
    moved = shutil.copytree(tmp_path / "tokens", tmp_path / "moved")
    elsewhere = VERB.located(written.model_copy(update={"tokenizer": TokenizerAt(path=str(moved))}), tmp_path)
    assert VERB.content(elsewhere) == VERB.content(located)
    (moved / "tokenizer.json").write_text((moved / "tokenizer.json").read_text() + " ")
    assert VERB.content(elsewhere) != VERB.content(located)


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RequestError, match="expected a tokenizer"):
        VERB.located(VERB.parse({"data": "d", "size": "1M", "tokenizer": {"path": "none"}}), tmp_path)


def test_what_a_killed_run_left_in_the_folder_does_no_harm(tmp_path):
    raw = {"tokenizer": {"size": 500}, "keep": {"last": 1}}
    run(tmp_path / "clean", raw)
    out = tmp_path / "again" / "out"
    (out / "checkpoints" / "step-99").mkdir(parents=True)
    (out / "model.safetensors").write_bytes(b"half a fi")
    (out / "config.json").write_text('{"model_ty')
    (out / "log.jsonl").write_text('{"step": 1, "lo')
    run(tmp_path / "again", raw)
    assert hashing.hash_weights(out) == hashing.hash_weights(tmp_path / "clean" / "out")
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-6"]
    assert len((out / "log.jsonl").read_text().splitlines()) == len(
        (tmp_path / "clean" / "out" / "log.jsonl").read_text().splitlines()
    )


def test_a_data_set_without_a_dev_split_trains_without_a_dev_loss(tmp_path):
    sets = {"json": SETS["json"].model_copy(update={"splits": Shares(dev=0, test=0)})}
    found = run(tmp_path, {"tokenizer": {"size": 500}, "budget": "1 step"}, sets=sets)
    assert "dev_loss" not in found
    assert found["loss"] > 0


def test_training_lowers_the_loss_on_real_text(tmp_path):
    run(tmp_path, {"tokenizer": {"size": 500}, "budget": "40 steps", "learning_rate": 1e-2, "hidden": 64})
    corpus = data.open_corpus(SETS, "json", tmp_path)
    from graft.evaluate.scorer import Scorer

    text = next(iter(corpus.records("dev")))["text"]
    (found,) = Scorer(models.load(tmp_path / "out"), models.load_tokenizer(tmp_path / "out")).documents([text])
    loss = -found.log_probs.mean()
    assert loss < 0.9 * torch.log(torch.tensor(500.0))


def test_bagging_trains_on_a_resample_that_the_result_names(tmp_path):
    raw = {"tokenizer": {"size": 500}}
    plain = run(tmp_path / "plain", raw)
    one, again = run(tmp_path / "one", {**raw, "bootstrap": 1}), run(tmp_path / "again", {**raw, "bootstrap": 1})
    two = run(tmp_path / "two", {**raw, "bootstrap": 2})
    assert "notes" not in plain
    assert one["notes"]["bootstrap"] == again["notes"]["bootstrap"] != two["notes"]["bootstrap"]
    (part,) = one["notes"]["bootstrap"]["parts"].values()
    assert weights_of(part["weights"]).sum() == part["documents"] > part["distinct"]
    losses = {found["loss"] for found in (plain, one, two)}
    assert (len(losses), one["loss"]) == (3, again["loss"])


@pytest.mark.parametrize(
    ("raw", "least"),
    [
        ({"architecture": "decoder", "tokenizer": {"size": 515, "algorithm": "wordpiece"}}, 516),
        ({"architecture": "encoder-decoder", "tokenizer": {"size": 359}}, 360),
    ],
)
def test_a_tokenizer_without_room_for_every_byte_is_refused_before_work(raw, least):
    asked = {"data": "json", "hidden": 32, "layers": 1, "length": 64, "budget": "6 steps", **raw}
    (said,) = VERB.check(VERB.parse(asked), {})
    assert f"expected at least {least} tokens" in said
    asked["tokenizer"] = {**asked["tokenizer"], "size": least}
    assert VERB.check(VERB.parse(asked), {}) == []
