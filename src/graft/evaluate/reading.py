"""Reading rows of tokens with a model: batches of a bounded size, their logits, and the answers in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn import functional as F

from graft.errors import RunError
from graft.evaluate.sharing import Request
from graft.prefix_lm import prefix_lms, read_both_ways

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
LOGIT_BYTES = 128 * 2**20
"""Logits held at once: rows are batched up to this."""
NEAR_TOKENS = 2048
"""Tokens read at once on a processor: what layers make of more of them no longer lies in its caches."""
PIECE = 2**20
"""Logits whose exponentials are summed at once on a processor, for the same reason."""


@dataclass(frozen=True)
class Continuation:
    """Sum of the continuation's log-probabilities (natural), whether it is what greedy decoding gives, its tokens."""

    log_prob: float
    greedy: bool
    tokens: int


Answers = list[tuple[int, Continuation]]
"""With the number of the request that each answers."""


class Reader:
    """Reads with one model and counts the tokens."""

    def __init__(self, model: PreTrainedModel):
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.tokens_read = 0
        self.normalised = bool(getattr(model, "gives_log_probs", False))
        self.both_ways = bool(prefix_lms(model))

    def forward(
        self,
        inputs: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache: Any = None,
        keep: int = 0,
        prompts: Sequence[int] = (),
    ) -> torch.Tensor:
        """Logits [rows, length or keep, vocabulary]. Raises RunError where they are NaN.

        `prompts`: how many tokens of each row a prefix LM reads both ways.
        """
        given: dict[str, Any] = {"use_cache": cache is not None}
        if mask is not None:
            given["attention_mask"] = mask
        if positions is not None:
            given["position_ids"] = positions
        if cache is not None:
            given["past_key_values"] = cache
        if keep and self._keeps():
            given["logits_to_keep"] = keep
        self.tokens_read += inputs.numel()
        with read_both_ways(self.model, torch.tensor(prompts)) if prompts and self.both_ways else nullcontext():
            logits = self.model(input_ids=inputs, **given).logits
        if torch.isnan(logits[:, -1]).any():
            raise RunError("the model gives NaN logits: its weights are damaged, or its precision is too low")
        return logits

    def told(self, inputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the wanted tokens `[rows, length]`, of the model itself where it works them out without
        all others (a mixture)."""
        if (own := getattr(self.model, "log_probs_of", None)) is not None:
            found: torch.Tensor | None = own(inputs, wanted)
            if found is not None:
                self.tokens_read += inputs.numel()
                return found
        return self.log_probs(self.forward(inputs), wanted)

    def _keeps(self) -> bool:
        import inspect

        return "logits_to_keep" in inspect.signature(type(self.model).forward).parameters

    def batches(self, things: Sequence[T], length: Callable[[T], int]) -> Iterator[list[T]]:
        """Consecutive things in batches whose logits stay below LOGIT_BYTES, padding counted in."""
        most = max(1, LOGIT_BYTES // (4 * self.vocabulary))
        most = min(most, NEAR_TOKENS) if self.device.type == "cpu" else most
        batch: list[T] = []
        longest = 0
        for thing in things:
            longest = max(longest, length(thing), 1)
            if batch and longest * (len(batch) + 1) > most:
                yield batch
                batch, longest = [], max(length(thing), 1)
            batch.append(thing)
        if batch:
            yield batch

    def plain(self, requests: list[Request]) -> Iterator[Answers]:
        """One row a request, padded behind: nothing but its own attention is asked of the model."""
        for batch in self.batches(sorted(requests, key=lambda r: len(r.tokens)), lambda r: len(r.tokens)):
            longest = max(len(r.tokens) for r in batch)
            inputs = torch.tensor([[*r.tokens, *[0] * (longest - len(r.tokens))] for r in batch], device=self.device)
            keep = max(longest - len(r.tokens) + len(r.wanted) for r in batch)
            logits = self.forward(inputs, keep=keep, prompts=[r.prompt for r in batch])
            offset = longest - logits.shape[1]
            places = [[len(r.tokens) - len(r.wanted) + j - offset for j in range(len(r.wanted))] for r in batch]
            yield self.gathered(batch, logits, list(enumerate(places)))

    def gathered(self, requests: list[Request], logits: torch.Tensor, places: list[tuple[int, list[int]]]) -> Answers:
        """Answers from `logits [rows, length, vocabulary]`; for each request its row and columns."""
        rows = torch.tensor([row for row, here in places for _ in here], device=logits.device)
        columns = torch.tensor([column for _, here in places for column in here], device=logits.device)
        wanted = torch.tensor([token for r in requests for token in r.wanted], device=logits.device)
        chosen = logits[rows, columns].float()
        log_probs = self.log_probs(chosen, wanted).double().cpu()
        greedy = (chosen.argmax(-1) == wanted).cpu()
        found, place = [], 0
        for request in requests:
            here = slice(place, place + len(request.wanted))
            place = here.stop
            answer = Continuation(float(log_probs[here].sum()), bool(greedy[here].all()), len(request.wanted))
            found.append((request.index, answer))
        return found

    def log_probs(self, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Of the wanted tokens `[...]`, from `logits [..., vocabulary]`; an ensemble's are normalised."""
        if self.normalised:
            return logits.gather(-1, wanted[..., None])[..., 0].float()
        return log_probs_of_wanted(logits, wanted)


def log_probs_of_wanted(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[wanted] `[...]` in float32, without making the softmax; `logits [..., vocabulary]`."""
    own = logits.gather(-1, wanted[..., None])[..., 0].float()
    rows = logits.flatten(0, -2)
    size = max(1, PIECE // rows.shape[-1]) if logits.device.type == "cpu" else len(rows)
    sums = [piece.float().logsumexp(-1) for piece in rows.split(max(1, size))]
    return own - torch.cat(sums).view(own.shape)


def padded(
    rows: list[list[int]], device: torch.device, *, left: bool = False, fill: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), each [rows, longest]."""
    longest = max(max(map(len, rows)), 1)
    ids = [F.pad(torch.tensor(r, dtype=torch.long), _sides(longest - len(r), left), value=fill) for r in rows]
    mask = [F.pad(torch.ones(len(r), dtype=torch.long), _sides(longest - len(r), left)) for r in rows]
    return torch.stack(ids).to(device), torch.stack(mask).to(device)


def _sides(size: int, left: bool) -> tuple[int, int]:
    return (size, 0) if left else (0, size)
