"""Models in 8 and 4 bits: packed as the papers say, read by everything, tuned by adapters, unpacked again."""

import json

import pytest
import torch
import yaml
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import graft
from graft import models
from graft.adapters import adapters_of
from graft.adapters.packed import is_packed, plain_weight
from graft.errors import CannotCombine, RecipeError, RequestError, SettingsError
from graft.facts import facts_of
from graft.lineage import read_manifest
from graft.quantize import VERB
from graft.run import NodesFailed

CODE = {"source": "python-library", "packages": ["json", "email"], "keep": "code", "pieces": 500}
TUNE = {"from": "four", "data": "code", "length": 64, "budget": "25 steps", "batch_size": 4, "learning_rate": 1e-2}


def llama(folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def gpt2(folder):
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, **ids)).save_pretrained(folder)
    return folder


def bert(folder):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(vocab_size=320, **shape)).save_pretrained(folder)
    return folder


def logits(folder):
    with torch.no_grad():
        return models.load(folder, dtype="float32")(torch.arange(3, 60)[None]).logits


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A base, packed both ways, an adapter on the packed one, and plain weights again; measured."""
    place = tmp_path_factory.mktemp("family")
    recipe = {
        "family": "packed",
        "data": {"code": CODE},
        "models": {
            "base": {
                "pretrain": {"data": "code", "size": "300k", "length": 64, "tokenizer": {"size": 384},
                             "budget": "100 steps", "batch_size": 8, "learning_rate": 3e-3}
            },
            "eight": {"quantize": {"from": "base", "bits": 8}},
            "four": {"quantize": {"from": "base"}},
            "tuned": {"tune": {**TUNE, "method": {"lora": {"rank": 4}}}},
            "plain": {"quantize": {"from": "four", "bits": 16}},
            "duo": {"ensemble": {"members": ["base", "four"]}},
        },
        "evaluate": [{"measure": "bits_per_byte", "on": ["code.test"], "limit": 10}],
    }  # fmt: skip
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return graft.run(path, place / "run", device="cpu")


def test_what_packing_costs_and_what_tuning_wins_back_is_measured(family):
    score = {row["model"]: row["value"] for row in family.rows if row["kind"] == "score"}
    assert set(score) == {"base", "eight", "four", "tuned", "plain", "duo"}
    assert abs(score["eight"] - score["base"]) < abs(score["four"] - score["base"]) < 0.2
    assert score["tuned"] < score["four"]
    assert abs(score["plain"] - score["four"]) < 1e-3


def test_the_folder_is_smaller_and_says_what_it_is(family):
    places = {name: family.folder / "models" / name for name in ("base", "eight", "four", "plain")}
    sizes = {name: (place / "model.safetensors").stat().st_size for name, place in places.items()}
    assert sizes["four"] < sizes["eight"] < sizes["base"] <= sizes["plain"] + 4096
    counts = {name: read_manifest(place).parameters for name, place in places.items()}
    assert len(set(counts.values())) == 1
    assert read_manifest(places["four"]).metrics["bytes"] < read_manifest(places["four"]).metrics["bytes_before"]
    assert facts_of(places["four"]).stored == "quantised"
    (places["four"] / "graft.json").rename(places["four"] / "aside")
    try:
        assert facts_of(places["four"]).parameters == counts["base"]
    finally:
        (places["four"] / "aside").rename(places["four"] / "graft.json")


def test_the_packed_weights_below_an_adapter_stay_to_the_bit(family):
    four, tuned = (models.load(family.folder / "models" / name) for name in ("four", "tuned"))
    own = dict(tuned.named_parameters())
    assert sum(is_packed(module) for module in four.modules()) > 4
    assert all(torch.equal(value, own[name]) for name, value in four.named_parameters())
    assert [name for name, p in own.items() if p.dtype == torch.uint8]


def test_unpacked_weights_merge_again_and_packed_ones_are_refused(family, tmp_path):
    place = family.folder / "models"
    merged = graft.merge(tmp_path / "merged", method="linear", models=[place / "base", place / "plain"])
    assert models.load(merged).num_parameters() == read_manifest(place / "base").parameters
    with pytest.raises(
        CannotCombine, match=r"is quantised: \{quantize: \{from: .*four, bits: 16\}\} makes plain weights"
    ):
        graft.merge(tmp_path / "no", method="linear", models=[place / "base", place / "four"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "full"}, "is quantised, and full tuning needs plain ones"),
        ({"method": {"lora": {"rank": 2}}, "fold": True}, "is quantised, and folding into packed weights"),
    ],
)
def test_packed_weights_are_neither_tuned_nor_folded_into(family, tmp_path, settings, message):
    given = {**TUNE, "from_": family.folder / "models" / "four", **settings}
    del given["from"]
    with pytest.raises(RecipeError, match=message):
        graft.tune(tmp_path / "no", data_sets={"code": CODE}, **given)


@pytest.mark.parametrize(
    ("model", "bits", "message"),
    [
        ("four", 4, "is quantised already"),
        ("base", 16, "expected a quantised model to unpack"),
        ("tuned", 4, "has no weights of its own to quantise"),
        ("duo", 4, "has no weights of its own to quantise"),
    ],
)
def test_what_cannot_be_packed_is_said(family, tmp_path, model, bits, message):
    with pytest.raises(RecipeError, match=message):
        graft.quantize(tmp_path / "no", from_=family.folder / "models" / model, bits=bits)


def test_what_is_said_of_4_bits_is_refused_beside_others():
    for bits, more in ((8, {"kind": "fp4"}), (16, {"double": False})):
        with pytest.raises(SettingsError, match=f"beside 4 bits, found it beside {bits}"):
            VERB.parse({"from": "a", "bits": bits, **more})
    assert VERB.parse(VERB.parse({"from": "a", "bits": 8}).plain()).bits == 8


def test_an_adapter_on_packed_weights_is_folded_into_what_they_stand_for(family, tmp_path):
    place = family.folder / "models"
    assert facts_of(place / "tuned").stored == "quantised"
    with pytest.raises(RecipeError, match=r"stands on a quantised model, .*\{quantize: \{from: .*tuned, bits: 16\}\}"):
        graft.adapt(tmp_path / "no", adapters=[place / "tuned"], fold=True)
    whole = graft.quantize(tmp_path / "whole", from_=place / "tuned", bits=16)
    config = json.loads((whole / "config.json").read_text())
    assert (config["model_type"], "quantization_config" in config) == ("llama", False)
    assert facts_of(whole).stored == "safetensors"
    torch.testing.assert_close(logits(whole), logits(place / "tuned"), atol=1e-5, rtol=1e-5)
    assert (logits(whole) - logits(place / "plain")).abs().max() > 1e-3
    by_merge = graft.merge(tmp_path / "merged", models=[place / "tuned"], adapters_of=place / "plain")
    torch.testing.assert_close(logits(whole), logits(by_merge), atol=1e-6, rtol=1e-6)


def test_adapters_that_do_not_fold_are_not_unpacked(family, tmp_path):
    given = {"from_": family.folder / "models" / "four", "data": "code", "length": 64, "budget": "1 steps"}
    keys = graft.tune(tmp_path / "keys", data_sets={"code": CODE}, method="prefix", batch_size=4, **given)
    with pytest.raises(RecipeError, match="the adapter does not fold"):
        graft.quantize(tmp_path / "no", from_=keys, bits=16)


def test_nothing_is_said_in_every_call_of_a_layer_in_8_bits(family, caplog):
    logits(family.folder / "models" / "eight")
    assert not caplog.records


def test_four_bits_are_the_nearest_of_sixteen_quantiles(tmp_path):
    """NF4 by hand: blocks of 64, the largest absolute value of each, the nearest of sixteen values (QLoRA, app. E)."""
    table = torch.tensor(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
         0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
    )  # fmt: skip
    base = models.load(llama(tmp_path / "base"))
    four = models.load(graft.quantize(tmp_path / "four", from_=tmp_path / "base", double=False))
    path = "model.layers.1.mlp.up_proj"
    blocks = base.get_submodule(path).weight.detach().reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / largest)[..., None].sub(table).abs().argmin(-1)
    found = plain_weight(four.get_submodule(path)).reshape(-1, 64)
    torch.testing.assert_close(found, table[nearest] * largest, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [llama, gpt2, bert])
@pytest.mark.parametrize("bits", [4, 8])
def test_unpacked_is_what_the_packed_one_computes_with(tmp_path, make, bits):
    make(tmp_path / "base")
    small = graft.quantize(tmp_path / "small", from_=tmp_path / "base", bits=bits)
    plain = graft.quantize(tmp_path / "plain", from_=small, bits=16)
    assert json.loads((plain / "config.json").read_text()).get("quantization_config") is None
    # eight bits round the activations too
    torch.testing.assert_close(logits(plain), logits(small), atol=1e-5 if bits == 4 else 0.05, rtol=1e-4)
    assert (logits(small) - logits(tmp_path / "base")).abs().max() > 1e-4
    assert models.load(plain).state_dict().keys() == models.load(tmp_path / "base").state_dict().keys()


@pytest.mark.parametrize("bits", [4, 8])
def test_directions_and_largest_values_start_as_the_packed_model(tmp_path, bits):
    """DoRA and PiSSA need the weight itself."""
    from graft.adapters.stack import adopt
    from graft.tune.lora import Settings, points

    llama(tmp_path / "base")
    model = models.load(graft.quantize(tmp_path / "small", from_=tmp_path / "base", bits=bits))
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        before = model(ids).logits
        adopt(model, points(Settings(rank=2, dora=True, pissa=True)), "a")
        torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)
    assert adapters_of(model).count("a") > 0


def test_types_of_peft_that_read_weights_as_they_lie_are_refused_on_packed_ones(tmp_path):
    pytest.importorskip("peft")
    from graft.adapters.foreign import wrap

    llama(tmp_path / "base")
    small = graft.quantize(tmp_path / "small", from_=tmp_path / "base")
    places = {"r": 2, "target_modules": ["q_proj"]}
    with pytest.raises(
        RequestError, match=r"peft: LOHA does not compute with packed weights \(.*: use the method lora"
    ):
        wrap(models.load(small), {"peft_type": "LOHA", **places}, small)
    assert wrap(models.load(small), {"peft_type": "LORA", **places}, small) is not None


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_that_are_kept_stay_plain(tmp_path, bits):
    llama(tmp_path / "base")
    model = models.load(graft.quantize(tmp_path / "small", from_=tmp_path / "base", bits=bits, keep=["up_proj"]))
    assert not is_packed(model.model.layers[0].mlp.up_proj)
    assert not is_packed(model.lm_head)  # as without `keep`
    assert is_packed(model.model.layers[0].mlp.down_proj)
    with pytest.raises(NodesFailed, match="expected linear layers to quantise, found none"):
        graft.quantize(tmp_path / "none", from_=tmp_path / "base", keep=["proj", "lm_head"])
    with pytest.raises(RecipeError, match=r"found 'up_prj' \(did you mean 'up_proj'\?\); there are: q_proj, k_proj"):
        graft.quantize(tmp_path / "none", from_=tmp_path / "base", keep=["up_prj"])
