"""What is wrong is said, with what was expected, what was found and what to do: in memory, in recipes, on the command
line, for every kind of ensemble."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from test_classification import bert
from test_ensemble_folder import facts, family, letters, made, run  # noqa: F401
from test_gate import gated
from test_seq2seq import bart, source, t5
from test_union import UNION
from tiny_members import gpt2, llama, prompts, qwen
from typer.testing import CliRunner

import graft
from graft import models
from graft.cli import app
from graft.ensemble import VERB
from graft.ensemble.gate import Gate
from graft.ensemble.model import ensemble_of
from graft.ensemble.sources import short_names
from graft.errors import CheckpointError, RequestError, RunError, SettingsError
from graft.verbs import verb


def command(family, *words):  # noqa: F811
    """Exit code and message of `graft ensemble`."""
    done = CliRunner().invoke(app, ["ensemble", str(family.parent / "made"), *words, "--json"])
    return done.exit_code, json.loads(done.stdout)["error"]


def other_letters(folder):
    """The same signs under other numbers."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_mismatched_vocabularies(family):  # noqa: F811
    other_letters(family / "gpt2")
    (problem,) = VERB.check(VERB.parse({"members": ["llama", "gpt2"]}), facts(family, "llama", "gpt2"))
    assert problem.startswith("gpt2 and llama have different vocabularies: their predictions cannot be matched token")
    assert "vocabulary: union" in problem
    code, message = command(family, str(family / "llama"), str(family / "gpt2"))
    assert code == 2
    assert "have different vocabularies" in message


def test_weights_that_do_not_sum_to_one_with_the_normalised_ones(family):  # noqa: F811
    words = r"the weights of a mixture must sum to one, found \[0\.5, 0\.75\], which sum to 1\.25; normalised they are "
    with pytest.raises(RequestError, match=words + r"\[0\.4, 0\.6\]"):
        ensemble_of({"a": llama(), "b": gpt2()}, [0.5, 0.75])
    code, message = command(family, f"{family / 'llama'}=0.5", f"{family / 'gpt2'}=0.75")
    assert code == 2
    assert "normalised they are [0.4, 0.6]" in message
    with pytest.raises(RequestError, match=r"weights of zero or more, found .*log_linear allows negative ones"):
        ensemble_of({"a": llama(), "b": gpt2()}, [1.5, -0.5])


@pytest.mark.parametrize("written", [[1], [0.5, 0.5], {"a": 0.5, "b": 0.5}, 1])
def test_numbers_in_the_place_of_fitted_weights_are_told_where_they_stand(written):
    with pytest.raises(SettingsError) as error:
        VERB.parse({"members": ["a", "b"], "weights": written})
    (problem,) = error.value.problems
    assert str(problem) == (
        f"weights: expected `uniform` or `{{fit: DATA.dev}}`, found {written!r}; numbers stand beside the members: "
        "`members: {a: 0.5, b: 0.5}`"
    )
    with pytest.raises(SettingsError, match=r"weights.fit: this key is required and missing"):
        VERB.parse({"members": ["a", "b"], "weights": {"documents": 3}})


def test_a_product_of_negative_weights_only(family):  # noqa: F811
    with pytest.raises(RequestError, match=r"a product needs at least one weight above zero, found \[-1\.0, -0\.5\]"):
        ensemble_of({"a": llama(), "b": gpt2()}, [-1, -0.5], "log_linear")
    code, message = command(family, f"{family / 'llama'}=-1", f"{family / 'gpt2'}=-0.5", "--combine", "log_linear")
    assert code == 2
    assert "at least one weight above zero" in message


def test_a_member_that_is_missing_or_has_changed_since(family):  # noqa: F811
    target, _ = run(family, {"members": ["llama", "gpt2"]})
    changed = models.load(family / "gpt2")
    with torch.no_grad():
        next(changed.parameters())[0, 0] += 1
    changed.save_pretrained(family / "gpt2")
    with pytest.raises(CheckpointError, match=r"member 'gpt2' has changed .*\(hash .*, expected .*\): make the"):
        models.load(target)
    shutil.rmtree(family / "gpt2")
    with pytest.raises(CheckpointError, match=r"member 'gpt2' is missing: expected a model in .*gpt2"):
        models.load(target)


def broken(model):
    """A model of which a weight of the last layer is NaN."""
    with torch.no_grad():
        list(model.parameters())[-1].fill_(float("nan"))
    return model


