"""Adapters put together: stacked, weighted, averaged, folded; what does not go together is refused."""

import json
import shutil

import pytest
import torch

import graft
from graft import models
from graft.adapt import VERB
from graft.adapters import adapters_of, adopt
from graft.adapters.facts import adapted_facts
from graft.adapters.folder import averaged
from graft.adapters.point import Point
from graft.data.tokenizers import train_tokenizer
from graft.errors import CheckpointError, RecipeError, RequestError, SettingsError, UnknownName
from graft.facts import facts_of
from graft.methods import method
from graft.settings import parse
from graft.train.memory import PROCESS
from graft.verb import Facts, Job


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from graft import data
    from graft.pretrain.architectures import Shape, build, config_for

    folder = tmp_path_factory.mktemp("base")
    raw = data.parse({"source": "python-library", "packages": ["json"], "splits": {"dev": 0, "test": 0}})
    tokenizer = train_tokenizer(data.open_corpus({"c": raw}, "c", folder), "bpe", 300)
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    torch.manual_seed(0)
    models.save(
        build(config_for("decoder", "rotary", Shape(16, 2, 2, len(tokenizer), 64, 0.0, ids))), tokenizer, folder
    )
    return folder


def adapter(base, folder, how, seed=0, **options):
    """A trained adapter on `base`, in `folder`."""
    torch.manual_seed(seed)
    model = models.load(base)
    module = method("graft.tune", how)
    adopt(model, module.points(module.Settings(**options)), folder.name, base=base)
    with torch.no_grad():
        for parameter in adapters_of(model).parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    models.save(model, models.load_tokenizer(base), folder)
    return folder


def run(folder, parents, **raw):
    (folder / "out").mkdir(parents=True)
    paths = parents if isinstance(parents, dict) else {path.name: path for path in parents}
    job = Job("made", VERB.parse(raw), 0, folder / "out", folder / "scratch", folder / "cache", paths, {}, folder)
    return VERB.run(job), models.load(folder / "out")


@torch.no_grad()
def logits(model):
    return model(torch.arange(3, 20)[None]).logits


def test_stacked_adapters_run_with_their_weights(tmp_path, base):
    low, wide = adapter(base, tmp_path / "low", "lora", rank=2), adapter(base, tmp_path / "wide", "houlsby", 1, width=3)
    found, model = run(tmp_path / "a", [low, wide], adapters={"low": 0.5, "wide": 1.0})
    assert found["adapters"] == {"low": 0.5, "wide": 1.0}
    assert set(found["adapter_parameters"]) == {"low", "wide"}
    for name, folder in (("low", low), ("wide", wide)):
        with adapters_of(model).using(name):
            assert torch.equal(logits(model), logits(models.load(folder)))
    _, ordered = run(tmp_path / "b", [low, wide], adapters=["low", "wide"])
    assert not torch.allclose(logits(ordered), logits(model), atol=1e-4)


def test_a_stack_of_stacks_multiplies_weights(tmp_path, base):
    low, wide = adapter(base, tmp_path / "low", "lora", rank=2), adapter(base, tmp_path / "wide", "lora", 1, rank=2)
    run(tmp_path / "a", [low], adapters={"low": 0.5})
    parents = {"half": tmp_path / "a" / "out", "wide": wide}
    _, model = run(tmp_path / "b", parents, adapters={"half": 0.5, "wide": 1.0})
    assert adapters_of(model).active == [("low", 0.25), ("wide", 1.0)]


def test_one_task_over_another_language(tmp_path, base):
    """MAD-X: the language adapter below a task's is exchanged; the task's stays as it was trained."""
    english, german, task = (
        adapter(base, tmp_path / n, "pfeiffer", i, width=3) for i, n in enumerate(["en", "de", "task"])
    )
    _, model = run(tmp_path / "a", [english, german, task], adapters=["en", "de", "task"])
    stack = adapters_of(model)
    stack.use(["en", "task"])
    trained = logits(model)
    stack.use(["de", "task"])
    assert not torch.allclose(logits(model), trained, atol=1e-4)
    _, apart = run(tmp_path / "b", [german, task], adapters=["de", "task"])
    assert torch.equal(logits(model), logits(apart))


