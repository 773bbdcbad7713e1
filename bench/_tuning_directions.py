"""AdapterFusion and MAD-X between directions of translation (Tatoeba), for tuning_help.py.

English to German and to French, and back, have adapters of their own. German and French are joined by the English
sentences that both have.

`fusion`: attention over the four adapters learned for a fifth direction, between German and French, of which few pairs
are there; beside an adapter of its own, that of the same target as it is and trained on, and full tuning.
`transfer`: a task adapter of one direction tested on the one that has the other foreign language in its place: alone,
over a text adapter of its own language, and with that one swapped (MAD-X); beside the tested language's text adapter
alone, and a task adapter of the tested direction. Text adapters learn from sentences of the language alone.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from random import Random
from typing import Any

import torch

import graft
from _help import write_lines
from _tuning_runs import SHARED, WORK, Record, Sample, Task, Tuned, named, points_of, started, tuned
from _tuning_ways import Move, Ways
from graft.adapters.stack import adapters_of, adopt

Pairs = Mapping[str, Mapping[str, str]]
"""By language, its sentence for an English one."""
FOREIGN = ("de", "fr")
KNOWN = ("en-de", "de-en", "en-fr", "fr-en")
NEW = {"de-fr": "en-fr", "fr-de": "en-de"}
"""Directions between German and French, and those with the same target."""
MOVES: dict[Move, tuple[str, str]] = {
    ("en-fr", "en-de"): ("fr", "de"), ("en-de", "en-fr"): ("de", "fr"),
    ("fr-en", "de-en"): ("fr", "de"), ("de-en", "fr-en"): ("de", "fr"),
}  # fmt: skip
"""Where a task adapter is trained and tested, and the foreign languages of both."""
LONGEST = 50
"""Characters of an English sentence."""
FEW = 200
"""Pairs of a new direction."""
WIDTH, STEPS = 32, 60
STARTS = {"adapter": 1e-2, "text adapter": 1e-2, "fusion": 3e-3, "full tuning": 1e-3}
ALONE, NEAREST, ONWARD = "adapter of its own", "adapter of the same target", "adapter of the same target, trained on"
OTHERS, ALL, FULL = "AdapterFusion of the four", "AdapterFusion of the four and its own", "full tuning"
FUSIONS = (NEAREST, ALONE, ONWARD, OTHERS, ALL, FULL)
UNTUNED, TEXT, PLAIN = "untuned", "the tested language's text adapter alone", "task adapter alone"
UNSWAPPED, SWAPPED = "over its own text adapter", "MAD-X: text adapter swapped"
DIRECT, CEILING = "task adapter of the tested direction", "the same over the tested language's text adapter"
TRANSFERS = (UNTUNED, TEXT, PLAIN, UNSWAPPED, SWAPPED, DIRECT, CEILING)


def joined(by_language: Pairs, source: str, target: str) -> list[Record]:
    """Records of a direction, by the English sentences that both languages have."""
    shared = [english for english in by_language[source] if english in by_language[target]]
    return [{"source": by_language[source][each], "target": by_language[target][each]} for each in shared]


def read(split: str) -> Pairs:
    """Short sentences of a split in all three languages."""
    found: dict[str, dict[str, str]] = {}
    for language in FOREIGN:
        files = {"train": "train.jsonl.xz", "dev": "val.jsonl.gz", "test": "test.jsonl.gz"}
        paths = {name: f"mt_tatoeba/en-{language}.{file}" for name, file in files.items()}
        source = graft.data.parse({"source": "jsonl", "format": "raw", **paths})
        found[language] = {}
        for record in graft.data.open_corpus({language: source}, language, SHARED).records(split):
            if len(record["en"]) <= LONGEST:
                told = record["tgt"]
                found[language].setdefault(record["en"], told if isinstance(told, str) else told[0])
    return {"en": {each: each for own in found.values() for each in own}, **found}


class Directions(Ways):
    """Every training of one setup, noted at once."""

    starts = STARTS

    def __init__(self, base: Path, given: Namespace):
        self.base, self.given = base, given
        self.steps = given.steps or STEPS
        super().__init__(f"directions-{named(base)}-{self.steps}-{given.limit}", "bits_per_byte", given)

    @cached_property
    def samples(self) -> dict[str, Sample]:
        """The records of each direction; few to train on where it is new."""
        texts = {split: read(split) for split in ("train", "dev", "test")}
        return {name: self._sample(name, texts) for name in (*KNOWN, *NEW)}

    def _sample(self, name: str, texts: Mapping[str, Pairs]) -> Sample:
        counts = {"train": FEW if name in NEW else self.given.train, "dev": self.given.limit // 2}
        counts["test"] = self.given.limit
        found = {split: joined(texts[split], *name.split("-")) for split in counts}
        records = {split: Random(0).sample(found[split], min(counts[split], len(found[split]))) for split in counts}
        folder = WORK / "data" / "-".join(["directions", name, *map(str, counts.values())])
        for split, own in records.items():
            write_lines(folder / f"{split}.jsonl", own)
        task = Task(name, "text", "bits_per_byte", {}, lambda _: True, batch=4, steps=STEPS)
        return Sample(task, records, [], folder)

    def text(self, language: str) -> Sample:
        """The sentences of a language, those that its directions translate into."""
        own = self.samples[f"en-{language}"]
        found = [{"text": record["target"]} for record in own.records["train"]]
        folder = own.folder / "text"
        write_lines(folder / "train.jsonl", found)
        return Sample(own.task, {"train": found}, [], folder)

    def spoken(self, language: str) -> Sample:
        """The same of the dev split, each sentence after an empty line."""
        own = self.samples[f"en-{language}"]
        dev = [{"source": "", "target": record["target"]} for record in own.records["dev"]]
        return replace(own, records={"dev": dev})

    def trial(self, kind: str, rate: float, seed: int) -> tuple[Tuned, Sample]:
        """A training of this kind, and what it is judged on: adapters on French, the others on German to French."""
        if kind == "text adapter":
            whole = started(self.base, points_of("mad_x", {"width": WIDTH}), seed)
            return self._learn(*whole, self.text("fr"), seed, rate), self.spoken("fr")
        if kind == "fusion":
            return self._fused(*self._four(seed), KNOWN, "de-fr", seed, rate), self.samples["de-fr"]
        points = points_of("pfeiffer", {"width": WIDTH}) if kind == "adapter" else None
        own = self.samples["en-fr" if kind == "adapter" else "de-fr"]
        return self._learn(*started(self.base, points, seed), own, seed, rate), own

    def fill(self) -> None:
        """The searches, then everything, a seed after the other."""
        for seed in range(self.given.seeds):
            if self.lacks(TRANSFERS, list(MOVES), seed):
                self._transfer(seed)
            if self.lacks(FUSIONS, [(name, name) for name in NEW], seed):
                self._fuse(seed)

    def _learn(self, model: Any, tokenizer: Any, given: Sample, seed: int, rate: float) -> Tuned:
        return tuned(model, tokenizer, given, rate=rate, seed=seed, steps=self.steps)

    def _added(
        self, model: Any, tokenizer: Any, name: str, given: Sample, seed: int, below: Sequence[str] = ()
    ) -> Tuned:
        """A fresh adapter of the model, over those `below`, trained."""
        torch.manual_seed(seed)
        if (stack := adapters_of(model)) is not None:
            stack.use(list(below))
        adopt(model, points_of("pfeiffer", {"width": WIDTH}), name)
        return self._learn(model, tokenizer, given, seed, self.rate("adapter"))

    @cache  # noqa: B019
    def _four(self, seed: int) -> tuple[Any, Any]:
        """A model with an adapter for each known direction."""
        model, tokenizer = started(self.base, [], seed)
        for name in KNOWN:
            self._added(model, tokenizer, name, self.samples[name], seed)
        return model, tokenizer

    def _fused(self, model: Any, tokenizer: Any, names: Sequence[str], direction: str, seed: int, rate: float) -> Tuned:
        """Attention over some of the adapters, for one direction."""
        torch.manual_seed(seed)
        stack = model.graft_adapters
        if "fusion" in stack.points:
            stack.drop("fusion")
        stack.use(list(names))
        adopt(model, points_of("fusion", {}), "fusion")
        return self._learn(model, tokenizer, self.samples[direction], seed, rate)

    def _fuse(self, seed: int) -> None:
        """The ways to a new direction; the adapters that are trained on come last, since they change."""
        rates = {kind: self.rate(kind) for kind in ("adapter", "fusion", "full tuning")}
        model, tokenizer = self._four(seed)
        stack = model.graft_adapters
        for name, nearest in NEW.items():
            note = partial(self.note, move=(name, name), seed=seed, tested=self.samples[name])
            stack.use(nearest)
            note(Tuned(self.samples[name], model, tokenizer, None, 0, 0), NEAREST)
            note(self._added(model, tokenizer, name, self.samples[name], seed), ALONE)
            for way, names in ((OTHERS, KNOWN), (ALL, (*KNOWN, name))):
                note(self._fused(model, tokenizer, names, name, seed, rates["fusion"]), way)
            whole = started(self.base, None, seed)
            note(self._learn(*whole, self.samples[name], seed, rates["full tuning"]), FULL)
        for name, nearest in NEW.items():
            stack.use(nearest)
            stack.train_only(model, nearest)
            done = self._learn(model, tokenizer, self.samples[name], seed, rates["adapter"])
            self.note(done, ONWARD, (name, name), seed, self.samples[name])

    def _transfer(self, seed: int) -> None:
        """Task adapters on the other foreign language, with and without text adapters below."""
        rate = self.rate("text adapter")
        model, tokenizer = self._four(seed)
        stack = model.graft_adapters
        for language in FOREIGN:
            torch.manual_seed(seed)
            stack.use(None)
            adopt(model, points_of("mad_x", {"width": WIDTH}), language)
            self._learn(model, tokenizer, self.text(language), seed, rate)
        over = {trained: f"over {trained}" for trained, _ in MOVES}
        for (trained, _), (own, _) in MOVES.items():
            self._added(model, tokenizer, over[trained], self.samples[trained], seed, below=[own])
        for move, (own, other) in MOVES.items():
            trained, tested = move
            ways: dict[str, list[str]] = {
                UNTUNED: [], TEXT: [other], PLAIN: [trained], UNSWAPPED: [own, over[trained]],
                SWAPPED: [other, over[trained]], DIRECT: [tested], CEILING: [other, over[tested]],
            }  # fmt: skip
            for way, active in ways.items():
                stack.use(active)
                done = Tuned(self.samples[trained], model, tokenizer, None, 0, 0)
                self.note(done, way, move, seed, self.samples[tested])

    def show(self) -> list[str]:
        """The tables, and the rates that were found."""
        new = {name.replace("-", " to "): [(name, name)] for name in NEW}
        lines = self.table(FUSIONS, {**new, "both": [(name, name) for name in NEW]}, ALONE, OTHERS)
        for words, english in (("both, from English", True), ("both, into English", False)):
            moves = [move for move in MOVES if move[0].startswith("en-") is english]
            columns = {f"{move[0]} tested on {move[1]}": [move] for move in moves}
            lines += ["", *self.table(TRANSFERS, {**columns, words: moves}, UNSWAPPED, TEXT, CEILING)]
        return [*lines, "", self.rates_found()]