@pytest.mark.parametrize("kind", ["decoders", "gated", "outputs", "translators", "classifiers"])
def test_nan_logits_of_a_member_name_it(kind):
    ids, mask = prompts()
    rule, given = ("least_risk", {"tokenizer": letters()}) if kind == "outputs" else ("linear", {})
    fine, bad = {
        "translators": (t5(1), broken(bart(2))),
        "classifiers": (bert(1), broken(bert(2))),
    }.get(kind, (llama(), broken(qwen())))
    pair = {"fine": fine, "bad": bad}
    ensemble = gated(pair, Gate(2)) if kind == "gated" else ensemble_of(pair, [0.5, 0.5], rule)
    with pytest.raises(RunError, match=r"member 'bad' \(.*\) gives NaN logits: check its weights"):
        if kind == "classifiers":
            ensemble(input_ids=ids, attention_mask=mask)
        else:
            ensemble.generate(ids, attention_mask=mask, max_new_tokens=2, **given)


@pytest.mark.parametrize("rule", ["linear", "log_linear", "majority", "ranked", "contrastive"])
def test_nan_of_a_classifier_is_no_vote(rule):
    ids, mask = prompts()
    with pytest.raises(RunError, match=r"member 'bad' \(.*\) gives NaN logits: check its weights"):
        ensemble_of({"fine": bert(1), "bad": broken(bert(2))}, combine=rule)(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("rule", ["linear", "least_risk"])
def test_a_context_longer_than_a_member_was_made_for(rule):
    ensemble = ensemble_of({"far": qwen(), "near": gpt2()}, [0.5, 0.5], rule)
    ids, _ = prompts(1, 60, ())
    given = {"tokenizer": letters()} if rule == "least_risk" else {}
    with pytest.raises(RequestError, match=r"member 'near' was made for 64 tokens, found a context of \d+: shorten it"):
        ensemble.generate(ids, max_new_tokens=20, eos_token_id=None, **given)


def test_sources_and_targets_longer_than_a_translator_was_made_for():
    near = bart(3, max_position_embeddings=64)
    ensemble = ensemble_of({"far": t5(1), "near": near})
    long, short = prompts(1, 70, ())[0], prompts(1, 7, ())[0]
    words = r"member 'near' was made for 64 tokens, found a context of \d+: shorten it"
    with pytest.raises(RequestError, match=words):
        ensemble.generate(long, max_new_tokens=2)
    with pytest.raises(RequestError, match=words):
        ensemble(input_ids=short, decoder_input_ids=long)
    with pytest.raises(RequestError, match=words):
        ensemble.generate(short, max_new_tokens=80, eos_token_id=None)
    assert ensemble_of({"far": t5(1), "other": t5(2)}).generate(long, max_new_tokens=2).shape[0] == 1


def test_a_union_refuses_what_other_ensembles_refuse():
    members = {"left": llama(1, tokens=9), "right": llama(2, tokens=9)}
    ensemble = ensemble_of(members, [0.5, 0.5], union=UNION)
    with pytest.raises(RequestError, match="expected a token in every prompt"):
        ensemble.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2)
    with pytest.raises(RequestError, match=r"member '\w+' was made for 64 tokens, found a context of \d+"):
        ensemble(input_ids=torch.full((1, 70), 3))
    with pytest.raises(RequestError, match="speculation needs members of one vocabulary, found a union"):
        ensemble.speculate(torch.tensor([[3]]), max_new_tokens=2)
    broken(members["right"])
    with pytest.raises(RunError, match=r"member 'right' .*gives NaN logits"):
        ensemble(input_ids=torch.tensor([[1, 3]]))


@pytest.mark.parametrize("rule", ["linear", "majority"])
@pytest.mark.parametrize("kind", ["decoders", "translators"])
def test_an_empty_prompt_in_a_batch_names_its_row(rule, kind):
    ids, mask = prompts(3, 7, (0, 7, 0))
    pair = (llama(), gpt2()) if kind == "decoders" else (t5(1), t5(2))
    ensemble = ensemble_of(dict(zip("ab", pair, strict=True)), [0.5, 0.5], rule)
    with pytest.raises(RequestError, match=r"expected a token in every prompt, found none in rows \[1\]"):
        ensemble.generate(ids, attention_mask=mask, max_new_tokens=2)


def test_members_of_several_kinds(family):  # noqa: F811
    for pair, words in [
        ((t5(1), llama()), "found encoder-decoders beside decoders"),
        ((llama(), bert(1)), "found decoders beside classifiers"),
        ((bert(1), t5(1)), "found classifiers beside encoder-decoders"),
    ]:
        with pytest.raises(RequestError, match=f"expected members of one kind, {words}: leave one kind out"):
            ensemble_of(dict(zip("ab", pair, strict=True)))
    t5(1).save_pretrained(family / "t5")
    letters().save_pretrained(family / "t5")
    (problem,) = VERB.check(VERB.parse({"members": ["llama", "t5"]}), facts(family, "llama", "t5"))
    assert problem == "t5 is an encoder-decoder and llama is a decoder"
    code, message = command(family, str(family / "llama"), str(family / "t5"))
    assert (code, "t5 is an encoder-decoder" in message) == (2, True)