def over(language, folder, seed):
    """A task's adapter in `folder`, trained over the language's, which the folder has as well."""
    torch.manual_seed(seed)
    model = models.load(language)
    adopt(model, method("graft.tune", "pfeiffer").points(method("graft.tune", "pfeiffer").Settings()), folder.name)
    with torch.no_grad():
        for parameter in adapters_of(model).sites[folder.name].parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    models.save(model, models.load_tokenizer(language), folder)
    return folder


def test_a_task_trained_over_one_language_is_put_over_another(tmp_path, base):
    """MAD-X: the task's folder has its language's adapter too, which is left out for the other's."""
    english = adapter(base, tmp_path / "en", "mad_x", 0, width=3, coupling=2)
    german = adapter(base, tmp_path / "de", "mad_x", 1, width=3, coupling=2)
    task = over(english, tmp_path / "task", 2)
    found, swapped = run(tmp_path / "a", [german, task], adapters=["de", "task"], without=["en"])
    assert list(found["adapters"]) == list(adapters_of(swapped).points) == ["de", "task"]
    _, both = run(tmp_path / "b", [english, german, task], adapters=["de", "task"])
    adapters_of(both).use(["de", "task"])
    assert torch.equal(logits(swapped), logits(both))
    assert not torch.allclose(logits(swapped), logits(models.load(task)), atol=1e-4)
    _, back = run(tmp_path / "c", [task], adapters=["task"], without=["task"])
    assert torch.equal(logits(back), logits(models.load(english)))


def test_what_is_left_out_need_not_fold(tmp_path, base):
    english = adapter(base, tmp_path / "en", "lora", 0, rank=2)
    task = over(english, tmp_path / "task", 2)
    settings = {"adapters": ["task"], "without": ["task"], "fold": True}
    for start in (facts_of(task), adapted_facts(facts_of(english), [{"form": "fusion", "on": ["adapters"]}])):
        assert VERB.check(VERB.parse(settings), {"task": start}) == []
    assert "does not fold" in VERB.check(VERB.parse(settings | {"without": []}), {"task": facts_of(task)})[0]
    _, whole = run(tmp_path / "a", [task], **settings)
    assert torch.allclose(logits(whole), logits(models.load(english)), atol=2e-5)


def test_what_cannot_be_left_out_is_told(tmp_path, base):
    english, german = (adapter(base, tmp_path / n, "pfeiffer", i, width=3) for i, n in enumerate(["en", "de"]))
    pair = {"adapters": ["en", "de"]}
    with pytest.raises(UnknownName, match=r"unknown adapter 'eng' \(did you mean 'en'\?\); there are: de, en"):
        run(tmp_path / "a", [english, german], **pair, without=["eng"])
    with pytest.raises(RequestError, match="not left out, found none beside en, de"):
        run(tmp_path / "b", [english, german], **pair, without=["en", "de"])
    _, model = run(tmp_path / "c", [english, german], **pair)
    adopt(model, [Point(form="fusion", on=["adapters"])], "fused", base=base)
    models.save(model, models.load_tokenizer(base), tmp_path / "fused")
    with pytest.raises(RequestError, match="fused is a fusion of en with others"):
        run(tmp_path / "d", [tmp_path / "fused"], adapters=["fused"], without=["en"])


def test_the_average_is_the_mean_of_the_weights(tmp_path, base):
    parents = [adapter(base, tmp_path / name, "lora", seed, rank=2) for seed, name in enumerate("abc")]
    _, model = run(tmp_path / "x", parents, adapters={"a": 1, "b": 2, "c": 1}, how="average")
    assert list(adapters_of(model).points) == ["made"]
    sites = [adapters_of(models.load(path)).sites[path.name].state_dict() for path in parents]
    for name, tensor in adapters_of(model).sites["made"].state_dict().items():
        a, b, c = (site[name] for site in sites)
        assert torch.allclose(tensor, (a + 2 * b + c) / 4, atol=1e-6)
    _, alone = run(tmp_path / "y", parents[:1], adapters=["a"], how="average")
    assert torch.allclose(logits(alone), logits(models.load(parents[0])), atol=1e-6)


