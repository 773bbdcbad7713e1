import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_family import family, merge, model, save, tensors
from transformers import GPT2Config, GPT2LMHeadModel

import graft.merge
from graft.errors import CannotCombine, CheckpointError, UnknownName
from graft.merge.telling import lines
from graft.models import load, load_tokenizer
from graft.verb import Facts


def test_a_soup_is_the_weighted_mean_and_loads(folders, tmp_path):
    out, found = merge({"method": "linear", "models": {"a": 1, "b": 3}}, folders, tmp_path / "soup")
    a, b = tensors(folders["a"]), tensors(folders["b"])
    assert out.keys() == a.keys()
    for name in out:
        torch.testing.assert_close(out[name], 0.25 * a[name] + 0.75 * b[name], rtol=1e-6, atol=1e-7)
    assert load(tmp_path / "soup").num_parameters() == load(folders["a"]).num_parameters()
    assert load_tokenizer(tmp_path / "soup").get_vocab() == load_tokenizer(folders["a"]).get_vocab()
    assert found["notes"]["verified_as"] == "LlamaForCausalLM"
    assert found["forced"] == []


def test_the_configuration_and_the_tokenizer_are_the_bases_and_that_is_noted(folders, tmp_path):
    own = {name: shutil.copytree(folder, tmp_path / name) for name, folder in folders.items()}
    (own["base"] / "chat_template.jinja").write_text("{{ messages }}")
    _, found = merge({"method": "ties", "base": "base", "models": ["a", "b"]}, own, tmp_path / "out")
    assert found["notes"]["config_from"] == "base"
    assert "chat_template.jinja" in found["notes"]["files_taken"]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_shards_of_any_size_come_in_and_go_out(folders, tmp_path):
    sharded = save(load(folders["a"]), tmp_path / "a", max_shard_size="10KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole, _ = merge({"method": "linear", "models": ["a", "b"]}, folders, tmp_path / "whole")
    parts, _ = merge(
        {"method": "linear", "models": ["a", "b"], "shard": "8KB"}, folders | {"a": sharded}, tmp_path / "parts"
    )
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert (tmp_path / "parts" / "model.safetensors.index.json").is_file()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    load(tmp_path / "parts")


def test_the_dtype_is_the_bases_unless_another_is_asked_for(folders, tmp_path):
    half = {name: save(load(folders[name]), tmp_path / name, dtype=torch.bfloat16) for name in ("a", "b")}
    kept, _ = merge({"method": "linear", "models": ["a", "b"]}, half, tmp_path / "kept")
    asked, _ = merge({"method": "linear", "models": ["a", "b"], "dtype": "float32"}, half, tmp_path / "asked")
    assert {t.dtype for t in kept.values()} == {torch.bfloat16}
    assert {t.dtype for t in asked.values()} == {torch.float32}
    assert load(tmp_path / "kept").dtype == torch.bfloat16
    assert load(tmp_path / "asked").dtype == torch.float32
    for name in kept:
        assert torch.equal(kept[name], asked[name].bfloat16())


def test_parents_may_have_different_dtypes(folders, tmp_path):
    mixed = folders | {"b": save(load(folders["b"]), tmp_path / "b", dtype=torch.float16)}
    out, _ = merge({"method": "linear", "models": ["a", "b"]}, mixed, tmp_path / "out")
    a, b = tensors(folders["a"]), tensors(tmp_path / "b")
    assert all(torch.equal(out[n], (a[n] * 0.5).add(b[n].float(), alpha=0.5)) for n in out)


def test_tied_weights_stay_tied(tmp_path):
    tied = family(tmp_path, 2, tie_word_embeddings=True)
    out, _ = merge({"method": "linear", "models": ["a", "b"]}, tied, tmp_path / "out")
    assert "lm_head.weight" not in out
    merged = load(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_a_tied_and_an_untied_parent_give_an_untied_model(tmp_path):
    base = model(0, tie_word_embeddings=True)
    untied = model(1)
    untied.load_state_dict(base.state_dict())
    with torch.no_grad():
        untied.lm_head.weight.add_(0.01)
    both = {"a": save(base, tmp_path / "a"), "b": save(untied, tmp_path / "b")}
    out, found = merge({"method": "linear", "models": ["a", "b"]}, both, tmp_path / "out")
    embed, head = base.model.embed_tokens.weight, untied.lm_head.weight
    torch.testing.assert_close(out["lm_head.weight"], (embed + head).detach() / 2)
    assert not load(tmp_path / "out").config.tie_word_embeddings
    assert "tie_word_embeddings True and False" in found["notes"]["config_differences"]["b"]


def test_settings_that_change_the_meaning_are_listed(tmp_path):
    base = model(0)
    other = model(1, near=base, max_position_embeddings=64, rms_norm_eps=1e-5)
    both = {"a": save(base, tmp_path / "a"), "b": save(other, tmp_path / "b")}
    _, found = merge({"method": "linear", "models": ["a", "b"]}, both, tmp_path / "out")
    assert found["notes"]["config_differences"] == {
        "b": ["max_position_embeddings 32 and 64", "rms_norm_eps 1e-06 and 1e-05"]
    }


def test_another_shape_is_refused_before_anything_is_written(folders, tmp_path):
    wide = folders | {"w": save(model(0, intermediate_size=32), tmp_path / "w")}
    with pytest.raises(CannotCombine, match="w and a differ in shape: intermediate_size 24 and 32; an ensemble"):
        merge({"method": "linear", "models": ["a", "w"]}, wide, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_another_vocabulary_is_refused(folders, tmp_path):
    other = folders | {"w": save(model(0, vocab_size=64), tmp_path / "w", words=64)}
    with pytest.raises(CannotCombine, match="different vocabularies"):
        merge({"method": "linear", "models": ["a", "w"]}, other, tmp_path / "out")
    with pytest.raises(CannotCombine, match=r"embed_tokens.weight is \[48, 16\] in a, \[64, 16\] in w"):
        merge({"method": "linear", "models": ["a", "w"], "anyway": True}, other, tmp_path / "out")


def test_another_initialisation_is_found_by_the_weights(folders, tmp_path):
    stranger = folders | {"s": save(model(99), tmp_path / "s")}
    with pytest.raises(CannotCombine, match=r"correlation of -?0\.0.*different initialisations.*ensemble"):
        merge({"method": "linear", "models": ["a", "s"]}, stranger, tmp_path / "out")
    _, found = merge({"method": "linear", "models": ["a", "s"], "anyway": True}, stranger, tmp_path / "forced")
    assert "s and a have a correlation" in found["forced"][0]
    _, found = merge({"method": "linear", "models": ["a", "b"]}, stranger, tmp_path / "fine")
    assert found["notes"]["correlation_of_weights"]["b"] > 0.3


def test_a_missing_tensor_is_named(folders, tmp_path):
    short = shutil.copytree(folders["b"], tmp_path / "b")
    kept = {n: t for n, t in load_file(short / "model.safetensors").items() if n != "model.norm.weight"}
    save_file(kept, short / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CannotCombine, match=r"b lacks a tensor that other parents have: model.norm.weight"):
        merge({"method": "linear", "models": ["a", "b"]}, folders | {"b": short}, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"would not fit LlamaForCausalLM: missing 1: model.norm.weight"):
        merge({"method": "passthrough", "models": ["b"]}, {"b": short}, tmp_path / "out")


def test_a_truncated_parent_is_named(folders, tmp_path):
    torn = shutil.copytree(folders["b"], tmp_path / "b")
    content = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        merge({"method": "linear", "models": ["a", "b"]}, folders | {"b": torn}, tmp_path / "out")


def test_names_without_the_prefix_of_the_head_fit_as_well(tmp_path):
    torch.manual_seed(0)
    made = GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    folder = save(made, tmp_path / "a")
    bare = {n.removeprefix("transformer."): t for n, t in tensors(folder).items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    _, found = merge({"method": "linear", "models": ["a"]}, {"a": folder}, tmp_path / "out")
    assert found["notes"]["verified_as"] == "GPT2LMHeadModel"
    ids = torch.tensor([[3, 5, 7]])
    torch.testing.assert_close(load(tmp_path / "out")(ids).logits, made.eval()(ids).logits)


def test_whole_numbers_are_taken_over_and_must_agree(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(graft.merge.stream, "COPIED", 8)
    own = {name: shutil.copytree(folders[name], tmp_path / name) for name in ("a", "b")}
    for number, folder in enumerate(own.values()):
        held = load_file(folder / "model.safetensors") | {"model.steps": torch.tensor([7, 8, number])}
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CannotCombine, match=r"model.steps holds whole numbers that differ between a, b"):
        merge({"method": "linear", "models": ["a", "b"]}, own, tmp_path / "out")
    out, _ = merge({"method": "linear", "models": ["a"]}, own, tmp_path / "one")
    assert out["model.steps"].tolist() == [7, 8, 0]


def test_layers_of_two_models_are_stacked(folders, tmp_path):
    slices = [{"a": [0, 2]}, {"b": [1, 2]}]
    out, _ = merge({"method": "passthrough", "slices": slices}, folders, tmp_path / "stack")
    a, b = tensors(folders["a"]), tensors(folders["b"])
    stacked = load(tmp_path / "stack")
    assert stacked.config.num_hidden_layers == 3
    assert torch.equal(out["model.layers.1.mlp.up_proj.weight"], a["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(out["model.layers.2.mlp.up_proj.weight"], b["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(out["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(out["lm_head.weight"], b["lm_head.weight"])
    with pytest.raises(CannotCombine, match="b has layers 0 to 1: no layer 2"):
        merge({"method": "passthrough", "slices": [{"b": [1, 3]}]}, folders, tmp_path / "no")


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import graft.merge.journal as journal
from pathlib import Path
from small_family import merge
note = journal.Journal.note
def counted(self, name, size):
    note(self, name, size)
    if len(self.finished) >= 7:
        os.kill(os.getpid(), signal.SIGKILL)
journal.Journal.note = counted
folders = {{name: Path(folder) for name, folder in {folders!r}.items()}}
merge({settings!r}, folders, Path({out!r}), seed=4)
"""


def test_a_killed_merge_goes_on_and_ends_with_the_same_bytes(folders, tmp_path, monkeypatch, beside):
    settings = {"method": "dare_ties", "base": "base", "models": ["a", "b"], "density": 0.4, "shard": "8KB"}
    merge(settings, folders, tmp_path / "whole", seed=4)
    here, torn = str(Path(__file__).parent), str(tmp_path / "torn")
    plain = {name: str(folder) for name, folder in folders.items()}
    code = KILLED.format(here=here, settings=settings, folders=plain, out=torn)
    done = beside.run(code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    noted = (tmp_path / "torn.scratch" / "finished").read_text().splitlines()[2:]
    finished = {name for name in map(json.loads, noted) if name is not None}
    assert 7 <= len(finished) < len(tensors(tmp_path / "whole"))
    written = []
    original = graft.merge.engine.Tensors.write
    monkeypatch.setattr(
        graft.merge.engine.Tensors, "write", lambda self, *more: (written.append(self.name), original(self, *more))[1]
    )
    merge(settings, folders, tmp_path / "torn", seed=4)
    assert set(written) == set(tensors(tmp_path / "whole")) - finished
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "torn" / file.name).read_bytes() == file.read_bytes(), file.name


def test_what_was_finished_for_other_settings_is_made_again(folders, tmp_path):
    merge({"method": "linear", "models": {"a": 1, "b": 1}}, folders, tmp_path / "out")
    again, _ = merge({"method": "linear", "models": {"a": 1, "b": 3}}, folders, tmp_path / "out")
    fresh, _ = merge({"method": "linear", "models": {"a": 1, "b": 3}}, folders, tmp_path / "fresh")
    assert all(torch.equal(again[name], fresh[name]) for name in fresh)


def facts(**changes):
    plain = {"architecture": "decoder", "initialisation": "of:1", "vocabulary": "v", "parameters": 100, "bytes": 400}
    return Facts(**plain | changes)


def check(settings, **models):
    return graft.merge.VERB.check(graft.merge.VERB.parse(settings), models)


SOUP = {"method": "linear", "models": ["a", "b"]}


@pytest.mark.parametrize(
    ("other", "message", "may_be_forced"),
    [
        ({"initialisation": "of:2"}, "b and a grew from different initialisations", True),
        ({"vocabulary": "w"}, "b and a have different vocabularies", True),
        ({"architecture": "encoder"}, "b is of architecture encoder and a of decoder", False),
        ({"mergeable": False}, "b has no weights of its own to average", False),
        ({"config": {"hidden_size": 8}}, "b and a differ in shape: hidden_size 4 and 8", False),
    ],
)
def test_a_recipe_is_refused_from_facts_alone(other, message, may_be_forced):
    models = {"a": facts(config={"hidden_size": 4}), "b": facts(**{"config": {"hidden_size": 4}} | other)}
    (found,) = check(SOUP, **models)
    assert message in found
    assert ("nor their predictions" if "architecture" in other else "ensemble") in found
    assert (check(SOUP | {"anyway": True}, **models) == []) == may_be_forced


def test_models_of_one_family_are_fine():
    assert check(SOUP, a=facts(), b=facts()) == []
    assert check(SOUP, a=facts(initialisation="unknown:1"), b=facts(initialisation="unknown:2")) == []


def test_the_facts_of_a_merge():
    verb = graft.merge.VERB
    models = {"a": facts(trained_on=frozenset("x")), "b": facts(trained_on=frozenset("y"))}
    made = verb.facts(verb.parse(SOUP | {"dtype": "bfloat16"}), models, "key")
    assert (made.initialisation, made.bytes, made.trained_on) == ("of:1", 200, frozenset("xy"))
    forced = verb.facts(verb.parse(SOUP | {"anyway": True}), {"a": facts(), "b": facts(initialisation="of:2")}, "key")
    assert forced.initialisation == "of:key"
    assert verb.estimate(verb.parse(SOUP), models).disk_bytes == 400


def test_an_unknown_method_lists_the_folder():
    with pytest.raises(UnknownName, match=r"'tise' \(did you mean 'ties'\?\); there are: .*arcee_fusion"):
        graft.merge.VERB.parse({"method": "tise", "models": ["a"]})


def test_whatever_tokenizers_and_processors_are_loaded_from_comes_along(folders, tmp_path):
    """Vocabularies that are no tokenizer.json, templates of their own, and what prepares images or sound."""
    first = Path(shutil.copytree(folders["a"], tmp_path / "a"))
    (first / "additional_chat_templates").mkdir()
    names = [
        "source.spm", "target.spm", "vocab-src.json", "sentencepiece.bpe.model", "tokenizer.model.v3", "tekken.json",
        "preprocessor_config.json", "processor_config.json", "additional_chat_templates/rag.jinja",
    ]  # fmt: skip
    for name in [*names, "README.md", "training_args.bin"]:
        (first / name).write_text(name)
    out = tmp_path / "out"
    _, found = merge({"models": ["a", "b"]}, folders | {"a": first}, out)
    assert set(names) <= set(found["notes"]["files_taken"])
    assert all((out / name).read_text() == name for name in names)
    assert not (out / "README.md").exists()
    assert not (out / "training_args.bin").exists()
    (told,) = [line for line in lines(found["notes"]) if line.startswith("configuration")]
    assert told == "configuration, tokenizer, processor and generation settings of a"


def test_tokens_that_nothing_tells_of_are_told_and_plain_lists_are_compared(folders, tmp_path):
    bare = Path(shutil.copytree(folders["b"], tmp_path / "bare", ignore=shutil.ignore_patterns("token*")))
    _, found = merge({"models": ["a", "b"]}, folders | {"b": bare}, tmp_path / "1")
    assert any(line.startswith("the tokens of b are not known") for line in lines(found["notes"]))
    (bare / "vocab.json").write_text(json.dumps({f"w{i}": i for i in range(48)}))
    _, found = merge({"models": ["a", "b"]}, folders | {"b": bare}, tmp_path / "2")
    assert "tokens_unknown" not in found["notes"]
    (bare / "vocab.json").write_text(json.dumps({f"w{i}": 47 - i for i in range(48)}))
    with pytest.raises(CannotCombine, match="b and a have different vocabularies"):
        merge({"models": ["a", "b"]}, folders | {"b": bare}, tmp_path / "3")
