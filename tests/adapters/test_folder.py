"""Adapters on disk: small, exact, tied to the model they were made for; wherever a model is taken, they are one."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from graft import lineage, models
from graft.adapters import adapters_of, adopt
from graft.adapters.configuration import AdaptedConfig
from graft.adapters.folder import load
from graft.errors import CheckpointError, RequestError
from graft.tune import named_points

from .families import family, logits, moved
from .test_space import points


@pytest.fixture
def made(tmp_path):
    """(model, its logits, folder) of an adapter on a saved base."""

    def make(name="lora", model_name="llama", **options):
        base = tmp_path / "base"
        family(model_name).save_pretrained(base)
        model = models.load(base)
        torch.manual_seed(0)
        adopt(model, points(name, **options), "mine", base=base)
        moved(model)
        model.save_pretrained(tmp_path / "adapter")
        return model, logits(model), tmp_path / "adapter"

    return make


ON = ["llama", "gpt2", "bert", "t5"]
PAIRS = [(name, ON[place % 4]) for place, name in enumerate(named_points()) if name != "bitfit"]


@pytest.mark.parametrize(("name", "model_name"), [*PAIRS, ("bitfit", "gpt2"), ("prefix", "t5"), ("prompt", "bert")])
def test_what_is_saved_loads_as_it_was(made, name, model_name):
    _, expected, folder = made(name, model_name)
    loaded = models.load(folder)
    assert torch.equal(logits(loaded), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert adapters_of(loaded).points == {"mine": points(name)}


@pytest.mark.parametrize(
    ("model_name", "auto"),
    [("llama", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM), ("t5", AutoModelForSeq2SeqLM)],
)
def test_the_auto_classes_load_adapters(made, model_name, auto):
    model, expected, folder = made(model_name=model_name)
    loaded = auto.from_pretrained(folder)
    assert type(loaded).__name__ == type(model).__name__
    assert torch.equal(logits(loaded), expected)
    assert models.load_config(folder).model_type == model.config.model_type


def test_the_folder_holds_the_adapter_alone(made):
    model, _, folder = made(rank=1)
    assert {path.name for path in folder.iterdir()} >= {"adapter.safetensors", "config.json"}
    whole = sum(p.numel() * 4 for p in model.parameters())
    assert (folder / "adapter.safetensors").stat().st_size < whole / 3
    names = load_file(folder / "adapter.safetensors")
    assert "mine.model.layers.0.self_attn.q_proj.down" in names
    assert not any(name.startswith("model.") for name in names)


def test_a_folder_that_moves_with_its_base_still_loads(made, tmp_path):
    _, expected, folder = made()
    (tmp_path / "elsewhere").mkdir()
    for name in ("base", "adapter"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    assert torch.equal(logits(models.load(tmp_path / "elsewhere" / folder.name)), expected)


def test_the_base_may_be_given(made, tmp_path):
    _, expected, folder = made()
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"base is missing: expected a model in .*base"):
        models.load(folder)
    assert torch.equal(logits(load(folder, base=tmp_path / "moved")), expected)


def test_an_adapter_of_another_base_is_refused(made, tmp_path):
    _, _, folder = made()
    other = family("llama")
    moved(other)
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"made for another base: expected the weights with hash \w{12}, found"):
        models.load(folder)


@pytest.mark.parametrize(
    "change",
    [{"adapters": {"mine": "low"}}, {"adapters": {"mine": 3}}, {"active": 5}, {"active": [["mine"]]}, {"base": {}},
     {"active": [["yours", 1.0]]}, {"active": [["mine", "much"]]}, {"base": {"path": 3, "hash": ""}}],
)  # fmt: skip
def test_what_a_configuration_says_of_adapters_is_read_or_told_damaged(made, change):
    _, _, folder = made()
    config = json.loads((folder / "config.json").read_text())
    config["graft_adapted"].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"expected what the adapters are \(graft_adapted\), found it damaged"):
        models.load(folder)


def test_damaged_adapters_are_named(made):
    _, _, folder = made()
    path = folder / "adapter.safetensors"
    whole = load_file(path)
    name = "mine.model.layers.0.self_attn.q_proj.up"
    for change, words in (
        ({name: None}, f"missing 1: {name}"),
        ({"mine.more": torch.zeros(1)}, "1: mine.more, which belong nowhere"),
        ({name: torch.zeros(2, 2)}, r"q_proj.up of shape \[16, 4\], found \[2, 2\]"),
    ):
        save_file({k: v for k, v in (whole | change).items() if v is not None}, path)
        with pytest.raises(CheckpointError, match=words):
            models.load(folder)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        models.load(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"expected the adapters' weights in adapter\.safetensors, found no such"):
        models.load(folder)


def test_a_newer_format_and_a_damaged_configuration_are_refused(made):
    _, _, folder = made()
    config = json.loads((folder / "config.json").read_text())
    config["graft_adapted"]["format"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="format 1, found 2"):
        models.load(folder)
    del config["graft_adapted"]["base"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="found it damaged"):
        models.load(folder)


def test_a_model_in_memory_has_no_base_to_name(tmp_path):
    model = family("llama")
    adopt(model, points("lora"))
    with pytest.raises(RequestError, match="loaded from a folder"):
        model.save_pretrained(tmp_path / "adapter")


def test_the_hash_is_that_of_what_it_computes(made, tmp_path):
    model, _, folder = made()
    before = lineage.hash_model(folder)
    model.save_pretrained(tmp_path / "again")
    assert lineage.hash_model(tmp_path / "again") == before
    moved(model)
    model.save_pretrained(folder)
    assert lineage.hash_model(folder) != before


def test_a_copy_is_a_model_of_its_own(made):
    for name in ("lora", "mix_and_match", "prompt"):
        model, expected, _ = made(name)
        other = copy.deepcopy(model)
        assert torch.equal(logits(other), expected)
        adapters_of(other).use(None)
        with torch.no_grad():
            for parameter in adapters_of(other).parameters():
                parameter.zero_()
        assert torch.equal(logits(model), expected)


def test_the_frozen_weights_take_the_dtype_that_is_asked_for(made):
    _, expected, folder = made()
    half = models.load(folder, dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert (logits(half).float() - expected).norm() < 0.1 * expected.norm()


def test_weights_of_an_adapter_are_no_whole_models(made):
    _, _, folder = made()
    from graft.checkpoint import read_headers

    with pytest.raises(CheckpointError, match=r"found an adapter.*fold: true"):
        read_headers(folder)


def test_layers_of_types_that_only_the_frozen_model_has_are_kept():
    said = {"layer_types": ["full_attention"], "mlp_layer_types": ["hash_moe"], "num_hidden_layers": 1}
    assert said.items() <= AdaptedConfig(**said).to_dict().items()
