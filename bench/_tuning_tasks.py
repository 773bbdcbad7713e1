"""Tasks on real data of tuning_help.py: what is read of them, and how much of it a training takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from itertools import accumulate
from typing import Any

import graft
from _tuning_runs import SHARED, Record, Task

INTENTS = 30
SUMMARISED, SUMMARY = 350, 160
"""Characters of an abstract, in whole sentences, and of its summary, at most."""
METRIC, BATCH, STEPS = "entity_f1", 8, 40
"""Of named entities."""
KINDS = {
    **dict.fromkeys(("person", "politician", "scientist", "musicalartist", "writer", "researcher"), "person"),
    **dict.fromkeys(("location", "country"), "location"),
    **dict.fromkeys(("organisation", "politicalparty", "university", "band"), "organisation"),
}
"""Types that several domains share; all others are misc."""


@cache
def intents() -> frozenset[str]:
    """Intents evenly from the alphabet of all 150."""
    source = graft.data.parse({"source": "jsonl", "path": "cls_intents/clinc150.val.jsonl.gz"})
    every = graft.data.open_corpus({"val": source}, "val", SHARED)
    found = sorted({record["label"] for split in ("train", "dev", "test") for record in every.records(split)})
    return frozenset(found[:: len(found) // INTENTS][:INTENTS])


def short(most: int) -> Callable[[Mapping[str, Any]], bool]:
    """Sentences of 3 to so many words."""
    return lambda record: 3 <= len(record["tokens"]) <= most


def summarised(record: Mapping[str, Any]) -> Record:
    """The beginning of an abstract of SciTLDR, and its first summary."""
    ends = accumulate(len(sentence) + 1 for sentence in record["source"])
    whole = max(1, sum(end <= SUMMARISED for end in ends))
    return {"source": " ".join(record["source"][:whole])[:SUMMARISED], "target": record["summaries"][0]}


def translated(record: Mapping[str, Any]) -> Record:
    """An English sentence of Tatoeba and its French, the first where there are several."""
    french = record["tgt"]
    return {"source": record["en"], "target": french if isinstance(french, str) else french[0]}


def coarse(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the types that all domains share."""
    pairs = [tag.partition("-") for tag in record["tags"]]
    return {**record, "tags": [mark + dash + (KINDS.get(kind, "misc") if dash else "") for mark, dash, kind in pairs]}


def entities(domain: str, name: str | None = None) -> Task:
    """Named entities of one domain of CrossNER, of the types that all domains share."""
    files = {split: f"ner_multidomain/crossner_{domain}.{split}.jsonl.gz" for split in ("train", "dev", "test")}
    return Task(name or domain, "tagging", METRIC, {"source": "jsonl", **files}, lambda _: True, BATCH, STEPS, coarse)


TASKS = {
    task.name: task
    for task in (
        Task("tagging", "tagging", "token_accuracy",
             {"source": "jsonl", "format": "tagged", "fields": {"tags": "upos"}, "train": "pos_ud_ewt/train.jsonl.xz",
              "dev": "pos_ud_ewt/dev.jsonl.gz", "test": "pos_ud_ewt/test.jsonl.gz"},
             short(15), batch=16, steps=40),
        Task("classification", "classification", "accuracy",
             {"source": "jsonl", **{split: f"cls_intents/clinc150.{name}.jsonl.gz"
                                    for split, name in (("train", "train"), ("dev", "val"), ("test", "test"))}},
             lambda record: record["label"] in intents(), batch=16, steps=60),
        Task("generation", "text", "bits_per_byte",
             {"source": "jsonl", "format": "pairs", "fields": {"source": "instruction", "target": "output"},
              "path": "inst_tldr_commands/train.jsonl.xz", "test": "inst_tldr_commands/test.jsonl.gz"},
             lambda record: len(record["source"]) <= 80 and len(record["target"]) <= 80, batch=4, steps=30),
        Task("polarity", "classification", "accuracy",
             {"source": "jsonl", "path": "cls_polarity_subjectivity_reviews/sentence_polarity.train.jsonl.gz",
              "test": "cls_polarity_subjectivity_reviews/sentence_polarity.test.jsonl.gz"},
             lambda record: len(record["text"]) <= 70, batch=16, steps=120),
        Task("summaries", "text", "bits_per_byte",
             {"source": "jsonl", "format": "raw", "train": "sum_scitldr/train.jsonl.xz",
              "dev": "sum_scitldr/dev.jsonl.gz", "test": "sum_scitldr/test.jsonl.gz"},
             lambda record: len(record["summaries"][0]) <= SUMMARY, batch=4, steps=30, made=summarised, length=224),
        Task("translation", "text", "bits_per_byte",
             {"source": "jsonl", "format": "raw", "train": "mt_tatoeba/en-fr.train.jsonl.xz",
              "dev": "mt_tatoeba/en-fr.val.jsonl.gz", "test": "mt_tatoeba/en-fr.test.jsonl.gz"},
             lambda record: len(record["en"]) <= 50, batch=4, steps=30, made=translated),
        entities("politics", "entities"),
    )
}  # fmt: skip
