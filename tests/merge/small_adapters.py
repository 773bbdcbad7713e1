"""Folders of adapters as peft writes them, with random factors, on the models of `small_family`."""

import peft
import torch

from graft.models import load


def adapter(base, folder, seed=0, **config):
    """An adapter on the model in the folder `base`, written by peft; returns `folder`."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    made = peft.get_peft_model(load(base), peft.LoraConfig(**options | config))
    made.peft_config["default"].base_model_name_or_path = str(base)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "magnitude" in name:
                weight.mul_(1 + 0.05 * torch.randn_like(weight))
            elif "lora_" in name:
                weight.normal_(std=0.05)
            elif "modules_to_save" in name:
                weight.add_(0.05 * torch.randn_like(weight))
    made.save_pretrained(folder)
    return folder


def folded(base, folder):
    """What peft makes of a base and the adapter in `folder`: tensors by name."""
    with torch.no_grad():
        made = peft.PeftModel.from_pretrained(load(base), folder).merge_and_unload()
    return {name: weight.detach().clone() for name, weight in made.state_dict().items()}
