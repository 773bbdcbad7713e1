"""Adapters of several domains put together: AdapterFusion and MAD-X on named entities (CrossNER), for tuning_help.py.

The types of each domain are mapped to person, location, organisation and misc, so that one task is asked in all five.

`fusion`: an adapter a domain, attention over all five learned on the domain that is asked (its own adapter among them),
beside that domain's adapter alone, full tuning, and one adapter on all domains at once.
`transfer`: a task adapter trained on the entities of one domain and tested on the others: alone, over a text adapter
of the domain it was trained in, and with that one swapped for the tested domain's (MAD-X). Text adapters learn from the
sentences of a domain's train and dev split, without their tags.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from _help import write_lines
from _tuning_runs import Sample, Tuned, named, points_of, sample, started, tuned
from _tuning_tasks import METRIC, STEPS, entities
from _tuning_ways import Ways
from graft.adapters.stack import adopt

DOMAINS = ("politics", "science", "music", "literature", "ai")
SOURCES = ("politics", "science")
"""Domains that task adapters are trained in for the others."""
OWN = [(domain, domain) for domain in DOMAINS]
MOVES = [(source, target) for source in SOURCES for target in DOMAINS if source != target]
ALONE, FUSED, FULL, JOINT = "adapter of the domain", "AdapterFusion", "full tuning", "one adapter, all domains"
PLAIN, UNSWAPPED, SWAPPED = "task adapter alone", "over the source's text adapter", "MAD-X: text adapter swapped"
WIDTH = 32
RATE, FULL_RATE = 3e-3, 1e-3


class Domains(Ways):
    """Every training of one setup, noted at once."""

    def __init__(self, base: Path, given: Namespace):
        self.base, self.given = base, given
        self.steps = given.steps or STEPS
        super().__init__(f"domains-{named(base)}-{self.steps}-{given.limit}", METRIC, given.seeds)

    @cached_property
    def samples(self) -> dict[str, Sample]:
        """The records of each domain; all that it has to train on."""
        counts = {"train": 10**6, "dev": self.given.limit, "test": self.given.limit}
        return {domain: sample(entities(domain), counts) for domain in DOMAINS}

    @cached_property
    def joint(self) -> Sample:
        """The train records of all domains."""
        first = self.samples[DOMAINS[0]]
        train = [record for own in self.samples.values() for record in own.records["train"]]
        return replace(first, records={**first.records, "train": train})

    def text(self, domain: str) -> Sample:
        """The sentences of a domain's train and dev split."""
        own = self.samples[domain]
        found = [{"text": " ".join(r["tokens"])} for split in ("train", "dev") for r in own.records[split]]
        folder = own.folder / "text"
        write_lines(folder / "train.jsonl", found)
        return Sample(replace(own.task, kind="text"), {"train": found}, [], folder)

    def fill(self) -> None:
        """Everything, a seed after the other."""
        for seed in range(self.given.seeds):
            if self.lacks((ALONE, FUSED, FULL, JOINT), OWN, seed):
                self._fuse(seed)
            if self.lacks((PLAIN, UNSWAPPED, SWAPPED), MOVES, seed):
                self._transfer(seed)

    def _note(self, done: Tuned, name: str, source: str, target: str, seed: int) -> None:
        self.note(done, name, (source, target), seed, self.samples[target])

    def _learn(self, model: Any, tokenizer: Any, given: Sample, seed: int, times: int = 1, rate: float = RATE) -> Tuned:
        return tuned(model, tokenizer, given, rate=rate, seed=seed, steps=times * self.steps)

    def _fuse(self, seed: int) -> None:
        """Adapters of all domains in one model, then attention over them for each domain."""
        model, tokenizer = started(self.base, [], seed)
        points = points_of("pfeiffer", {"width": WIDTH})
        for domain in DOMAINS:
            stack = adopt(model, points, domain)
            stack.use(domain)
            self._note(self._learn(model, tokenizer, self.samples[domain], seed), ALONE, domain, domain, seed)
        for domain in DOMAINS:
            stack.use(list(DOMAINS))
            adopt(model, points_of("fusion", {}), "fusion")
            self._note(self._learn(model, tokenizer, self.samples[domain], seed), FUSED, domain, domain, seed)
            stack.drop("fusion")
        self._beside(seed)

    def _beside(self, seed: int) -> None:
        """What the fusion is compared with."""
        for domain in DOMAINS:
            whole = started(self.base, None, seed)
            self._note(self._learn(*whole, self.samples[domain], seed, rate=FULL_RATE), FULL, domain, domain, seed)
        one = started(self.base, points_of("pfeiffer", {"width": WIDTH}), seed)
        done = self._learn(*one, self.joint, seed, times=len(DOMAINS))
        for domain in DOMAINS:
            self._note(done, JOINT, domain, domain, seed)

    def _transfer(self, seed: int) -> None:
        """Task adapters of the sources on the other domains, with and without text adapters below."""
        task = points_of("pfeiffer", {"width": WIDTH})
        model, tokenizer = started(self.base, [], seed)
        for domain in DOMAINS:
            stack = adopt(model, points_of("mad_x", {"width": WIDTH}), domain)
            stack.use(domain)
            self._learn(model, tokenizer, self.text(domain), seed)
        for source in SOURCES:
            plain = self._learn(*started(self.base, task, seed), self.samples[source], seed)
            stack.use(source)
            adopt(model, task, "task")
            over = self._learn(model, tokenizer, self.samples[source], seed)
            for target in (target for start, target in MOVES if start == source):
                self._note(plain, PLAIN, source, target, seed)
                for name, below in ((UNSWAPPED, source), (SWAPPED, target)):
                    stack.use([below, "task"])
                    self._note(over, name, source, target, seed)
            stack.drop("task")

    def show(self) -> list[str]:
        """Both tables."""
        own = {domain: [(domain, domain)] for domain in DOMAINS}
        moved = {f"{source} to the others": [pair for pair in MOVES if pair[0] == source] for source in SOURCES}
        lines = self.table((ALONE, FUSED, FULL, JOINT), {**own, "all": OWN}, ALONE)
        return [*lines, "", *self.table((PLAIN, UNSWAPPED, SWAPPED), {**moved, "both": MOVES}, UNSWAPPED)]
