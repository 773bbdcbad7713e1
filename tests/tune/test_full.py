"""Full tuning trains what it should and nothing else, on every format."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import MambaConfig, MambaForCausalLM

from graft import data, models
from graft.checkpoint import TensorReader
from graft.data.tokenizers import train_tokenizer
from graft.errors import CannotCombine, RequestError, SettingsError, UnknownName
from graft.pretrain.architectures import Shape, build, config_for
from graft.tune import VERB
from graft.tune.full import trained_names
from graft.tune.settings import longest
from graft.verb import Facts, Job
from graft.vocabulary import vocabulary_hash

ROWS = {
    "text": [{"text": f"plain text number {n}"} for n in range(30)],
    "completion": [{"prompt": f"count {n}: ", "completion": str(n + 1)} for n in range(30)],
    "pairs": [{"source": f"word {n}", "target": f"drow {n}"} for n in range(30)],
    "labelled": [{"text": f"item {n}", "label": n % 2} for n in range(30)],
    "chat": [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(30)
    ],
}


def tokenizer_and_ids(folder, algorithm="bpe", size=400, **more):
    raw = data.parse({"source": "python-library", "packages": ["json"], "splits": {"dev": 0, "test": 0}})
    tokenizer = train_tokenizer(data.open_corpus({"c": raw}, "c", folder), algorithm, size, **more)
    return tokenizer, {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer, ids = tokenizer_and_ids(folder)
    torch.manual_seed(0)
    models.save(
        build(config_for("decoder", "rotary", Shape(32, 2, 2, len(tokenizer), 64, 0.0, ids))), tokenizer, folder
    )
    return folder


def run(folder, base, format="text", experts=None, **raw):
    """Trains into `folder / "out"`; `experts`: models beside the base that the method names, and where they lie."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[format]))
    sets = {"rows": data.parse({"source": "jsonl", "path": "rows.jsonl", "splits": {"dev": 0.2, "test": 0}})}
    settings = VERB.parse({"from": "base", "data": "rows", "budget": "4 steps", "batch_size": 4, **raw})
    for name in ("out", "scratch", "cache"):
        (folder / name).mkdir(exist_ok=True)
    job = Job(
        "m",
        settings,
        0,
        folder / "out",
        folder / "scratch",
        folder / "cache",
        {"base": base, **{name: Path(place) for name, place in (experts or {}).items()}},
        sets,
        folder,
        device="cpu",
    )
    return VERB.run(job)


def goes_on_with_the_same_bytes(tmp_path, base, monkeypatch, how):
    """A training of an adapter, stopped before its fourth step, ends as one that was not."""
    from graft.train.loop import Training

    run(tmp_path / "whole", base, **how)
    learn = Training._learn

    def stop(self, *args):
        if self.at.step == 3:
            raise KeyboardInterrupt
        return learn(self, *args)

    monkeypatch.setattr(Training, "_learn", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", base, **how)
    monkeypatch.setattr(Training, "_learn", learn)
    run(tmp_path / "cut", base, **how)
    whole, cut = (tmp_path / name / "out" / "adapter.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def changed(base, tuned):
    with TensorReader(base) as before, TensorReader(tuned) as after:
        assert before.names == after.names
        return {name for name in before.names if not torch.equal(before.read(name), after.read(name))}


@pytest.mark.parametrize("format", list(ROWS))
def test_any_format_can_be_tuned_on(tmp_path, base, format):
    found = run(tmp_path, base, format)
    assert found["dev_loss"] > 0
    assert changed(base, tmp_path / "out")
    assert vocabulary_hash(tmp_path / "out") == vocabulary_hash(base)


@pytest.mark.parametrize(
    ("architecture", "positions", "formats"),
    [("encoder", "rotary", ("text", "labelled")), ("encoder-decoder", "relative", ("text", "pairs", "chat"))],
)
def test_encoders_and_encoder_decoders_are_tuned_too(tmp_path, architecture, positions, formats):
    tokenizer, ids = tokenizer_and_ids(tmp_path, size=500, sentinels=True)
    shape = Shape(32, 1, 2, len(tokenizer), 64, 0.0, ids)
    models.save(build(config_for(architecture, positions, shape)), tokenizer, tmp_path / "start")
    for format in formats:
        found = run(tmp_path / format, tmp_path / "start", format)
        assert found["dev_loss"] > 0
        assert changed(tmp_path / "start", tmp_path / format / "out")


def test_a_model_with_a_recurrent_state_is_tuned_on_one_document_a_row(tmp_path):
    tokenizer, _ = tokenizer_and_ids(tmp_path)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4)
    models.save(MambaForCausalLM(config), tokenizer, tmp_path / "start")
    assert run(tmp_path / "tuned", tmp_path / "start", length=32)["dev_loss"] > 0
    with pytest.raises(CannotCombine, match="a mask of its own"):
        run(tmp_path / "prefix", tmp_path / "start", length=32, objective="prefix")


def test_the_context_is_the_shortest_of_what_model_and_tokenizer_name(base):
    tokenizer = models.load_tokenizer(base)
    config = models.load_config(base)
    assert longest(config.to_dict(), tokenizer.model_max_length) == 64
    tokenizer.model_max_length = 50
    assert longest(config.to_dict(), tokenizer.model_max_length) == 50
    assert longest(MambaConfig().to_dict(), models.load_tokenizer(base).model_max_length) == 1024


def test_frozen_weights_stay_as_they_are_to_the_bit(tmp_path, base):
    found = run(tmp_path, base, method={"full": {"freeze": ["*embed_tokens*", "model.layers.0.*"]}})
    assert changed(base, tmp_path / "out")
    assert not any("layers.0." in name or "embed" in name for name in changed(base, tmp_path / "out"))
    assert 0 < found["trained_parameters"] < found["parameters"]


def test_only_what_is_named_is_trained(tmp_path, base):
    run(tmp_path, base, method={"full": {"only": ["*.mlp.down_proj.*"]}})
    assert changed(base, tmp_path / "out") == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}


