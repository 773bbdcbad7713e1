"""Measuring heads: the class of a text, a tag for each word, the span of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graft import models
from graft.data.examples import Encoder, LabelledCollate, Window
from graft.data.objective_rows import Tokens
from graft.data.rows import Row
from graft.errors import RequestError, RunError
from graft.evaluate import metrics
from graft.evaluate.items import Scored, Subject, scored_texts
from graft.evaluate.limits import longest_context
from graft.evaluate.settings import Headed
from graft.folders import heads_of
from graft.multitask.folder import HeadFacts, find_head
from graft.products import quick_layers

ROWS = 32
"""Rows that are read together."""
LONGEST_ANSWER = 30
"""Tokens of a span at most, as in the evaluations of SQuAD's baselines (Devlin et al. 2019)."""


class HeadScorer:
    """Answers with the heads of the model in a folder; each is loaded when it is asked first."""

    def __init__(self, folder: Path, device: str | None):
        self.folder = Path(folder)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.kinds = set(heads_of(self.folder).values())
        self.tokens_read = 0
        self._loaded: tuple[HeadFacts, Any, Any] | None = None

    def answers(self, subject: Subject) -> bool:
        """Whether a head answers this measure."""
        return isinstance(subject.measure, Headed) and subject.measure.kind in self.kinds

    def score(self, subject: Subject) -> list[Scored]:
        """Every metric of the subject. Raises RequestError where it is not clear which head is meant."""
        measure, task = subject.measure, subject.task
        assert isinstance(measure, Headed)
        assert task is not None
        data = subject.on.rpartition(".")[0] or subject.on
        facts, model, tokenizer = self._load(find_head(self.folder, measure.kind, measure.head, data))
        encoder = Encoder(tokenizer, longest_context(model.config), facts.labels)
        if measure.kind == "classification":
            return self._classified(subject, facts, model, encoder)
        if measure.kind == "tagging":
            return scored_texts(subject, task, self._tagged(subject.records, facts, model, encoder))
        return scored_texts(subject, task, self._spans(subject.records, model, encoder))

    def _load(self, facts: HeadFacts) -> tuple[HeadFacts, Any, Any]:
        if self._loaded is None or self._loaded[0] != facts:
            model = models.load(facts.folder, device=self.device)
            self._loaded = facts, model, models.load_tokenizer(facts.folder)
        return self._loaded

    def _classified(self, subject: Subject, facts: HeadFacts, model: Any, encoder: Encoder) -> list[Scored]:
        """The most probable of the labels there are to choose from. Raises RequestError where the head knows none."""
        task = subject.task
        assert task is not None
        assert task.choices is not None
        choices = task.choices(subject.records[0])
        known = [number for number, label in enumerate(facts.labels) if label in choices]
        if not known:
            raise RequestError(
                f"{subject.on}: expected labels that the head for {facts.task} knows ({', '.join(facts.labels)}), "
                f"found {', '.join(choices)}"
            )
        logits = self._read(model, encoder, "classification", encoder.classified(subject.records))
        found = [facts.labels[known[int(each[known].argmax())]] for (each,) in logits]
        guesses, truths = [choices.index(label) for label in found], [task.right(r) for r in subject.records]
        notes = [{"found": a, "label": choices[b]} for a, b in zip(found, truths, strict=True)]
        scored = (metrics.class_metric(name, guesses, truths, len(choices)) for name in task.metrics)
        return [Scored(metric, sums, notes) for metric, sums in scored]

    def _tagged(self, records: Sequence[Any], facts: HeadFacts, model: Any, encoder: Encoder) -> list[str]:
        """The tags of each record, spaces between them; a word that is cut off has none: `?`."""
        examples = encoder.tagged(records)
        logits = self._read(model, encoder, "tagging", [row for row, _ in examples])
        found = []
        for (each,), (_, tokens) in zip(logits, examples, strict=True):
            best = each.argmax(-1)
            found.append(" ".join(facts.labels[int(best[t])] if t >= 0 else "?" for t in tokens))
        return found

    def _spans(self, records: Sequence[Any], model: Any, encoder: Encoder) -> list[str]:
        """The most probable span of the context of each record, over all its windows."""
        windows = [(place, window) for place, record in enumerate(records) for window in encoder.windows(record)]
        windows = [(place, window) for place, window in windows if len(window.places)]
        logits = self._read(model, encoder, "spans", [window.row for _, window in windows])
        best = [(-np.inf, "")] * len(records)
        for (place, window), (start, end) in zip(windows, logits, strict=True):
            value, (first, last) = best_span(start, end, window)
            if value > best[place][0]:
                context = records[place]["context"]
                best[place] = value, context[int(window.places[first][0]) : int(window.places[last][1])].strip()
        return [text for _, text in best]

    @quick_layers()
    @torch.inference_mode()
    def _read(self, model: Any, encoder: Encoder, kind: str, rows: Sequence[Row]) -> list[tuple[np.ndarray, ...]]:
        """The logits of each row, without padding: of a class, of the tokens' tags, or of a span's start and end."""
        collate = LabelledCollate(kind, Tokens.of(encoder.tokenizer).pad)
        found: dict[int, tuple[np.ndarray, ...]] = {}
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]["input_ids"]))
        for first in range(0, len(order), ROWS):
            places = order[first : first + ROWS]
            batch = collate([rows[place] for place in places])
            self.tokens_read += int(batch["attention_mask"].sum())
            inputs = {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}
            outputs = model(**inputs)
            logits = (outputs.start_logits, outputs.end_logits) if kind == "spans" else (outputs.logits,)
            plain = [each.float().cpu().numpy() for each in logits]
            if not all(np.isfinite(each).all() for each in plain):
                raise RunError("expected finite scores of the head, found others; check the model's weights")
            for number, place in enumerate(places):
                size = len(rows[place]["input_ids"])
                found[place] = tuple(e[number][:size] if kind != "classification" else e[number] for e in plain)
        return [found[place] for place in range(len(rows))]


def best_span(start: np.ndarray, end: np.ndarray, window: Window) -> tuple[float, tuple[int, int]]:
    """(start logit + end logit, (first, last) token of the context) of the best span of LONGEST_ANSWER tokens at most.

    `start`, `end` `[tokens]` are of the whole row. The value is counted from that of no answer, the row's first token.
    """
    begin, count = window.first, len(window.places)
    sums = start[begin : begin + count, None] + end[None, begin : begin + count]
    allowed = np.triu(np.ones_like(sums, bool)) & ~np.triu(np.ones_like(sums, bool), LONGEST_ANSWER)
    first, last = np.unravel_index(int(np.where(allowed, sums, -np.inf).argmax()), sums.shape)
    return float(sums[first, last] - start[0] - end[0]), (int(first), int(last))
