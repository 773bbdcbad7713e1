"""An ensemble on disk: members named relatively or contained, hashes, Auto classes, the verb, fitted weights."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_members import TOKENS, five, prompts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import graft.data
from graft import lineage
from graft import models as graft_models
from graft.ensemble import VERB
from graft.ensemble.model import EnsembleForCausalLM, ensemble_of
from graft.errors import CannotCombine, CheckpointError, RequestError, SettingsError, UnknownName
from graft.facts import facts_of
from graft.verb import Job

LETTERS = "abcdefghijklmnopqrstuvwxyz .,\n"


def letters():
    vocabulary = {token: place for place, token in enumerate(["<pad>", "<bos>", "<eos>", *LETTERS])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of five members in one family's `models`."""
    root = tmp_path_factory.mktemp("family") / "models"
    for name, model in five().items():
        model.save_pretrained(root / name)
        letters().save_pretrained(root / name)
    return root


@pytest.fixture
def family(made, tmp_path):
    return shutil.copytree(made, tmp_path / "family" / "models")


def run(family, raw, data=None, name="duo", root=None):
    settings = VERB.parse(raw)
    out, target = family.parent / "work" / name / "out", family / name
    out.mkdir(parents=True)
    found = VERB.run(
        Job(
            name,
            settings,
            seed=0,
            out=out,
            scratch=out.parent / "scratch",
            cache=family.parent / "cache",
            models={member: family / member for member in settings.names},
            data={key: graft.data.parse(value) for key, value in (data or {}).items()},
            root=root or family.parent,
            target=target,
        )
    )
    out.rename(target)
    return target, found


@torch.no_grad()
def logits(model):
    ids, mask = prompts()
    return model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits


def test_the_verb_writes_a_folder_that_loads_as_the_ensemble(family):
    target, found = run(family, {"members": {"llama": 0.25, "gpt2": 0.75}})
    assert found["weights"] == {"llama": 0.25, "gpt2": 0.75}
    loaded = graft_models.load(target)
    alone = {name: graft_models.load(family / name) for name in ("llama", "gpt2")}
    assert torch.equal(logits(loaded), logits(ensemble_of(alone, [0.25, 0.75])))
    assert [entry["path"] for entry in loaded.config.members] == ["../llama", "../gpt2"]
    assert not list(target.glob("*.safetensors"))
    assert graft_models.load_tokenizer(target).encode("ab") == [3, 4]


def test_a_family_may_be_moved(family, tmp_path):
    target, _ = run(family, {"members": ["llama", "qwen"]})
    before = logits(graft_models.load(target))
    family.parent.rename(tmp_path / "moved")
    assert torch.equal(logits(graft_models.load(tmp_path / "moved" / "models" / "duo")), before)


def test_a_self_contained_folder_needs_no_other(family, tmp_path):
    target, _ = run(family, {"members": ["llama", "bloom"], "self_contained": True})
    before = logits(graft_models.load(target))
    shutil.copytree(target, tmp_path / "alone")
    shutil.rmtree(family)
    assert torch.equal(logits(graft_models.load(tmp_path / "alone")), before)


def test_an_ensemble_takes_along_what_its_tokenizer_and_processor_are_loaded_from(family):
    for name in ("tokenizer.model", "preprocessor_config.json", "notes.md"):
        (family / "llama" / name).write_text("{}")
    (family / "llama" / "additional_chat_templates").mkdir()
    (family / "llama" / "additional_chat_templates" / "short.jinja").write_text("{{ messages }}")
    target, _ = run(family, {"members": ["llama", "bloom"]})
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert {
        "tokenizer.json",
        "tokenizer.model",
        "preprocessor_config.json",
        "additional_chat_templates/short.jinja",
    } <= found
    assert "notes.md" not in found


@pytest.mark.parametrize("self_contained", [False, True])
def test_saving_and_loading_gives_the_same_logits(family, tmp_path, self_contained):
    target, _ = run(
        family, {"combine": {"experts": {"alpha": 0.5, "top_p": 0.9}}, "members": ["llama", "qwen", "gpt2"]}
    )
    loaded = graft_models.load(target)
    loaded.generation_config.max_new_tokens = 5
    loaded.save_pretrained(tmp_path / "copy", self_contained=self_contained)
    again = graft_models.load(tmp_path / "copy")
    assert torch.equal(logits(again), logits(loaded))
    assert again.generation_config.max_new_tokens == 5
    assert (tmp_path / "copy" / "members").exists() is self_contained


