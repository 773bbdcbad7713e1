"""Whether a model that is taken for a decoder reads text from left to right.

Some that `transformers` can make a language model of do not: BERT and its kin without `is_decoder`, XLNet. They see the
very token that they are asked for.
"""

from __future__ import annotations

from typing import Any

import torch

from graft.errors import RequestError

TOLERANCE = 1e-3
"""Of the difference that another token makes in its own place: what rounding may make of it before that place. BERT
with random weights has 2e-3 or more there, decoders have nothing."""


def check_one_way(model: Any) -> None:
    """That nothing of what a decoder says before a token depends on that token: tried on four tokens.

    A model that cannot be called so is let pass. Raises RequestError.
    """
    if model.config.is_encoder_decoder or model.device.type == "meta":
        return
    most = model.config.get_text_config().vocab_size
    rows = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=model.device) % most
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad():  # what it keeps may be trained with later
            logits = model.eval()(input_ids=rows).logits.float()
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return
    finally:
        for module in training:
            module.training = True
    apart = (logits[0] - logits[1]).abs().amax(-1)
    if apart[:-1].max() > max(TOLERANCE, 4 * torch.finfo(model.dtype).eps) * apart[-1]:
        raise RequestError(
            f"expected a decoder, which reads text from left to right, found {type(model).__name__}, which sees the "
            "tokens that come after: give it a head for a task (classification, tagging, spans) or, where its "
            "configuration has `is_decoder`, set that to true and train it"
        )