def test_only_one_kind_is_averaged(tmp_path, base):
    parents = [adapter(base, tmp_path / "a", "lora", rank=2), adapter(base, tmp_path / "b", "lora", rank=3)]
    with pytest.raises(RequestError, match="b and a differ: use `how: stack`"):
        run(tmp_path / "x", parents, adapters=["a", "b"], how="average")
    model = models.load(parents[0])
    averaged(model, {"a": 3.0}, "same")
    assert torch.allclose(logits(model), logits(models.load(parents[0])), atol=1e-6)


def test_a_fold_is_what_the_stack_computes(tmp_path, base):
    parents = [adapter(base, tmp_path / "a", "lora", rank=2), adapter(base, tmp_path / "b", "ia3", 1)]
    _, apart = run(tmp_path / "x", parents, adapters=["a", "b"])
    _, whole = run(tmp_path / "y", parents, adapters=["a", "b"], fold=True)
    assert adapters_of(whole) is None
    assert torch.allclose(logits(whole), logits(apart), atol=2e-5)


@pytest.mark.parametrize(
    ("how", "options", "words"),
    [("prefix", {"length": 2}, "learned keys or tokens"), ("houlsby", {"width": 3}, "which is not linear")],
)
def test_what_does_not_fold_is_refused_before_and_while_it_is_made(tmp_path, base, how, options, words):
    own = adapter(base, tmp_path / "own", how, **options)
    settings = {"adapters": ["own"], "fold": True}
    (wrong,) = VERB.check(VERB.parse(settings), {"own": facts_of(own)})
    assert wrong.startswith("own: the adapter does not fold")
    assert words in wrong
    with pytest.raises(RequestError, match=words):
        run(tmp_path / "out", [own], **settings)
    low = adapter(base, tmp_path / "low", "lora", rank=2)
    assert VERB.check(VERB.parse({"adapters": ["low"], "fold": True}), {"low": facts_of(low)}) == []


def test_adapters_of_different_models_are_refused(tmp_path, base):
    low = adapter(base, tmp_path / "low", "lora", rank=2)
    other = models.load(base)
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    models.save(other, models.load_tokenizer(base), tmp_path / "other")
    strange = adapter(tmp_path / "other", tmp_path / "strange", "lora", rank=2)
    with pytest.raises(CheckpointError, match="strange: the adapters were made for another base"):
        run(tmp_path / "x", [low, strange], adapters=["low", "strange"])
    facts = {path.name: facts_of(path) for path in (low, strange, base)}
    settings = VERB.parse({"adapters": ["low", "strange"]})
    assert VERB.check(settings, facts) == [
        "strange and low were made for different models: adapters go together on one"
    ]
    whole = VERB.check(VERB.parse({"adapters": ["low", base.name]}), facts)
    assert f"{base.name} is no adapter on a frozen model" in whole[0]


def test_facts_of_a_folder_without_a_manifest_are_those_of_its_base(tmp_path, base):
    low, frozen = facts_of(adapter(base, tmp_path / "low", "lora", rank=2)), facts_of(base)
    assert (low.architecture, low.vocabulary, low.initialisation) == (
        frozen.architecture, frozen.vocabulary, frozen.initialisation,
    )  # fmt: skip
    assert not low.mergeable


def test_the_plan_counts_the_base_of_adapters_on_disk(tmp_path, base):
    def size(*folders):
        return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))

    low, wide = (adapter(base, tmp_path / name, "lora", rank=rank) for name, rank in (("low", 2), ("wide", 4)))
    assert facts_of(low).bytes == size(low, base)
    made = graft.ensemble(tmp_path / "duo", members=[str(low), str(wide)])
    # the base is in memory once
    assert facts_of(made).bytes == size(low, wide, base)
    recipe = tmp_path / "family.yaml"
    recipe.write_text(
        "family: f\nmodels:\n  low: {load: low}\n  duo: {ensemble: {members: {low: 1}}}\n"
        "  nested: {ensemble: {members: {duo: 1}}}\n"
    )
    steps = graft.plan(recipe, tmp_path / "run").steps
    assert steps["low"].estimate.disk_bytes == size(low)
    for name in ("duo", "nested"):
        assert steps[name].estimate.memory_bytes == PROCESS + size(low, base)
        assert steps[name].estimate.disk_bytes == 0


