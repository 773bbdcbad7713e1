"""peft's folders: each side loads what the other wrote and gives the same logits."""

import json

import pytest
import torch

from graft import models
from graft.adapters import adapters_of, adopt
from graft.adapters.peft_format import load_peft, save_peft
from graft.errors import CheckpointError, RequestError

from .families import family, inputs, logits, moved
from .test_space import points

peft = pytest.importorskip("peft")

THEIRS = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"),
    "patterns": lambda: peft.LoraConfig(
        r=2, lora_alpha=4, target_modules="all-linear",
        rank_pattern={"layers.0.self_attn.q_proj": 5, r"h.1.attn.c_attn": 5}, alpha_pattern={"down_proj": 7, "c_fc": 7},
    ),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=4, use_rslora=True, target_modules="all-linear"),
    "dora": lambda: peft.LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules="all-linear"),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}  # fmt: skip
OURS = {
    "lora": {"rank": 2},
    "rslora": {"rank": 2, "rslora": True},
    "dora": {"rank": 2, "dora": True},
    "pissa": {"rank": 2, "pissa": True},
    "ia3": {},
    "prefix": {"length": 4, "gate": False},
    "prompt": {"length": 4, "gate": False},
}


def shift_of(name):
    """Logits of learned tokens, which peft gives before those of the text."""
    return 4 if name == "prompt" else 0


@torch.no_grad()
def theirs(model, name):
    return model(**inputs(model)).logits[:, shift_of(name) :]


@pytest.fixture
def base(tmp_path):
    def save(model_name):
        family(model_name).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return save


@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
@pytest.mark.parametrize("name", list(THEIRS))
def test_graft_reads_what_peft_wrote(tmp_path, base, name, model_name):
    folder = base(model_name)
    torch.manual_seed(0)
    made = peft.get_peft_model(models.load(folder), THEIRS[name]()).eval()
    moved(made)
    expected = theirs(made, name)
    made.save_pretrained(tmp_path / "theirs")
    loaded = load_peft(tmp_path / "theirs", base=folder)
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    assert not torch.allclose(expected, logits(models.load(folder)), atol=1e-4)
    loaded.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(models.load(tmp_path / "ours")), logits(loaded))


