"""What a model says of texts: log-probabilities of documents, of continuations and of choices, and generated text.

Shared text is read once (`sharing.py`): what many requests begin with (a few-shot prompt) goes into a cache; requests
that go on alike (one question, several choices) are branches of one row, in which a mask lets each token see only what
leads to it. Whether a model honours such masks is found out on the model itself, on the longest rows there are, by
comparing with plain rows; where it does not, plain rows are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from graft.allocator import memory_kept
from graft.errors import RequestError
from graft.evaluate.branches import Branches
from graft.evaluate.limits import longest_context, most_tokens, puts_start
from graft.evaluate.reading import Answers, Continuation, Reader, padded
from graft.evaluate.sharing import Request, plan, plan_prompts
from graft.one_way import check_one_way
from graft.products import quick_layers
from graft.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Document:
    """`log_probs [tokens] float64`: natural log of the probability of each token; `bytes` of the text's UTF-8."""

    log_probs: np.ndarray
    bytes: int

    @property
    def bits(self) -> float:
        """Bits for the whole text."""
        return float(-self.log_probs.sum() / np.log(2))


class Scorer:
    """Scores with one model.

    `context` is the longest input in tokens; None: all that the model can read, of documents 2048 at most.
    A prefix LM reads the context of a request, and a prompt, both ways, as in its training; documents have no prompt.
    Requests and prompts begin with the start token where `start` says so; None: where the tokenizer puts one itself.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        context: int | None = None,
        start: bool | None = None,
        share: bool = True,
    ):
        self.reader = Reader(model)
        self.model, self.device, self.tokenizer = self.reader.model, self.reader.device, tokenizer
        self.start = puts_start(tokenizer) if start is None else start
        self.context = context or longest_context(model.config)
        self.longest = context or most_tokens(model.config, tokenizer)
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        self.branches = Branches(self.reader, share)
        self.is_one_way = False

    @property
    def tokens_read(self) -> int:
        """By the model so far."""
        return self.reader.tokens_read

    @property
    def prefix_token(self) -> int:
        """What stands before a text that begins from nothing: the start token, or the end token where there is none."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.cls_token_id):
            if token is not None:
                return int(token)
        raise RequestError("scoring needs a tokenizer with a start or end token; this one has neither")

    # documents

    @memory_kept()
    @quick_layers()
    @torch.inference_mode()
    def documents(self, texts: Sequence[str]) -> list[Document]:
        """The log-probability of every token of every text, each scored once.

        Texts longer than the context are read in windows that overlap by half, so that a token has at least half a
        context before it. Raises RequestError for models that do not predict text from left to right.
        """
        self._must_be_decoder()
        ids = [self._encode(text) for text in texts]
        scores = [np.zeros(len(tokens)) for tokens in ids]
        jobs = [job for place, tokens in enumerate(ids) if tokens for job in _windows(place, len(tokens), self.context)]
        jobs.sort(key=lambda job: job[2] - job[1])
        with Progress("scoring", sum(len(tokens) for tokens in ids), "tokens") as progress:
            for batch in self.reader.batches(jobs, lambda job: job[2] - job[1]):
                rows = [[self.prefix_token, *ids[place]][start:end] for place, start, end, _ in batch]
                targets = [ids[place][start:end] for place, start, end, _ in batch]
                log_probs = self._target_log_probs(rows, targets)
                for (place, start, end, first), row in zip(batch, log_probs, strict=True):
                    scores[place][first:end] = row[first - start : end - start]
                    progress.advance(end - first)
        return [Document(s, len(t.encode("utf-8", "surrogatepass"))) for s, t in zip(scores, texts, strict=True)]

    def _target_log_probs(self, rows: list[list[int]], targets: list[list[int]]) -> np.ndarray:
        """[rows, length] log-probability of each target given the row up to it; padding behind is never looked at."""
        longest = max(map(len, rows))
        # an id that the model reads at no cost, or any but that of padding, of which transformers warns without a mask
        fill = getattr(self.model, "padding", int(self.model.config.get_text_config().pad_token_id == 0))
        inputs = torch.tensor([row + [fill] * (longest - len(row)) for row in rows], device=self.device)
        wanted = torch.tensor([row + [0] * (longest - len(row)) for row in targets], device=self.device)
        return self.reader.told(inputs, wanted).cpu().numpy()

    # continuations

    @memory_kept()
    @quick_layers()
    @torch.inference_mode()
    def loglikelihoods(self, requests: Sequence[tuple[str, str]], *, start: bool | None = None) -> list[Continuation]:
        """log p(continuation | context) of each (context, continuation); `start` instead of the scorer's own.

        Tokens as lm-eval cuts them: spaces at the end of a context go to its continuation, both are tokenised together,
        an empty context becomes the start token, and what is too long loses its beginning. Raises RequestError for a
        continuation that is empty or longer than the model can read.
        """
        if self.encoder_decoder:
            return self._decoded(requests)
        self._must_be_decoder()
        prepared = self._prepared(requests, self.start if start is None else start)
        results: list[Continuation | None] = [None] * len(requests)
        with Progress("scoring", len(requests), "requests") as progress:
            for found in self._answers(prepared):
                for index, result in found:
                    results[index] = result
                progress.advance(len(found))
        return [result for result in results if result is not None]

    def _prepared(self, requests: Sequence[tuple[str, str]], start: bool) -> list[Request]:
        """Requests as tokens, sorted so that those which begin alike stand together."""
        moved = [_move_spaces(context, continuation) for context, continuation in requests]
        wholes = self._encode_all([c + k for c, k in moved])
        contexts = self._encode_all([c for c, _ in moved])
        made = []
        for index, (whole, context, (_, continuation)) in enumerate(zip(wholes, contexts, moved, strict=True)):
            wanted = whole[len(context) :] or self._encode(continuation)  # where both are one token, each is its own
            if not 0 < len(wanted) <= self.longest:
                raise RequestError(
                    f"request {index}: expected a continuation of at least one token and at most {self.longest}, "
                    f"found {len(wanted)}: {continuation[:80]!r}"
                )
            tokens = [*self._before(context, start), *context, *wanted]
            made.append(Request(index, tuple(tokens[-(self.longest + 1) : -1]), tuple(wanted)))
        return sorted(made, key=lambda request: request.tokens)

    def _before(self, tokens: Sequence[int], start: bool) -> list[int]:
        """What goes before the tokens of a context, which hold no special ones: the start token, if it is asked for."""
        if not tokens:
            return [self.prefix_token]
        known = [t for t in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) if t is not None][:1]
        return known if start else []

    def _answers(self, requests: list[Request]) -> Iterator[Answers]:
        if self.branches.style == "plain":
            yield from self.reader.plain(requests)
            return
        alone, clusters = (plan_prompts if self.reader.both_ways else plan)(requests)
        for cluster in clusters:
            rows = sorted(cluster.rows, key=lambda row: len(row.tokens), reverse=True)
            for batch in self.reader.batches(rows, lambda row: len(row.tokens) + row.prefix // 4):
                found = self.branches.answers(batch)
                yield from [found] if found else self.reader.plain([r for row in batch for r in row.requests])
        self.branches.forget()
        yield from self.reader.plain(alone)

    def _decoded(self, requests: Sequence[tuple[str, str]]) -> list[Continuation]:
        """For encoder–decoders: the context goes into the encoder, the continuation into the decoder."""
        results = []
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][0]))
        for batch in self.reader.batches(order, lambda i: len(requests[i][0]) // 2 + len(requests[i][1]) // 2 + 2):
            moved = [_move_spaces(*requests[i]) for i in batch]
            sources = self._encode_all([context for context, _ in moved])
            targets = self._encode_all([continuation for _, continuation in moved])
            if not all(targets):
                raise RequestError("expected continuations of at least one token, found an empty one")
            results += list(zip(batch, self._decode_batch(sources, targets), strict=True))
        return [answer for _, answer in sorted(results, key=lambda pair: pair[0])]

    def _decode_batch(self, sources: list[list[int]], targets: list[list[int]]) -> list[Continuation]:
        inputs, mask = padded([self._source(ids) for ids in sources], self.device)
        begin = self.model.config.decoder_start_token_id
        decoder, _ = padded([[begin, *t[:-1]] for t in targets], self.device)
        self.reader.tokens_read += inputs.numel() + decoder.numel()
        logits = self.model(input_ids=inputs, attention_mask=mask, decoder_input_ids=decoder).logits
        requests = [Request(i, (), tuple(t)) for i, t in enumerate(targets)]
        places = [(i, list(range(len(t)))) for i, t in enumerate(targets)]
        return [answer for _, answer in self.reader.gathered(requests, logits, places)]

    # generation

    @memory_kept()
    @quick_layers()
    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[str], *, max_tokens: int = 64, stop: Sequence[str] = (), start: bool | None = None
    ) -> list[str]:
        """What the model writes after each prompt, greedily, up to the first of `stop` (left out) or `max_tokens`.

        A prompt that is too long loses its beginning. Raises RequestError where `max_tokens` leave no room for one.
        """
        written: list[str] = [""] * len(prompts)
        ids = self._encode_all(list(prompts))
        room = self.longest - max_tokens
        if room < 1 and not self.encoder_decoder:
            raise RequestError(f"expected fewer than {self.longest} tokens to write, all the model reads: {max_tokens}")
        begin = self.start if start is None else start
        order = sorted(range(len(prompts)), key=lambda i: len(ids[i]))
        with Progress("generating", len(prompts), "prompts") as progress:
            for batch in self.reader.batches(order, lambda i: (len(ids[i]) + max_tokens) // 8):
                rows = [self._prompt(ids[i], room, begin) for i in batch]
                for i, text in zip(batch, self._generate_batch(rows, max_tokens, stop), strict=True):
                    written[i] = text
                progress.advance(len(batch))
        return written

    def _prompt(self, ids: list[int], room: int, start: bool) -> list[int]:
        """The last tokens of a prompt that leave room for what is written."""
        return self._source(ids) if self.encoder_decoder else [*self._before(ids, start), *ids][-room:]

    def _source(self, ids: list[int]) -> list[int]:
        """What an encoder reads: its end is marked as in training."""
        end = self.tokenizer.eos_token_id
        return [*ids[: self.longest - 1], *([] if end is None else [int(end)])]

    def _generate_batch(self, rows: list[list[int]], max_tokens: int, stop: Sequence[str]) -> list[str]:
        from transformers import StoppingCriteriaList

        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        inputs, mask = padded(rows, self.device, left=not self.encoder_decoder, fill=int(pad or 0))
        begin = 1 if self.encoder_decoder else inputs.shape[1]
        stops = StoppingCriteriaList([_Stop(self.tokenizer, list(stop), begin)] if stop else [])
        made = self.model.generate(
            inputs,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=int(pad or 0),
            stopping_criteria=stops,
            **self._end(),
        )
        self.reader.tokens_read += made.numel()
        texts = self.tokenizer.batch_decode(made[:, begin:], skip_special_tokens=True)
        return [_before(text, stop) for text in texts]

    def _end(self) -> dict[str, Any]:
        """The tokenizer's end token, for a model that does not say itself where it ends (it may know several)."""
        known = self.model.generation_config.eos_token_id is not None
        return {} if known else {"eos_token_id": self.tokenizer.eos_token_id}

    # tokens

    def _encode(self, text: str) -> list[int]:
        return self._encode_all([text])[0]

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        from graft.data.render import encode

        return encode(texts, self.tokenizer)

    def _must_be_decoder(self) -> None:
        name = type(self.model).__name__
        if self.encoder_decoder or "MaskedLM" in name or not self.model.can_generate():
            raise RequestError(f"expected a model that predicts text from left to right, found {name}")
        if not self.is_one_way:
            check_one_way(self.model)
            self.is_one_way = True


class _Stop:
    """Ends a row once what it wrote holds a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: list[str], begin: int):
        self.tokenizer, self.stop, self.begin = tokenizer, stop, begin

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(ids[:, self.begin :], skip_special_tokens=True)
        return torch.tensor([any(s in text for s in self.stop) for text in texts], device=ids.device)


def _windows(place: int, tokens: int, context: int) -> Iterator[tuple[int, int, int, int]]:
    """(text, start, end, first scored): windows over targets `start … end`, of which those from `first` on count."""
    end = min(tokens, context)
    yield place, 0, end, 0
    step = max(1, context // 2)
    while end < tokens:
        new = min(tokens, end + step)
        yield place, new - context, new, end
        end = new


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    trailing = len(context) - len(context.rstrip())
    return (context[:-trailing], context[-trailing:] + continuation) if trailing else (context, continuation)


def _before(text: str, stop: Sequence[str]) -> str:
    ends = [text.index(s) for s in stop if s in text]
    return text[: min(ends)] if ends else text