def test_a_pattern_that_matches_nothing_is_refused_with_names_that_are_there():
    with pytest.raises(RequestError, match=r"matches none.*q_proj"):
        trained_names(["model.q_proj.weight"], ["*.k_proj.*"], [])


def test_freezing_everything_is_refused():
    with pytest.raises(RequestError, match="freeze all"):
        trained_names(["a", "b"], ["*"], [])


def test_wrong_settings_name_the_right_ones():
    with pytest.raises(UnknownName, match="did you mean 'full'"):
        VERB.parse({"from": "a", "data": "b", "method": "ful"})
    with pytest.raises(SettingsError, match="did you mean 'freeze'"):
        VERB.parse({"from": "a", "data": "b", "method": {"full": {"freze": []}}})
    with pytest.raises(SettingsError, match="one method"):
        VERB.parse({"from": "a", "data": "b", "method": {}})


def test_an_ensemble_has_no_weights_to_tune():
    facts = Facts("decoder", "i", "v", 10, 40, mergeable=False)
    (problem,) = VERB.check(VERB.parse({"from": "duo", "data": "b"}), {"duo": facts})
    assert "no weights of its own" in problem


def test_a_tuned_model_keeps_its_initialisation():
    facts = Facts("decoder", "i", "v", 10, 40)
    found = VERB.facts(VERB.parse({"from": "a", "data": "b"}), {"a": facts}, "key")
    assert (found.initialisation, found.vocabulary) == ("i", "v")


SMALL = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
KINDS = {
    "GPT2": {"vocab_size": 99, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "OPT": {**SMALL, "word_embed_proj_dim": 16, "ffn_dim": 16, "max_position_embeddings": 32},
    "Llama": {**SMALL, "max_position_embeddings": 32},
    "Bloom": {"vocab_size": 99, "hidden_size": 16, "n_layer": 1, "n_head": 2},
}


@pytest.mark.parametrize(("kind", "most"), [("GPT2", 32), ("OPT", 32), ("Llama", None), ("Bloom", None)])
def test_a_length_without_positions_for_it_is_refused_and_computed_positions_reach_any(kind, most):
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**KINDS[kind], **tokens, architectures=[f"{kind}ForCausalLM"])
    start = {"base": Facts("decoder", "i", "v", 10, 40, config.to_dict())}

    def said(length):
        return VERB.check(VERB.parse({"from": "base", "data": "d", "length": length}), start)

    assert said(32) == []
    wrong = f"expected a `length` of at most {most}, for which base has positions, found 33"
    assert said(33) == ([] if most is None else [wrong])


@pytest.mark.parametrize(("kind", "most"), [("GPT2", 32), ("Llama", None)])
def test_learned_tokens_and_their_text_need_positions_too(kind, most):
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**KINDS[kind], **tokens, architectures=[f"{kind}ForCausalLM"])
    start = {"base": Facts("decoder", "i", "v", 10, 40, config.to_dict())}

    def said(count, gate, **more):
        return VERB.check(
            VERB.parse({"from": "base", "data": "d", "method": {"prompt": {"length": count, "gate": gate}}, **more}),
            start,
        )

    assert said(32, True) == said(31, False) == said(5, False, length=27) == []
    many = said(33, True)
    assert (
        many == [] if most is None else ["a table, found a `length` that needs 33" in line for line in many] == [True]
    )
    assert said(32, False) == ["expected fewer than 32 learned positions, which is all base names, found 32"]
    wrong = (
        "expected a `length` of at most 27, for which base has positions beside the 5 that its method takes, found 28"
    )
    assert said(5, False, length=28) == ([] if most is None else [wrong])


STRETCHED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(("rope", "named"), [(None, 32), (STRETCHED, 128)])
def test_a_length_beyond_computed_positions_is_told_in_the_plan(rope, named):
    config = transformers.LlamaConfig(**KINDS["Llama"], rope_parameters=rope and {**rope, "rope_theta": 1e4})
    start = {"base": Facts("decoder", "i", "v", 10, 40, config.to_dict())}

    def noted(length):
        return VERB.estimate(VERB.parse({"from": "base", "data": "d", "length": length}), start).note

    assert f"base was made for {named} tokens, and `length` is {named + 1}" in noted(named + 1)
    assert "was made for" not in noted(named)
    assert "was made for" not in noted(None)


def test_it_is_told_at_the_start_too(tmp_path, base, capfd, monkeypatch):
    monkeypatch.delenv("GRAFT_QUIET", raising=False)
    run(tmp_path, base, length=128, budget="1 steps")
    assert "m: warning: base was made for 64 tokens, and `length` is 128" in capfd.readouterr().err