@pytest.mark.parametrize(
    ("name", "model_name"), [("prompt", "dbrx"), *((name, model) for name in OURS for model in ("llama", "gpt2"))]
)
def test_peft_reads_what_graft_wrote(tmp_path, base, name, model_name):
    folder = base(model_name)
    model = models.load(folder)
    method = name if name in ("ia3", "prefix", "prompt") else "lora"
    adopt(model, points(method, **OURS[name]), base=folder)
    moved(model)
    save_peft(model, tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(models.load(folder), tmp_path / "theirs").eval()
    assert torch.allclose(theirs(loaded, name), logits(model), atol=1e-5)
    again = load_peft(tmp_path / "theirs")
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


@pytest.mark.parametrize(
    ("model_name", "config"),
    [
        ("llama", {"r": 12, "lora_alpha": 5, "target_modules": "all-linear"}),  # keys are eight channels
        ("phi3", {"r": 2, "target_modules": ["qkv_proj", "gate_up_proj"]}),
        ("neox", {"r": 2}),
        ("deepseek", {"r": 2, "target_modules": ["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"]}),
        ("t5", {"r": 2, "target_modules": "all-linear", "use_dora": True}),
    ],
)
def test_lora_of_peft_is_read_whatever_the_layers_are_called(tmp_path, base, model_name, config):
    folder = base(model_name)
    torch.manual_seed(0)
    made = peft.get_peft_model(models.load(folder), peft.LoraConfig(**config)).eval()
    moved(made)
    made.save_pretrained(tmp_path / "theirs")
    assert torch.allclose(logits(load_peft(tmp_path / "theirs", base=folder)), theirs(made, "lora"), atol=1e-5)


@pytest.mark.parametrize("model_name", ["deepseek", "qwen3_next", "phi3", "neox", "bert", "bart"])
def test_lora_of_graft_is_read_by_peft_whatever_the_layers_are_called(tmp_path, base, model_name):
    """peft takes layers of a name that experts once had for those, which are one tensor now."""
    folder = base(model_name)
    model = models.load(folder)
    adopt(model, points("lora", rank=2), base=folder)
    moved(model)
    save_peft(model, tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(models.load(folder), tmp_path / "theirs").eval()
    assert torch.allclose(theirs(loaded, "lora"), logits(model), atol=1e-5)
    assert torch.allclose(logits(load_peft(tmp_path / "theirs")), logits(model), atol=1e-5)


def test_both_generate_the_same_with_a_prefix(tmp_path, base):
    folder = base("llama")
    model = models.load(folder)
    adopt(model, points("prefix", gate=False), base=folder)
    moved(model)
    save_peft(model, tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(models.load(folder), tmp_path / "theirs").eval()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    ids = inputs(model)["input_ids"]
    assert torch.equal(loaded.generate(input_ids=ids, **options), model.generate(ids, **options))


def test_what_peft_has_no_type_for_is_refused(tmp_path, base):
    for name, words in (("houlsby", "bottleneck after"), ("prefix", "softmax parallel"), ("bitfit", "bias after")):
        model = family("gpt2")
        adopt(model, points(name))
        with pytest.raises(RequestError, match=words):
            save_peft(model, tmp_path / "theirs")
    keys = points("prefix", gate=False)
    for name, chosen, words in (
        ("deepseek", keys, r"of one shape in each of 2 layers.*found them in 2, of \[4, 16, 4\], \[4, 16, 8\]"),
        ("llama", points("prefix", gate=False, layers="1:"), "in each of 2 layers.*found them in 1"),
        ("bert", keys, "softmax parallel on BertForMaskedLM"),
        (
            "deepseek",
            points("lora", dora=True),
            r"peft has none at model\.layers\.0\.mlp\.gate_proj in a model of experts",
        ),
    ):
        model = family(name)
        adopt(model, chosen)
        with pytest.raises(RequestError, match=words):
            save_peft(model, tmp_path / "theirs")


@pytest.mark.parametrize(("model_name", "options"), [("llama", {}), ("mixtral", {"on": ["linears", "experts"]})])
def test_the_weight_of_a_lora_becomes_part_of_its_alpha(tmp_path, base, model_name, options):
    model = models.load(folder := base(model_name))
    adopt(model, points("lora", rank=2, **options), "low", base=folder)
    moved(model, 0.5)
    whole = logits(model)
    adapters_of(model).use({"low": 0.5})
    save_peft(model, tmp_path / "theirs")
    assert torch.allclose(logits(load_peft(tmp_path / "theirs")), logits(model), atol=1e-5)
    assert not torch.allclose(whole, logits(model), atol=1e-3)


@pytest.mark.parametrize(("name", "options"), [("ia3", {}), ("lora", {"dora": True})])
def test_a_weight_that_peft_has_no_place_for_is_refused(tmp_path, name, options):
    model = family("llama")
    adopt(model, points(name, **options), "low")
    adapters_of(model).use({"low": 0.5})
    with pytest.raises(RequestError, match=r"expected an adapter with the weight 1.*found 0.5 × low"):
        save_peft(model, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


@pytest.fixture
def written(tmp_path, base):
    """A folder of peft's that graft reads, and a way to change its configuration."""
    folder = base("llama")
    model = models.load(folder)
    adopt(model, points("lora"), base=folder)
    save_peft(model, tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_config.json"

    def change(**settings):
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return tmp_path / "theirs"

    return change


def test_folders_that_cannot_be_read_say_why(tmp_path, written):
    with pytest.raises(RequestError, match=r"expected one of LORA, IA3.*found VERA"):
        load_peft(written(peft_type="VERA"))
    with pytest.raises(RequestError, match="modules_to_save"):
        load_peft(written(peft_type="LORA", modules_to_save=["lm_head"]))
    with pytest.raises(RequestError, match="init_lora_weights 'pissa'"):
        load_peft(written(modules_to_save=None, init_lora_weights="pissa"))
    with pytest.raises(RequestError, match=r"the model it was trained on \(base=…\), found none at nowhere"):
        load_peft(written(init_lora_weights=True, base_model_name_or_path="nowhere"))
    family("gpt2").save_pretrained(tmp_path / "other")
    with pytest.raises(RequestError, match=r"for another model: GPT2LMHeadModel: expected a place"):
        load_peft(written(), base=tmp_path / "other")
    (tmp_path / "theirs" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="found no such file"):
        load_peft(written(), base=tmp_path / "base")
    with pytest.raises(RequestError, match=r"with adapter_config\.json, found none"):
        load_peft(tmp_path / "base")


def test_adapters_beside_a_peft_one(tmp_path, written):
    model = load_peft(written(), name="theirs")
    stack = adopt(model, points("prefix"), "mine")
    moved(model)
    stack.use(["theirs", "mine"])
    expected = logits(model)
    model.save_pretrained(tmp_path / "both")
    loaded = models.load(tmp_path / "both")
    assert torch.equal(logits(loaded), expected)
    assert list(adapters_of(loaded).points) == ["theirs", "mine"]