def test_settings_that_mean_nothing_are_refused():
    for raw, words in (
        ({}, "expected `adapters`, or `peft` with `from`"),
        ({"peft": "x"}, "`peft` and `from` together"),
        ({"adapters": ["a"], "peft": "x", "from": "b"}, "found both"),
        ({"adapters": ["a", "a"]}, "every adapter once"),
        ({"adapters": ["a"], "fold": True, "export": "peft"}, "`export` or `fold`"),
        ({"adapters": {"a": 1, "b": -1}, "how": "average"}, "do not sum to zero"),
    ):
        with pytest.raises(SettingsError, match=words):
            VERB.parse(raw)


def test_a_peft_folder_stands_on_the_model_that_it_names_where_none_is_said(tmp_path, base):
    low = graft.adapt(tmp_path / "low", adapters=[str(adapter(base, tmp_path / "own", "lora", rank=2))], export="peft")
    path = low / "peft" / "adapter_config.json"
    theirs, config = low / "peft", json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    made = graft.adapt(tmp_path / "theirs", peft=str(theirs))
    said = graft.adapt(tmp_path / "said", peft=str(theirs), from_=str(base))
    assert torch.equal(logits(graft.load(made)), logits(graft.load(said)))
    for named, words in (("ORG/NAME", "names ORG/NAME, which is no model's folder here"), (None, "names none")):
        path.write_text(json.dumps(config | {"base_model_name_or_path": named}))
        with pytest.raises(RequestError, match=rf"as `from` \(--from\), found none: its adapter_config.json {words}"):
            graft.adapt(tmp_path / "lost", peft=str(theirs))
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config.json: the configuration is damaged"):
        graft.adapt(tmp_path / "lost", peft=str(theirs))
    with pytest.raises(RequestError, match=r"expected a peft folder \(with adapter_config.json\) at .*none"):
        graft.adapt(tmp_path / "lost", peft=str(tmp_path / "none"))
    assert not (tmp_path / "lost").exists()


def test_what_was_trained_on_is_passed_on():
    config = {"model_type": "graft_adapted", "graft_adapted": {"model_type": "llama"}}
    one, two = (Facts("decoder", "i", "v", 10, 0, config, False, frozenset({name})) for name in "ab")
    made = VERB.facts(VERB.parse({"adapters": ["x", "y"], "fold": True}), {"x": one, "y": two}, "key")
    assert (made.trained_on, made.mergeable, made.config) == (frozenset("ab"), True, {"model_type": "llama"})


def test_how_an_adapter_is_related_says_what_to_do(tmp_path, base):
    from graft.relate import relate

    low = adapter(base, tmp_path / "low", "lora", rank=2)
    assert "read as the model that it makes of" in relate(base, low).evidence
    found = relate(base, adapter(base, tmp_path / "wide", "houlsby", 1, width=3))
    assert (found.kind, found.weights, found.predictions) == ("adapter", "no", "yes")
    assert "adapters on one model are put together without (adapt)" in found.weights_why


def test_folding_twice_and_adapters_of_different_models_are_refused_before_work(tmp_path, base):
    one = adapter(base, tmp_path / "one", "lora", rank=2)
    whole = graft.adapt(tmp_path / "whole", adapters=[one], fold=True)
    with pytest.raises(RecipeError, match=r"whole is no adapter on a frozen model \(adapters that were folded"):
        graft.adapt(tmp_path / "no", adapters=[whole], fold=True)
    other = adapter(whole, tmp_path / "other", "lora", rank=2)
    with pytest.raises(RecipeError, match=r"other and .*one were made for different models"):
        graft.adapt(tmp_path / "no", adapters=[one, other])
    assert not (tmp_path / "no").exists()