def test_a_rule_that_is_misspelt_and_a_member_that_is_not_there(family):  # noqa: F811
    code, message = command(family, str(family / "llama"), str(family / "gpt2"), "--combine", "liner")
    assert code == 2
    assert "did you mean 'linear'" in message
    code, message = command(family, str(family / "llama"), str(family / "nobody"))
    assert code == 2
    assert f"found none at {family / 'nobody'}; a model on the hub" in message
    code, message = command(family, str(family / "lama"), str(family / "gpt2"))
    assert code == 2
    assert f"found none at {family / 'lama'} (did you mean {str(family / 'llama')!r}?); a model on the hub" in message
    with pytest.raises(RequestError, match=r"found none \(did you mean '.*llama'\?\); one on the hub"):
        models.load(family / "lama")
    with pytest.raises(RequestError, match=r"found none \(did you mean '.*llama'\?\); for a"):
        verb("load").located(verb("load").parse("lama"), family)


def test_a_translators_batch_is_otherwise_fine():
    ids, mask = source()
    found = ensemble_of({"a": t5(1), "b": t5(2)}).generate(ids, attention_mask=mask, max_new_tokens=2)
    assert found.shape[0] == 3


@torch.no_grad()
def test_members_named_by_their_folders_have_the_folders_names(family):  # noqa: F811
    shutil.copytree(family / "llama", family / "inner" / "gpt2")
    out, other = family.parent / "duo", family.parent / "trio"
    small = str(family / "llama")
    words = [small, str(family / "gpt2"), "--self-contained", "true", "--draft", small]
    assert CliRunner().invoke(app, ["ensemble", str(out), *words]).exit_code == 0
    assert sorted(place.name for place in (out / "members").iterdir()) == ["gpt2", "llama"]
    loaded = models.load(out)
    assert [entry["name"] for entry in loaded.config.members] == ["llama", "gpt2"]
    ids, _ = prompts(1, 7, ())
    assert loaded.speculate(ids, max_new_tokens=3).sequences.shape == (1, 10)
    same = [str(family / "gpt2"), str(family / "inner" / "gpt2")]
    assert CliRunner().invoke(app, ["ensemble", str(other), *same]).exit_code == 0
    names = [entry["name"] for entry in models.load(other).config.members]
    assert names == [f"{family.name}-gpt2", "inner-gpt2"]


def test_members_are_named_by_as_much_of_their_paths_as_tells_them_apart():
    def called(*paths):
        return list(short_names(paths).values())

    assert called("/a/models/coder", "b/writer") == ["coder", "writer"]
    assert called("/a/models/gpt2", "/a/models/inner/gpt2") == ["models-gpt2", "inner-gpt2"]
    assert called("/models/gpt2", "/other/models/gpt2") == ["models-gpt2", "other-models-gpt2"]
    assert called("gpt2", "inner/gpt2", "./one/gpt2/") == ["gpt2", "inner-gpt2", "one-gpt2"]
    assert called(".", "gpt2") == [Path.cwd().name, "gpt2"]
    assert called("../gpt2", "gpt2") == [f"{Path.cwd().parent.name}-gpt2", "gpt2"]


@pytest.mark.parametrize("ways", [("llama", "./llama"), ("llama", "inner/../llama"), ("llama", "llama")])
def test_a_folder_that_is_written_in_two_ways_is_one_member(family, ways, monkeypatch):  # noqa: F811
    monkeypatch.chdir(family)
    first, second = ways
    what = rf"'{first}' and '{second}', which are one folder" if first != second else "'llama' twice"
    for members in ([first, second], {first: 0.5, second: 0.5} if first != second else [first, {"model": second}]):
        with pytest.raises(SettingsError, match=rf"expected each member once, found {re.escape(what)}: name it once"):
            graft.ensemble(family.parent / "duo", members=members)
    code, message = command(family, f"{first}=0.5", f"{second}=0.5")
    assert code == 2
    assert ("llama' twice in llama=0.5 llama=0.5" if first == second else "which are one folder") in message
    assert not (family.parent / "duo").exists()


def test_a_link_to_a_folder_is_another_member_and_one_folder_in_two_types_needs_one(family, monkeypatch):  # noqa: F811
    monkeypatch.chdir(family)
    Path("again").symlink_to("llama")
    twins = graft.ensemble(family.parent / "twins", members=["llama", "again"])
    assert [entry["name"] for entry in models.load(twins).config.members] == ["llama", "again"]
    typed = [{"model": "llama", "dtype": "bfloat16"}, "llama"]
    with pytest.raises(SettingsError, match="expected members of different names, found llama twice: name one by a"):
        graft.ensemble(family.parent / "typed", members=typed)
    typed[1] = "again"
    assert models.load(graft.ensemble(family.parent / "typed", members=typed)).config.members[1]["name"] == "again"
