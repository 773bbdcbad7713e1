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
from torch.nn import functional as F

from graft.errors import RequestError, RunError
from graft.evaluate.sharing import Request, Row, plan
from graft.lineage import CONTEXTS
from graft.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "local_attention")
"""Names that configurations give to how far a layer looks back."""
UNLIMITED = 10**9
"""Tokenizers that set no limit give a larger number than this."""
LOGIT_BYTES = 128 * 2**20
"""Logits held at once: rows are batched up to this."""
NEAR_TOKENS = 2048
"""Tokens read at once on a processor: what layers make of more of them no longer lies in its caches."""


@dataclass(frozen=True)
class Document:
    """`log_probs [tokens] float64`: natural log of the probability of each token; `bytes` of the text's UTF-8."""

    log_probs: np.ndarray
    bytes: int

    @property
    def bits(self) -> float:
        """Bits for the whole text."""
        return float(-self.log_probs.sum() / np.log(2))


@dataclass(frozen=True)
class Continuation:
    """Sum of the continuation's log-probabilities (natural), whether it is what greedy decoding gives, its tokens."""

    log_prob: float
    greedy: bool
    tokens: int


class Scorer:
    """Scores with one model.

    `context` is the longest input in tokens; None: all that the model can read, of documents 2048 at most.
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
        self.model, self.tokenizer = model.eval(), tokenizer
        self.start = puts_start(tokenizer) if start is None else start
        self.context = context or longest_context(model.config)
        self.longest = context or most_tokens(model.config, tokenizer)
        self.device = next(model.parameters()).device
        self.vocabulary = int(model.config.vocab_size)
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        self.tokens_read = 0
        self._style: str | None = None if share and can_branch(model) else "plain"
        self._window = least_window(model.config)
        self._proved = (0, 0)
        self._prefix: tuple[tuple[int, ...], Any] | None = None

    @property
    def prefix_token(self) -> int:
        """What stands before a text that begins from nothing: the start token, or the end token where there is none."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.cls_token_id):
            if token is not None:
                return int(token)
        raise RequestError("scoring needs a tokenizer with a start or end token; this one has neither")

    # documents

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
            for batch in self._batches(jobs, lambda job: job[2] - job[1]):
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
        fill = getattr(self.model, "padding", 0)  # an id that the model reads at no cost
        inputs = torch.tensor([row + [fill] * (longest - len(row)) for row in rows], device=self.device)
        wanted = torch.tensor([row + [0] * (longest - len(row)) for row in targets], device=self.device)
        logits = self._forward(inputs)
        return _log_probs(logits, wanted).cpu().numpy()

    # continuations

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
            if not context and len(wanted) > 1 and wanted[0] == self.prefix_token:
                context, wanted = wanted[:1], wanted[1:]
            tokens = [*self._before(context, start), *context, *wanted]
            made.append(Request(index, tuple(tokens[-(self.longest + 1) : -1]), tuple(wanted)))
        return sorted(made, key=lambda request: request.tokens)

    def _before(self, tokens: Sequence[int], start: bool) -> list[int]:
        """What goes before the tokens of a context: the start token, if it is asked for and not there already."""
        if not tokens:
            return [self.prefix_token]
        known = [t for t in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) if t is not None][:1]
        return known if start and list(tokens[:1]) != known else []

    def _answers(self, requests: list[Request]) -> Iterator[list[tuple[int, Continuation]]]:
        if self._style == "plain":
            yield from self._plain(requests)
            return
        alone, clusters = plan(requests)
        for cluster in clusters:
            rows = sorted(cluster.rows, key=lambda row: len(row.tokens), reverse=True)
            for batch in self._batches(rows, lambda row: len(row.tokens) + row.prefix // 4):
                found = self._shared(batch)
                yield from [found] if found else self._plain([r for row in batch for r in row.requests])
        self._prefix = None
        yield from self._plain(alone)

    def _plain(self, requests: list[Request]) -> Iterator[list[tuple[int, Continuation]]]:
        """One row a request, padded behind: nothing but causal attention is asked of the model."""
        for batch in self._batches(sorted(requests, key=lambda r: len(r.tokens)), lambda r: len(r.tokens)):
            longest = max(len(r.tokens) for r in batch)
            inputs = torch.tensor([[*r.tokens, *[0] * (longest - len(r.tokens))] for r in batch], device=self.device)
            keep = max(longest - len(r.tokens) + len(r.wanted) for r in batch)
            logits = self._forward(inputs, keep=keep)
            offset = longest - logits.shape[1]
            places = [[len(r.tokens) - len(r.wanted) + j - offset for j in range(len(r.wanted))] for r in batch]
            yield self._gathered(batch, logits, list(enumerate(places)))

    def _gathered(
        self, requests: list[Request], logits: torch.Tensor, places: list[tuple[int, list[int]]]
    ) -> list[tuple[int, Continuation]]:
        """Answers from `logits [rows, length, vocabulary]`; for each request its row and columns."""
        rows = torch.tensor([row for row, here in places for _ in here], device=logits.device)
        columns = torch.tensor([column for _, here in places for column in here], device=logits.device)
        wanted = torch.tensor([token for r in requests for token in r.wanted], device=logits.device)
        chosen = logits[rows, columns].float()
        log_probs = _log_probs(chosen, wanted).double().cpu()
        greedy = (chosen.argmax(-1) == wanted).cpu()
        found, place = [], 0
        for request in requests:
            here = slice(place, place + len(request.wanted))
            place = here.stop
            answer = Continuation(float(log_probs[here].sum()), bool(greedy[here].all()), len(request.wanted))
            found.append((request.index, answer))
        return found

    def _shared(self, rows: list[Row]) -> list[tuple[int, Continuation]] | None:
        """Answers of rows behind one prefix; None where the model cannot read rows as long as these.

        Rows longer than any before are not trusted: some of their branches are read alone and must come out the same.
        """
        extent = (
            rows[0].prefix + max(len(row.tokens) for row in rows),
            max(len(request.tokens) for row in rows for request in row.requests),
        )
        if self._window is not None and max(extent) >= self._window:
            return None
        proved = all(size <= known for size, known in zip(extent, self._proved, strict=True))
        for style in [self._style] if self._style else ["bool", "additive"]:
            if proved:
                return self._branches(rows, style)
            found = self._tried(rows, style)
            if found and self._agrees(found, rows):
                self._style = style
                self._proved = max(extent[0], self._proved[0]), max(extent[1], self._proved[1])
                return found
        self._style = "plain"
        return None

    def _tried(self, rows: list[Row], style: str) -> list[tuple[int, Continuation]] | None:
        """The answers, or None from a model that cannot take such a mask or cache, which each says in its own way."""
        if style == "plain":
            return None
        try:
            return self._branches(rows, style)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, RunError):
            return None

    def _agrees(self, found: list[tuple[int, Continuation]], rows: list[Row]) -> bool:
        """Whether a second branch, the last one of the longest row and the longest request score as they do alone."""
        row = max(rows, key=lambda row: len(row.tokens))
        longest = max((r for row in rows for r in row.requests), key=lambda r: len(r.tokens))
        witnesses = {r.index: r for r in (*row.requests[1:2], row.requests[-1], longest)}
        alone = dict(pair for part in self._plain(list(witnesses.values())) for pair in part)
        tree = dict(found)
        scale = 1e-3 if next(self.model.parameters()).dtype == torch.float32 else 0.1
        return all(abs(alone[i].log_prob - tree[i].log_prob) < scale * max(1, alone[i].tokens / 16) for i in alone)

    def _branches(self, rows: list[Row], style: str) -> list[tuple[int, Continuation]]:
        """Rows read behind their prefix under a mask that keeps branches apart."""
        prefix, longest = rows[0].prefix, max(len(row.tokens) for row in rows)
        inputs = torch.zeros(len(rows), longest, dtype=torch.long)
        positions = torch.zeros(len(rows), longest, dtype=torch.long)
        seen = torch.zeros(len(rows), 1, longest, prefix + longest, dtype=torch.bool)
        seen[:, :, :, :prefix] = True
        for place, row in enumerate(rows):
            size = len(row.tokens)
            inputs[place, :size] = torch.tensor(row.tokens)
            positions[place, :size] = torch.tensor(row.positions)
            seen[place, 0, :size, prefix : prefix + size] = row.seen()
            seen[place, 0, size:, prefix] = True
        cache = self._read_prefix(rows[0].requests[0].tokens[:prefix]) if prefix else None
        logits = self._forward(
            inputs.to(self.device),
            mask=self._mask(seen.to(self.device), style),
            positions=positions.to(self.device),
            cache=None if cache is None else _repeated(cache, prefix, len(rows)),
        )
        requests = [request for row in rows for request in row.requests]
        return self._gathered(
            requests, logits, [(place, here) for place, row in enumerate(rows) for here in row.places]
        )

    def _read_prefix(self, tokens: tuple[int, ...]) -> Any:
        """A cache that holds the tokens; the last one made is kept for the rows behind it."""
        from transformers import DynamicCache

        if self._prefix is None or self._prefix[0] != tokens:
            self._prefix = None
            cache = DynamicCache(config=self.model.config)
            self._forward(torch.tensor([list(tokens)], device=self.device), cache=cache, keep=1)
            self._prefix = (tokens, cache)
        return self._prefix[1]

    def _mask(self, seen: torch.Tensor, style: str) -> torch.Tensor:
        if style == "bool":
            return seen
        dtype = next(self.model.parameters()).dtype
        return torch.zeros(seen.shape, device=seen.device, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    def _decoded(self, requests: Sequence[tuple[str, str]]) -> list[Continuation]:
        """For encoder–decoders: the context goes into the encoder, the continuation into the decoder."""
        results = []
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][0]))
        for batch in self._batches(order, lambda i: len(requests[i][0]) // 2 + len(requests[i][1]) // 2 + 2):
            moved = [_move_spaces(*requests[i]) for i in batch]
            sources = self._encode_all([context for context, _ in moved])
            targets = self._encode_all([continuation for _, continuation in moved])
            if not all(targets):
                raise RequestError("expected continuations of at least one token, found an empty one")
            results += list(zip(batch, self._decode_batch(sources, targets), strict=True))
        return [answer for _, answer in sorted(results, key=lambda pair: pair[0])]

    def _decode_batch(self, sources: list[list[int]], targets: list[list[int]]) -> list[Continuation]:
        inputs, mask = _padded([self._source(ids) for ids in sources], self.device)
        begin = self.model.config.decoder_start_token_id
        decoder, _ = _padded([[begin, *t[:-1]] for t in targets], self.device)
        self.tokens_read += inputs.numel() + decoder.numel()
        logits = self.model(input_ids=inputs, attention_mask=mask, decoder_input_ids=decoder).logits
        requests = [Request(i, (), tuple(t)) for i, t in enumerate(targets)]
        places = [(i, list(range(len(t)))) for i, t in enumerate(targets)]
        return [answer for _, answer in self._gathered(requests, logits, places)]

    # generation

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
            for batch in self._batches(order, lambda i: (len(ids[i]) + max_tokens) // 8):
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
        inputs, mask = _padded(rows, self.device, left=not self.encoder_decoder, fill=int(pad or 0))
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
        self.tokens_read += made.numel()
        texts = self.tokenizer.batch_decode(made[:, begin:], skip_special_tokens=True)
        return [_before(text, stop) for text in texts]

    def _end(self) -> dict[str, Any]:
        """The tokenizer's end token, for a model that does not say itself where it ends (it may know several)."""
        known = self.model.generation_config.eos_token_id is not None
        return {} if known else {"eos_token_id": self.tokenizer.eos_token_id}

    # reading

    def _forward(
        self,
        inputs: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache: Any = None,
        keep: int = 0,
    ) -> torch.Tensor:
        """Logits [rows, length or keep, vocabulary]. Raises RunError where they are NaN."""
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
        logits = self.model(input_ids=inputs, **given).logits
        if torch.isnan(logits[:, -1]).any():
            raise RunError("the model gives NaN logits: its weights are damaged, or its precision is too low")
        return logits

    def _keeps(self) -> bool:
        import inspect

        return "logits_to_keep" in inspect.signature(type(self.model).forward).parameters

    def _batches(self, things: Sequence[Any], length: Any) -> Iterator[list[Any]]:
        """Consecutive things in batches whose logits stay below LOGIT_BYTES, padding counted in."""
        most = max(1, LOGIT_BYTES // (4 * self.vocabulary))
        most = min(most, NEAR_TOKENS) if self.device.type == "cpu" else most
        batch: list[Any] = []
        longest = 0
        for thing in things:
            longest = max(longest, length(thing), 1)
            if batch and longest * (len(batch) + 1) > most:
                yield batch
                batch, longest = [], max(length(thing), 1)
            batch.append(thing)
        if batch:
            yield batch

    def _encode(self, text: str) -> list[int]:
        return self._encode_all([text])[0]

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        from graft.data.render import encode

        return encode(texts, self.tokenizer)

    def _must_be_decoder(self) -> None:
        name = type(self.model).__name__
        if self.encoder_decoder or "MaskedLM" in name or not self.model.can_generate():
            raise RequestError(f"expected a model that predicts text from left to right, found {name}")


class _Stop:
    """Ends a row once what it wrote holds a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: list[str], begin: int):
        self.tokenizer, self.stop, self.begin = tokenizer, stop, begin

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(ids[:, self.begin :], skip_special_tokens=True)
        return torch.tensor([any(s in text for s in self.stop) for text in texts], device=ids.device)


def longest_context(config: Any, most: int = 2048) -> int:
    """Tokens a model can read, `most` at most."""
    return min([most, *_lengths(config)])


def most_tokens(config: Any, tokenizer: Any) -> int:
    """All the tokens that a model can read; where its configuration does not say, as its tokenizer says, else 2048."""
    said = getattr(tokenizer, "model_max_length", None) or UNLIMITED
    return min(_lengths(config), default=2048 if said >= UNLIMITED else int(said))


def _lengths(config: Any) -> list[int]:
    found = [getattr(config, name, None) for name in CONTEXTS]
    return [size for size in found if isinstance(size, int) and size > 0]


def puts_start(tokenizer: Any) -> bool:
    """Whether a tokenizer puts its start token before a text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def can_branch(model: Any) -> bool:
    """Whether what a model keeps of a text is keys and values: a recurrent state runs from one branch into the next."""
    from transformers import DynamicCache

    if getattr(model, "_is_stateful", False) or model.config.is_encoder_decoder:
        return False
    return all(hasattr(layer, "keys") for layer in DynamicCache(config=model.config).layers)


def least_window(config: Any) -> int | None:
    """Tokens that the narrowest layer attends to, members of an ensemble included; None: all there are.

    A mask from outside would widen such a window, or count it in nodes of a row instead of positions.
    """
    plain = config if isinstance(config, dict) else config.to_dict()
    kinds = plain.get("layer_types")
    local = not kinds or any("sliding" in kind or "chunked" in kind for kind in kinds)
    found = [plain.get(name) for name in WINDOWS if local]
    found += [least_window(entry["config"]) for entry in plain.get("members") or () if isinstance(entry, dict)]
    return min((size for size in found if isinstance(size, int) and size > 0), default=None)


def _windows(place: int, tokens: int, context: int) -> Iterator[tuple[int, int, int, int]]:
    """(text, start, end, first scored): windows over targets `start … end`, of which those from `first` on count."""
    end = min(tokens, context)
    yield place, 0, end, 0
    step = max(1, context // 2)
    while end < tokens:
        new = min(tokens, end + step)
        yield place, new - context, new, end
        end = new


def _log_probs(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[wanted] in float32, without making the softmax."""
    logits = logits.float()
    return logits.gather(-1, wanted[..., None])[..., 0] - torch.logsumexp(logits, dim=-1)


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    trailing = len(context) - len(context.rstrip())
    return (context[:-trailing], context[-trailing:] + continuation) if trailing else (context, continuation)


def _repeated(cache: Any, tokens: int, times: int) -> Any:
    """A copy of a cache of one row of `tokens`, for `times` rows; the original stays as it is.

    Raises ValueError where the model did not put the keys and values of every token into it.
    """
    import copy

    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in made.layers:
        if layer.keys is None or layer.keys.shape[2] != tokens:
            raise ValueError(f"expected a cache of {tokens} tokens, found another one")
        layer.keys = layer.keys.expand(times, -1, -1, -1)
        layer.values = layer.values.expand(times, -1, -1, -1)
    return made


def _padded(
    rows: list[list[int]], device: torch.device, *, left: bool = False, fill: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), each [rows, longest]."""
    longest = max(max(map(len, rows)), 1)
    ids = [F.pad(torch.tensor(r, dtype=torch.long), _sides(longest - len(r), left), value=fill) for r in rows]
    mask = [F.pad(torch.ones(len(r), dtype=torch.long), _sides(longest - len(r), left)) for r in rows]
    return torch.stack(ids).to(device), torch.stack(mask).to(device)


def _sides(size: int, left: bool) -> tuple[int, int]:
    return (size, 0) if left else (0, size)


def _before(text: str, stop: Sequence[str]) -> str:
    ends = [text.index(s) for s in stop if s in text]
    return text[: min(ends)] if ends else text