def test_an_ensemble_of_models_in_memory_is_saved_with_its_members(tmp_path):
    inner = ensemble_of({name: model for name, model in five().items() if name in ("llama", "gpt2")})
    outer = ensemble_of({"inner": inner, "qwen": five()["qwen"]}, [0.5, 0.5])
    with pytest.raises(RequestError, match="lies in no folder"):
        outer.save_pretrained(tmp_path / "no")
    outer.save_pretrained(tmp_path / "yes", self_contained=True)
    assert torch.equal(logits(graft_models.load(tmp_path / "yes")), logits(outer))


def test_a_nested_ensemble_is_a_folder_of_folders(family):
    run(family, {"members": ["llama", "gpt2"]})
    target, _ = run(family, {"members": {"duo": 0.5, "qwen": 0.5}}, name="trio")
    flat, _ = run(family, {"members": {"llama": 0.25, "gpt2": 0.25, "qwen": 0.5}}, name="flat")
    assert torch.allclose(logits(graft_models.load(target)), logits(graft_models.load(flat)), atol=1e-5)


@pytest.mark.parametrize("inner", [False, True])
def test_a_self_contained_ensemble_of_ensembles_needs_no_other(family, tmp_path, inner):
    run(family, {"members": ["llama", "gpt2"], "self_contained": inner})
    run(family, {"members": {"duo": 0.5, "qwen": 0.5}}, name="trio")
    raw = {"members": {"trio": 0.5, "duo": 0.2, "gpt2": 0.3}, "self_contained": True}
    target, _ = run(family, raw, name="all")
    plain, _ = run(family, {**raw, "self_contained": False}, name="plain")
    before = logits(graft_models.load(plain))
    assert torch.equal(logits(graft_models.load(target)), before)
    weights = list(target.rglob("model.safetensors"))
    assert len(weights) == (4 if inner else 3)
    graft_models.load(plain).save_pretrained(tmp_path / "saved", self_contained=True)
    shutil.copytree(target, tmp_path / "alone")
    shutil.rmtree(family)
    for place in ("alone", "saved"):
        assert torch.equal(logits(graft_models.load(tmp_path / place)), before)


def test_copying_an_ensemble_whose_member_has_changed_is_refused(family):
    run(family, {"members": ["llama", "gpt2"]})
    graft_models.load(family / "qwen").save_pretrained(family / "llama")
    with pytest.raises(CheckpointError, match="member 'llama' has changed since"):
        run(family, {"members": ["duo", "qwen"], "self_contained": True}, name="all")


def test_a_member_that_is_missing_is_named(family):
    target, _ = run(family, {"members": ["llama", "qwen"]})
    shutil.rmtree(family / "qwen")
    with pytest.raises(CheckpointError, match=r"member 'qwen' is missing: expected a model in .*qwen"):
        graft_models.load(target)


def test_a_member_that_has_changed_is_named(family):
    target, _ = run(family, {"members": ["llama", "qwen"]})
    changed = graft_models.load(family / "qwen")
    changed.lm_head.weight.data[0, 0] += 1
    changed.save_pretrained(family / "qwen")
    with pytest.raises(CheckpointError, match=r"member 'qwen' has changed .*make the ensemble anew"):
        graft_models.load(target)


AUTO = """
import sys
{first}
{second}
assert "{light}" == "" or "torch" not in sys.modules
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model).__name__, AutoConfig.from_pretrained(sys.argv[1]).model_type)
print(*sorted(known.__name__ for known in AutoModelForCausalLM._model_mapping._extra_content))
"""


@pytest.mark.parametrize(
    ("first", "second", "light"),
    [
        ("import graft", "", "light"),
        ("import graft", "import transformers", ""),
        ("import transformers", "import graft", ""),
        ("import graft.ensemble.base", "", ""),
    ],
)
def test_the_auto_classes_know_ensembles_after_import_graft(family, first, second, light, fresh):
    target, _ = run(family, {"members": ["llama", "qwen"]})
    program = AUTO.format(first=first, second=second, light=light)
    if light:
        done = subprocess.run([sys.executable, "-c", program, str(target)], capture_output=True, text=True)
    else:
        done = fresh.run(program, target)
    found = ["EnsembleForCausalLM", "graft_ensemble", "AdaptedConfig", "ByteEnsembleConfig", "EnsembleConfig"]
    assert done.stdout.split() == found, done.stderr


