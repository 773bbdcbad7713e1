"""An ensemble of classifiers that is a `transformers` model for sequence classification."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from graft.ensemble.base import Ensemble, to_device
from graft.ensemble.configuration import EnsembleConfig
from graft.ensemble.gate import Told
from graft.errors import RequestError


class EnsembleForSequenceClassification(Ensemble):
    """Classifiers whose class probabilities are combined; `logits` are log-probabilities: [batch, classes] float32."""

    writes = False
    accepts_loss_kwargs = False

    def __init__(self, config: EnsembleConfig, *args: Any, **kwargs: Any):
        check_labels(config)
        super().__init__(config, *args, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Combined log-probabilities `[batch, classes]`; with `labels [batch]` also their mean cross entropy.

        Raises RequestError for an empty text and one longer than a member reads; RunError naming a member that gives
        NaN.
        """
        self._check_asked(kwargs)
        self._check_inputs(input_ids, None)
        assert input_ids is not None
        given = {"attention_mask": attention_mask, **kwargs}
        mixed = self.mixed(*self._told(lambda number: self._classified(number, input_ids, given), None), None)
        loss = None if labels is None else torch.nn.functional.nll_loss(mixed, labels)
        found = SequenceClassifierOutput(loss=loss, logits=mixed)
        return found.to_tuple() if return_dict is False else found

    def _classified(self, number: int, input_ids: torch.Tensor, given: dict[str, Any]) -> Told:
        place = self.active[number]
        member: Any = self.members[place]
        device = next(member.parameters()).device
        inputs = {n: to_device(v, device) for n, v in given.items() if n in self.takes[place] and v is not None}
        logits = member(input_ids=input_ids.to(device), **inputs).logits
        if isinstance(member, EnsembleForSequenceClassification):
            return Told(logits.to(self.device))
        return Told(logits.float().log_softmax(-1).to(self.device))


def check_labels(config: EnsembleConfig) -> None:
    """Raises RequestError for members that classify otherwise than into one of the same labels, in the same order."""
    first: dict[str, str] | None = None
    for entry in config.members:
        kind, labels = entry["config"].get("problem_type"), labels_of(entry["config"])
        if kind not in (None, "single_label_classification") or len(labels) < 2:
            raise RequestError(
                f"member {entry['name']!r}: expected a classifier that chooses one of several labels, found "
                f"{kind or 'a single output'}: votes and mixtures are over classes"
            )
        first = labels if first is None else first
        if labels != first:
            raise RequestError(
                f"member {entry['name']!r} has the labels {', '.join(labels.values())}, "
                f"{config.members[0]['name']!r} has {', '.join(first.values())}: expected the same in the same order"
            )


def labels_of(config: dict[str, Any]) -> dict[str, str]:
    """Labels by their number, as text, of a classifier's configuration."""
    found = config.get("id2label") or {str(n): f"LABEL_{n}" for n in range(int(config.get("num_labels") or 2))}
    return {str(number): str(label) for number, label in found.items()}


AutoModelForSequenceClassification.register(EnsembleConfig, EnsembleForSequenceClassification, exist_ok=True)
