"""Rules that choose among whole outputs: every member writes its answers, one of them is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import LogitsProcessorList

from graft import models
from graft.ensemble.greedy import pad_of
from graft.ensemble.members import nan_words
from graft.errors import RequestError, RunError

if TYPE_CHECKING:
    from graft.ensemble.base import Ensemble

OURS = ("num_beams", "num_return_sequences", "do_sample", "temperature", "top_p", "top_k")
"""Options of `generate` that say how answers are written: the rule's, unless a call says otherwise."""


@torch.no_grad()
def chosen_outputs(
    model: Ensemble, inputs: torch.Tensor, tokenizer: Any = None, streamer: Any = None, **kwargs: Any
) -> torch.Tensor:
    """The answer to each row of `inputs [batch, length]` that the rule chooses, `[batch, longest]`, padded behind.

    As from `generate`: with the prompt before it for decoders, with the start token for encoder-decoders. `do_sample`
    and `num_beams` above one in a call go before the rule's `draw`. A `streamer` gets the answer in one piece. Raises
    RequestError where there is no tokenizer to compare texts with, for texts longer than a member reads, and for what
    only a single model can return.
    """
    refused = [name for name in ("return_dict_in_generate", "past_key_values") if kwargs.get(name)]
    refused += ["streamer"] if streamer is not None and len(inputs) > 1 else []
    if refused or kwargs.get("num_return_sequences", 1) > 1:
        name = refused[0] if refused else "num_return_sequences"
        raise RequestError(f"an ensemble that chooses one of its members' outputs cannot honour {name}: leave it out")
    reads = tokenizer or _tokenizer(model)
    if not model.config.is_encoder_decoder:
        model._check_inputs(inputs.new_empty(1, inputs.shape[1] + (kwargs.get("max_new_tokens") or 0)), None)
    begin = 1 if model.config.is_encoder_decoder else inputs.shape[1]
    written = [_written(model, place, inputs, kwargs) for place in model.active]
    pad = _pad(model, kwargs)
    choose, rows = cast(Any, model.choose), []
    for row in range(len(inputs)):
        own = [each.unflatten(0, (len(inputs), -1))[row] for each in written]
        texts = [reads.batch_decode(each[:, begin:], skip_special_tokens=True) for each in own]
        place = choose([[text.strip() for text in each] for each in texts], model.weights.tolist(), model.options)
        rows.append([line for each in own for line in each][place])
    if streamer is not None:
        streamer.put(rows[0][:begin].cpu())
        streamer.put(rows[0][begin:].cpu())
        streamer.end()
    longest = max(len(line) for line in rows)
    return torch.stack([torch.nn.functional.pad(line, (0, longest - len(line)), value=pad) for line in rows])


def _tokenizer(model: Ensemble) -> Any:
    if model.folder is None:
        raise RequestError("comparing whole outputs needs a tokenizer: load the ensemble from its folder, or give one")
    return models.load_tokenizer(model.folder)


def _pad(model: Ensemble, kwargs: dict[str, Any]) -> int:
    ends = kwargs.get("eos_token_id") or model.config.eos_token_id
    return pad_of(model, kwargs.get("pad_token_id"), [ends] if isinstance(ends, int) else ends or ())


def _written(model: Ensemble, place: int, inputs: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """What a member writes: `[batch · answers, longest]`, a row's answers side by side, the best first."""
    member: Any = model.members[place]
    device = next(member.parameters()).device
    given = {name: value for name, value in kwargs.items() if name not in OURS}
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    watched = LogitsProcessorList([*(given.pop("logits_processor", None) or ()), _Watch(model, place)])
    given, how = {**given, "logits_processor": watched}, _how(kwargs, model.options)
    if not how.get("do_sample") or kwargs.get("do_sample"):
        return member.generate(inputs.to(device), **given, **how).to(inputs.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(model.options.seed * 1000 + place)
        return member.generate(inputs.to(device), **given, **how).to(inputs.device)


def _how(kwargs: dict[str, Any], options: Any) -> dict[str, Any]:
    """How answers are written: what the call says, else the rule."""
    count = options.candidates
    said = {name: kwargs[name] for name in OURS if kwargs.get(name) is not None and name != "num_return_sequences"}
    if said.get("do_sample") or (said.get("num_beams", 1) == 1 and options.draw == "samples"):
        own = {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        return {**own, **said, "num_beams": 1, "do_sample": True, "num_return_sequences": count}
    beams = max(count, said.get("num_beams", 1))
    return {"do_sample": False, "num_beams": beams, "num_return_sequences": count}


class _Watch:
    """Raises RunError naming the member whose logits are NaN."""

    def __init__(self, model: Ensemble, place: int):
        self.entry = model.config.members[place]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            raise RunError(nan_words(self.entry))
        return scores
