"""Adapters of several domains put together: AdapterFusion and MAD-X on named entities (CrossNER), for tuning_help.py.

The types of each domain are mapped to person, location, organisation and misc, so that one task is asked in all five.

`fusion`: an adapter a domain, attention over all five learned on the domain that is asked (its own adapter among them),
beside that domain's adapter alone, full tuning, and one adapter on all domains at once.
`transfer`: a task adapter trained on the entities of one domain and tested on the others: alone, over a text adapter
of the domain it was trained in, and with that one swapped for the tested domain's (MAD-X). Text adapters learn from the
sentences of a domain's train and dev split, without their tags.

Rates of adapters, of full tuning and of their heads are those that the grid found for entities of politics; those of
the fusion and of text adapters are searched, in politics.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from _help import write_lines
from _tuning_grid import FULL as WHOLE
from _tuning_grid import SEARCHED_AT, Grid, Rates
from _tuning_runs import Sample, Tuned, named, points_of, sample, started, tuned
from _tuning_tasks import METRIC, STEPS, TASKS, entities
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
STARTS = {"fusion": 3e-3, "text adapter": 1e-2}


class Domains(Ways):
    """Every training of one setup, noted at once."""

    starts = STARTS

    def __init__(self, base: Path, given: Namespace):
        self.base, self.given = base, given
        self.steps = given.steps or STEPS
        super().__init__(f"domains-{named(base)}-{self.steps}-{given.limit}", METRIC, given)

    @cached_property
    def rates(self) -> dict[str, Rates]:
        """Those of adapters and of full tuning, each with its head's."""
        grid = Grid(TASKS["entities"], self.base, self.given)
        return {"adapter": grid.rates_of("pfeiffer", SEARCHED_AT), WHOLE: grid.rates_of(WHOLE, None)}

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

    def text(self, domain: str, splits: Sequence[str] = ("train", "dev")) -> Sample:
        """The sentences of a domain's splits."""
        own = self.samples[domain]
        found = [{"text": " ".join(r["tokens"])} for split in splits for r in own.records[split]]
        folder = own.folder / "-".join(["text", *splits])
        write_lines(folder / "train.jsonl", found)
        return Sample(replace(own.task, kind="text"), {"train": found}, [], folder)

    def spoken(self, domain: str) -> Sample:
        """The sentences of the dev split, each after an empty line."""
        own = self.samples[domain]
        dev = [{"source": "", "target": " ".join(record["tokens"])} for record in own.records["dev"]]
        return replace(own, records={"dev": dev})

    def trial(self, kind: str, rate: float, seed: int) -> tuple[Tuned, Sample]:
        """In politics; text adapters learn from its train split alone."""
        domain = DOMAINS[0]
        if kind == "text adapter":
            model, tokenizer = started(self.base, points_of("mad_x", {"width": WIDTH}), seed)
            done = self._learn(model, tokenizer, self.text(domain, ["train"]), seed, Rates(rate))
            return done, self.spoken(domain)
        return self._fused(domain, seed, rate), self.samples[domain]

    def fill(self) -> None:
        """Everything, a seed after the other."""
        for seed in range(self.given.seeds):
            if self.lacks((ALONE, FUSED, FULL, JOINT), OWN, seed):
                self._fuse(seed)
            if self.lacks((PLAIN, UNSWAPPED, SWAPPED), MOVES, seed):
                self._transfer(seed)

    def _note(self, done: Tuned, name: str, source: str, target: str, seed: int) -> None:
        self.note(done, name, (source, target), seed, self.samples[target])

    def _learn(self, model: Any, tokenizer: Any, given: Sample, seed: int, rates: Rates, times: int = 1) -> Tuned:
        steps = times * self.steps
        return tuned(model, tokenizer, given, rate=rates.body, seed=seed, steps=steps, head_rate=rates.head)

    @cache  # noqa: B019
    def _five(self, seed: int) -> dict[str, Tuned]:
        """Adapters of all domains in one model, by domain, each with its head."""
        model, tokenizer = started(self.base, [], seed)
        found = {}
        for domain in DOMAINS:
            adopt(model, points_of("pfeiffer", {"width": WIDTH}), domain).use(domain)
            found[domain] = self._learn(model, tokenizer, self.samples[domain], seed, self.rates["adapter"])
        return found

    def _fused(self, domain: str, seed: int, rate: float) -> Tuned:
        """Attention over all of them, for one domain, and a head that learns as theirs do."""
        model, tokenizer = self._five(seed)[domain].model, self._five(seed)[domain].tokenizer
        stack = model.graft_adapters
        if "fusion" in stack.points:
            stack.drop("fusion")
        stack.use(list(DOMAINS))
        torch.manual_seed(seed)
        adopt(model, points_of("fusion", {}), "fusion")
        rates = self.rates["adapter"]._replace(body=rate)
        return self._learn(model, tokenizer, self.samples[domain], seed, rates)

    def _fuse(self, seed: int) -> None:
        """Each domain's adapter, attention over all of them for it, and what that is compared with."""
        rate = self.rate("fusion")
        for domain, done in self._five(seed).items():
            done.model.graft_adapters.use(domain)
            self._note(done, ALONE, domain, domain, seed)
        for domain in DOMAINS:
            self._note(self._fused(domain, seed, rate), FUSED, domain, domain, seed)
            whole = started(self.base, None, seed)
            self._note(self._learn(*whole, self.samples[domain], seed, self.rates[WHOLE]), FULL, domain, domain, seed)
        one = started(self.base, points_of("pfeiffer", {"width": WIDTH}), seed)
        done = self._learn(*one, self.joint, seed, self.rates["adapter"], times=len(DOMAINS))
        for domain in DOMAINS:
            self._note(done, JOINT, domain, domain, seed)

    def _transfer(self, seed: int) -> None:
        """Task adapters of the sources on the other domains, with and without text adapters below."""
        task, rates = points_of("pfeiffer", {"width": WIDTH}), self.rates["adapter"]
        text_rate = Rates(self.rate("text adapter"))
        model, tokenizer = started(self.base, [], seed)
        for domain in DOMAINS:
            stack = adopt(model, points_of("mad_x", {"width": WIDTH}), domain)
            stack.use(domain)
            self._learn(model, tokenizer, self.text(domain), seed, text_rate)
        for source in SOURCES:
            plain = self._learn(*started(self.base, task, seed), self.samples[source], seed, rates)
            stack.use(source)
            adopt(model, task, "task")
            over = self._learn(model, tokenizer, self.samples[source], seed, rates)
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
        lines += ["", *self.table((PLAIN, UNSWAPPED, SWAPPED), {**moved, "both": MOVES}, UNSWAPPED)]
        told = "; ".join(f"{name} {rates.body:g}, its head {rates.head:g}" for name, rates in self.rates.items())
        return [*lines, "", f"{self.rates_found()[:-1]}; {told}."]