def test_what_has_no_mean_does_not_meet_or_is_not_there_is_refused_before_work(tmp_path, base):
    from graft.tune import VERB as TUNE

    low, keys = adapter(base, tmp_path / "low", "lora", rank=2), adapter(base, tmp_path / "keys", "prefix", 1, length=2)
    facts = {"low": facts_of(low), "keys": facts_of(keys)}

    def problems(**raw):
        return VERB.check(VERB.parse({"adapters": ["low", "keys"], **raw}), facts)

    assert "expected adapters of one kind and size to average" in problems(how="average")[0]
    assert "unknown adapter 'kesy' (did you mean 'keys'?)" in problems(without=["kesy"])[0]
    assert problems(without=["keys"]) == problems() == []
    run(tmp_path / "both", [low, keys], adapters=["low", "keys"])
    yet_to_be = VERB.facts(VERB.parse({"adapters": ["low", "keys"]}), facts, "key")
    for both in (facts_of(tmp_path / "both" / "out"), yet_to_be):
        fusion = TUNE.parse({"from": "both", "data": "d", "method": "fusion"})
        assert "do not meet: learned keys are not fused" in TUNE.check(fusion, {"both": both})[0]
    more = TUNE.parse({"from": "low", "data": "d", "method": {"further": {"adapters": ["lwo"]}}})
    assert "unknown adapter 'lwo' (did you mean 'low'?)" in TUNE.check(more, facts)[0]


def test_adapters_of_the_same_places_fuse_also_before_they_are_made(tmp_path, base):
    from graft.tune import VERB as TUNE

    parents = [adapter(base, tmp_path / name, "pfeiffer", seed, width=2) for seed, name in enumerate("ab")]
    parents.insert(0, adapter(base, tmp_path / "keys", "prefix", length=2))
    facts = {path.name: facts_of(path) for path in parents}
    both = VERB.facts(VERB.parse({"adapters": list(facts)}), facts, "key")
    assert TUNE.check(TUNE.parse({"from": "both", "data": "d", "method": "fusion"}), {"both": both}) == []


def test_what_an_adapter_is_loaded_from_is_not_written_over(tmp_path, base):
    home = tmp_path / "home"
    shutil.copytree(base, home)
    low = adapter(home, tmp_path / "low", "lora", rank=2)
    before = (home / "model.safetensors").read_bytes()
    with pytest.raises(RequestError, match=r"holds weights that .*low is loaded from and would lose"):
        graft.adapt(home, adapters=[str(low)], fold=True, force=True)
    assert (home / "model.safetensors").read_bytes() == before


def test_a_truncated_adapter_is_a_wrong_request_also_without_a_manifest(tmp_path, base):
    file = adapter(base, tmp_path / "low", "lora", rank=2) / "adapter.safetensors"
    (tmp_path / "low" / "graft.json").unlink(missing_ok=True)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="truncated"):
        facts_of(tmp_path / "low")


def test_no_layers_are_no_layers():
    with pytest.raises(SettingsError, match="expected blocks such as"):
        parse(Point, {"form": "linear", "on": ["query"], "size": 2, "layers": []})


def test_peft_folders_that_cannot_be_read_or_written_are_refused_before_work(tmp_path, base):
    low = adapter(base, tmp_path / "low", "lora", rank=2)
    keys = adapter(base, tmp_path / "keys", "prefix", 1, length=2)
    run(tmp_path / "out", [low], adapters=["low"], export="peft")
    theirs, facts = tmp_path / "out" / "out" / "peft", {name: facts_of(tmp_path / name) for name in ("low", "keys")}

    def read(folder):
        settings = VERB.parse({"peft": str(folder), "from": "base"})
        return VERB.check(settings, {"base": facts_of(base)})

    assert read(theirs) == []
    for name, harm, words in (
        ("config", lambda at: (at / "adapter_config.json").write_text("{"), "expected JSON, found a damaged file"),
        (
            "kind",
            lambda at: (at / "adapter_config.json").write_text('{"peft_type": "LOHA"}'),
            "found LOHA, which graft",
        ),
        ("cut", lambda at: (at / "adapter_model.safetensors").write_bytes(b"12345678"), "adapter_model.safetensors"),
    ):
        shutil.copytree(theirs, tmp_path / name)
        harm(tmp_path / name)
        assert words in read(tmp_path / name)[0]

    def written(*names):
        return VERB.check(VERB.parse({"adapters": list(names), "export": "peft"}), facts)

    assert written("low") == []
    assert "a peft folder holds one, found 2" in written("low", "keys")[0]
    assert keys.name in facts
    assert "found softmax parallel on attention" in written("keys")[0]