CONFIGURATIONS = """
import sys
{first}
{second}
from transformers import AutoConfig
print(*(AutoConfig.from_pretrained(folder).model_type for folder in sys.argv[1:]))
print(any("transformers.models.auto.modeling" in name for name in sys.modules))
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("import graft", ""),
        ("from transformers import AutoConfig", "import graft"),
        ("import graft.ensemble.byte_level.configuration", "import graft"),
        ("import graft.ensemble.configuration", ""),
    ],
)
def test_configurations_are_known_before_any_model_class_is(family, first, second, tmp_path, fresh):
    target, _ = run(family, {"members": ["llama", "qwen"]})
    of_bytes, _ = run(family, {"members": ["llama", "qwen"], "vocabulary": "bytes"}, name="bytes")
    (tmp_path / "config.json").write_text('{"model_type": "graft_adapted"}')
    program = CONFIGURATIONS.format(first=first, second=second)
    done = fresh.run(program, target, of_bytes, tmp_path)
    assert done.stdout.split() == ["graft_ensemble", "graft_byte_ensemble", "graft_adapted", "False"], done.stderr


def test_dtype_reaches_the_members_and_the_mixture_stays_float32(family):
    target, _ = run(family, {"members": ["llama", "qwen"]})
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.members.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == torch.float32
    assert isinstance(model, EnsembleForCausalLM)


def test_what_an_ensemble_cannot_honour_is_refused(family):
    target, _ = run(family, {"members": ["llama", "qwen"]})
    with pytest.raises(RequestError, match="cannot honour quantization_config: quantise its members"):
        EnsembleForCausalLM.from_pretrained(target, quantization_config={"load_in_4bit": True})
    for several in ({"members.0": "cpu", "members.1": "cpu"}, "balanced"):
        with pytest.raises(RequestError, match="expected one device for an ensemble, found device_map="):
            EnsembleForCausalLM.from_pretrained(target, device_map=several)
    with pytest.raises(RequestError, match="expected one device for an ensemble, found device_map='disk'"):
        EnsembleForCausalLM.from_pretrained(target, device_map="disk")


def facts(family, *names):
    return {name: facts_of(family / name) for name in names}


def test_different_vocabularies_are_refused(family):
    tokenizer = json.loads((family / "qwen" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (family / "qwen" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (problem,) = VERB.check(VERB.parse({"members": ["llama", "qwen"]}), facts(family, "llama", "qwen"))
    assert "qwen and llama have different vocabularies" in problem


def test_weights_are_checked_before_anything_runs(family):
    (problem,) = VERB.check(VERB.parse({"members": {"llama": 0.5, "qwen": 0.6}}), facts(family, "llama", "qwen"))
    assert "must sum to one" in problem
    settings = VERB.parse({"combine": "log_linear", "members": {"llama": -1, "qwen": -0.5}})
    (problem,) = VERB.check(settings, facts(family, "llama", "qwen"))
    assert "at least one weight above zero" in problem


def test_an_ensemble_cannot_have_its_weights_averaged(family):
    settings = VERB.parse({"members": ["llama", "qwen"]})
    found = VERB.facts(settings, facts(family, "llama", "qwen"), "key")
    assert not found.mergeable
    assert found.parameters == sum(f.parameters for f in facts(family, "llama", "qwen").values())


def test_misspelt_rules_and_options_show_the_right_ones():
    with pytest.raises(UnknownName, match="did you mean 'log_linear'"):
        VERB.parse({"combine": "loglinear", "members": ["a", "b"]})
    with pytest.raises(SettingsError, match="did you mean 'alpha'"):
        VERB.parse({"combine": {"experts": {"alfa": 1}}, "members": ["a", "b", "c"]})
    with pytest.raises(SettingsError, match="each member once"):
        VERB.parse({"members": ["a", "a"]})


def lines(path, count, start=0):
    texts = [
        f"the line number {chr(97 + i % 26)}{chr(97 + i // 26)}, and again.\n" for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"source": "jsonl", "path": str(path), "splits": {"dev": 0.5, "test": 0.1}}


def test_weights_are_fitted_on_what_the_members_give_the_text(family):
    raw = {"members": ["llama", "gpt2", "mistral"], "weights": {"fit": "text.dev"}}
    target, found = run(family, raw, {"text": lines(family / "text.jsonl", 60)})
    weights = np.array(list(found["weights"].values()))
    assert weights.sum() == pytest.approx(1)
    assert graft_models.load(target).config.weights == weights.tolist()
    losses = list(found["member_losses"].values())
    for weight, loss in zip(weights, losses, strict=True):
        assert weight == 0 or found["loss"] <= loss - np.log(weight) + 1e-9
    assert found["loss"] <= min(losses) + 1e-6
    assert found["error_correlation"]["llama"]["llama"] == pytest.approx(1)
    assert found["error_correlation"]["gpt2"]["llama"] == found["error_correlation"]["llama"]["gpt2"]
    gained = sum(each["shapley"] for each in found["contributions"].values())
    assert gained == pytest.approx(np.log(TOKENS) - found["loss"], abs=1e-3)


def test_fitting_on_text_that_a_member_was_trained_on_is_refused(family):
    source = lines(family / "text.jsonl", 60)
    corpus = graft.data.open_corpus({"text": graft.data.parse(source)}, "text", family.parent)
    lineage.write_manifest(
        family / "llama",
        lineage.Manifest(
            name="llama",
            verb="pretrain",
            verb_version=1,
            key="k",
            data=[lineage.DataUse(name="other", split="train", fingerprint=corpus.fingerprint)],
            hash="h",
            initialisation="i",
            vocabulary="v",
            architecture="decoder",
            parameters=1,
        ),
    )
    with pytest.raises(
        CannotCombine, match=r"llama was trained on other.train: .* fit them on held-out text \(other.dev\)"
    ):
        run(family, {"members": ["llama", "gpt2"], "weights": {"fit": "text.train"}}, {"text": source})


def test_weights_of_a_product_are_fitted_to_a_mixture_of_texts(family):
    # qwen's folders are read with another tokenizer class by transformers
    raw = {"combine": "log_linear", "members": ["llama", "gpt2", "mistral"], "weights": {"fit": "both.dev"}}
    sets = {
        "one": lines(family / "one.jsonl", 30),
        "two": lines(family / "two.jsonl", 60, start=300),
        "both": {"mix": {"one": 0.5, "two": 0.5}},
    }
    target, found = run(family, raw, sets)
    assert found["loss"] <= min(found["member_losses"].values())
    assert graft_models.load(target).config.weights == list(found["weights"].values())


def test_only_rules_with_free_weights_are_fitted(family):
    settings = VERB.parse({"combine": "contrastive", "members": ["llama", "qwen"], "weights": {"fit": "text.dev"}})
    (problem,) = VERB.check(settings, facts(family, "llama", "qwen"))
    assert "fitted for linear and log_linear, found 'contrastive'" in problem


def test_a_gate_is_fitted_from_a_recipe_and_stands_in_the_folder(family):
    raw = {"members": ["llama", "gpt2"], "weights": {"fit": "text.dev", "gate": 0}}
    target, found = run(family, raw, {"text": lines(family / "text.jsonl", 60)})
    assert found["loss"] <= found["loss_without_gate"] + 1e-3
    assert graft_models.load(target).gate.outer.weight.shape == (2, 4)
    settings = VERB.parse({**raw, "combine": "log_linear"})
    (problem,) = VERB.check(settings, facts(family, "llama", "gpt2"))
    assert "a gate gives the weights of a mixture" in problem


def test_the_draft_of_a_recipe_drafts(family):
    target, _ = run(family, {"members": ["llama", "gpt2"], "draft": "gpt2"})
    loaded = graft_models.load(target)
    ids, _ = prompts(1, 9, ())
    plain = loaded.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=None)
    assert torch.equal(loaded.speculate(ids, max_new_tokens=8).sequences, plain)
    with pytest.raises(SettingsError, match=r"a member as draft \(llama, gpt2\), found 'qwen'"):
        VERB.parse({"members": ["llama", "gpt2"], "draft": "qwen"})
    alone = ensemble_of({"llama": loaded.members[0]}).speculate(ids, max_new_tokens=8).sequences
    assert torch.equal(alone, loaded.members[0].generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=None))


def test_a_gate_that_looks_at_one_member_is_fitted_from_a_recipe(family):
    gate = {"hidden_states": True, "looks_at": ["llama"], "skip": 0.05}
    raw = {"members": ["gpt2", "llama", "mistral"], "weights": {"fit": "text.dev", "gate": gate}}
    target, found = run(family, raw, {"text": lines(family / "text.jsonl", 60)})
    loaded = graft_models.load(target)
    assert loaded.gate.looks_at == [1]
    assert (loaded.gate.states, loaded.gate.skip) == (True, 0.05)
    assert found["loss"] < found["loss_without_gate"]
    assert found["needed"]["llama"] <= 1
    assert set(found["needed"]) == {"gpt2", "llama", "mistral"}


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ({"skip": 0.1}, "set `looks_at`"),
        ({"skip": 0.1, "looks_at": ["llama", "qwen"]}, "set `looks_at`"),
        ({"skip": 0.5, "looks_at": ["llama"]}, "expected `skip` below 1 / 2"),
    ],
)
def test_a_gate_that_could_leave_out_nobody_or_everybody_is_refused(family, gate, words):
    settings = VERB.parse({"members": ["llama", "qwen"], "weights": {"fit": "text.dev", "gate": gate}})
    (problem,) = VERB.check(settings, facts(family, "llama", "qwen"))
    assert words in problem


def test_a_gate_may_only_look_at_members():
    with pytest.raises(SettingsError, match=r"expected a member that the gate looks at \(a, b\), found 'c'"):
        VERB.parse({"members": ["a", "b"], "weights": {"fit": "text.dev", "gate": {"looks_at": ["c"]}}})
