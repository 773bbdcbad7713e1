"""What quantising does: a model is loaded packed and written so, or unpacked into a plain model and written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graft import models
from graft.adapters.facts import adapted_base, check_base, entry_of
from graft.adapters.packed import is_packed
from graft.adapters.places import sizes
from graft.adapters.trial import skeleton
from graft.errors import RequestError
from graft.folders import read_config
from graft.quantize import QuantizeSettings, wanted
from graft.verb import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run(job: Job) -> dict[str, Any]:
    """Write the packed or plain model into `job.out`; returns how many bytes its weights take and took."""
    settings = job.settings
    assert isinstance(settings, QuantizeSettings)
    start = job.models[settings.from_]
    below = adapted_base(start)
    if settings.bits == 16:
        dtype = getattr(torch, settings.dtype)
        model = unpacked(models.load(below or start, dtype=dtype, device=job.device))
    else:
        model = packed(start, settings, job.device)
    size = weight_bytes(model)
    if below is None:
        models.save(model, _tokenizer(start), job.out)
    else:
        _save_with_adapters(model, start, below, job.out)
    before = sum(path.stat().st_size for path in (below or start).glob("*.safetensors"))
    return {"bytes": size, "bytes_before": before}


def _save_with_adapters(model: PreTrainedModel, adapter: Path, base: Path, out: Path) -> None:
    """Write `model`, which was unpacked from `base`, with the active adapters of the folder `adapter` in its weights.

    Raises CheckpointError where they were made for another base, RequestError for adapters that do not fold.
    """
    from graft.adapters.folder import put_on
    from graft.adapters.folding import save_folded

    check_base(adapter, entry_of(adapter), base)
    save_folded(put_on(model, adapter, base), out)
    if (tokenizer := _tokenizer(adapter)) is not None:
        tokenizer.save_pretrained(out)


def _tokenizer(folder: Path) -> Any:
    return models.load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None


def packed(folder: Path, settings: QuantizeSettings, device: str | None = None) -> PreTrainedModel:
    """The model of a folder with its linear layers in 8 or 4 bits (LLM.int8(), Dettmers et al. 2022; NF4, 2023).

    Raises RequestError where it has no linear layer that could be packed.
    """
    from transformers import BitsAndBytesConfig

    said = wanted(settings, _heads(read_config(folder)) if settings.keep else ())
    entry = {name: value for name, value in said.items() if name != "quant_method"}
    model = models.load(folder, dtype=settings.dtype, device=device, quantization=BitsAndBytesConfig(**entry))
    if not any(is_packed(module) for module in model.modules()):
        raise RequestError(f"{folder}: expected linear layers to quantise, found none outside of {settings.keep}")
    return model


def _heads(config: dict[str, Any]) -> list[str]:
    """The name of the head over the vocabulary, else of the last linear layer, of the model of this configuration."""
    model = skeleton(config)
    if model is None:
        return []
    head = model.get_output_embeddings()
    linears = [name for name, module in model.named_modules() if sizes(module) is not None]
    return [name for name, module in model.named_modules() if head is not None and module is head] or linears[-1:]


def unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """A plain model of the same class whose weights are those that the packed ones stand for."""
    values = model.dequantize().state_dict()
    config = type(model.config)(
        **{key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    plain = type(model)._from_config(config, dtype=model.dtype)
    # a layer that stores its weight the other way round (GPT-2's) was unpacked as an ordinary one
    turned = {name for name, module in plain.named_modules() if type(module).__name__ == "Conv1D"}
    put = {
        name: value.t() if name.removesuffix(".weight") in turned and name.endswith(".weight") else value
        for name, value in values.items()
    }
    plain.load_state_dict(put)
    return plain.eval()


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's weights in memory, shared ones once, the constants of packed ones included."""
    found = {id(p): p for p in model.parameters()}
    states = [getattr(p, "quant_state", None) for p in found.values()]
    constants = [
        t for s in states if s is not None for t in (s.absmax, s.code, *((s.state2.absmax,) if s.nested else ()))
    ]
    scales = [scale for p in found.values() if (scale := getattr(p, "SCB", None)) is not None]
    return sum(t.numel() * t.element_size() for t in [*found.values(), *constants, *scales])
