"""LoRA on fused experts in peft's folders: each side gives the logits of the other."""

import json

import pytest
import torch

from graft import models
from graft.adapters import adopt
from graft.adapters.peft_format import load_peft, save_peft
from graft.errors import GraftError, RequestError
from graft.lora import read_lora

from .families import inputs, logits, moved
from .mixtures import MIXTURES, mixture
from .test_space import point, points

peft = pytest.importorskip("peft")
KNOWN = [name for name in MIXTURES if name != "dbrx"]


def save(tmp_path, name):
    mixture(name).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("name", KNOWN)
def test_peft_reads_what_graft_wrote(tmp_path, name):
    """Also where dense layers have names that peft takes for those of experts (deepseek_v3)."""
    folder = save(tmp_path, name)
    model = models.load(folder)
    kinds = {"form": "linear", "composition": "scaled"}
    down = point(**kinds, on=["experts_down"], size=3, scale=0.7, dropout=0.1)
    adopt(model, [*points("lora", rank=2, on=["linears"]), point(**kinds, on=["experts_up"], size=2), down],
          base=folder)  # fmt: skip
    moved(model)
    save_peft(model, tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(models.load(folder), tmp_path / "theirs").eval()
    assert torch.allclose(loaded(**inputs(model)).logits, logits(model), atol=2e-5)
    assert not torch.allclose(logits(models.load(folder)), logits(model), atol=1e-2)
    assert torch.allclose(logits(load_peft(tmp_path / "theirs")), logits(model), atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4", "jetmoe"])
def test_graft_reads_what_peft_wrote(tmp_path, name):
    folder = save(tmp_path, name)
    targets = ["input_linear.weight", "output_linear.weight"] if name == "jetmoe" else ["gate_up_proj", "down_proj"]
    holder = "" if name == "jetmoe" else "experts."
    given = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=["v_proj"] if name != "jetmoe" else [],
        target_parameters=[f"{holder}{target}" for target in targets],
        rank_pattern={f"{holder}{targets[1]}".replace(".", r"\."): 3}, alpha_pattern={f"0.*{targets[0]}": 7},
    )  # fmt: skip
    torch.manual_seed(0)
    made = peft.get_peft_model(models.load(folder), given).eval()
    moved(made)
    made.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = made(**inputs(made)).logits
    loaded = load_peft(tmp_path / "theirs", base=folder)
    assert torch.allclose(logits(loaded), expected, atol=2e-5)
    assert not torch.allclose(expected, logits(models.load(folder)), atol=1e-3)


def test_dense_layers_with_the_names_of_experts_keep_their_ranks(tmp_path):
    """peft renames such layers where a model has fused experts; they are written as parameters."""
    folder = save(tmp_path, "deepseek_v3")
    model = models.load(folder)
    adopt(model, [point(form="linear", on=["*.q_b_proj"], size=2), *points("lora", rank=3, on=["*.down_proj"])],
          base=folder)  # fmt: skip
    moved(model)
    save_peft(model, tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert all(name.endswith("q_b_proj") for name in config["target_modules"])
    assert all(name.endswith("down_proj.weight") for name in config["target_parameters"])
    loaded = peft.PeftModel.from_pretrained(models.load(folder), tmp_path / "theirs").eval()
    assert torch.allclose(loaded(**inputs(model)).logits, logits(model), atol=2e-5)
    assert torch.allclose(logits(load_peft(tmp_path / "theirs")), logits(model), atol=1e-6)
    scales = {name: change[0].scale for name, change in read_lora(tmp_path / "theirs").changes.items()}
    assert {scale for name, scale in scales.items() if "down_proj" in name} == {16 / 3}
    assert {scale for name, scale in scales.items() if "q_b_proj" in name} == {1.0}


def test_what_peft_has_no_type_for_is_refused(tmp_path):
    model = mixture("dbrx")
    adopt(model, points("lora", rank=2, on=["experts"]), base=tmp_path)
    with pytest.raises(
        RequestError, match=r"mlp.w1 has the experts' rows below each other in one matrix, for which peft"
    ):
        save_peft(model, tmp_path / "theirs")
    model = mixture("deepseek_v3")
    adopt(model, points("lora", rank=2, on=["*.down_proj"], dora=True), base=tmp_path)
    with pytest.raises(RequestError, match=r"peft has none at .*down_proj in a model of experts"):
        save_peft(model, tmp_path / "theirs")
    model = mixture("mixtral")
    adopt(
        model,
        [*points("lora", rank=2, on=["query"], dora=True), *points("lora", rank=2, on=["experts"])],
        base=tmp_path,
    )
    with pytest.raises(RequestError, match="peft has DoRA at all places of an adapter or at none"):
        save_peft(model, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_a_merge_of_peft_folders_says_that_it_reads_linear_layers_alone(tmp_path):
    folder = save(tmp_path, "mixtral")
    model = models.load(folder)
    adopt(model, points("lora", rank=2, on=["query", "experts"]), base=folder)
    save_peft(model, tmp_path / "theirs")
    with pytest.raises(GraftError, match=r"found it on parameters of model.layers.0.mlp.experts, which hold several"):
        read_lora(tmp_path / "theirs")
