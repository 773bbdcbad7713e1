"""Task negation: toxicity of what models write against perplexity on clean text, for base − λ (toxic − base).

    OMP_NUM_THREADS=4 python bench/negation.py

The family is bench/negation.yaml: a small decoder that has read toxic text among other text, an expert for toxic text,
the base less λ times what the expert learned, and a judge tuned to name the kind of a text. Every model goes on from
the first words of the same clean test texts, by sampling; the judge reads what it wrote, without those words. Figures
are means over texts; no text is shown.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import lzma
import random
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import graft
from _side_by_side import machine, versions
from graft import models
from graft.evaluate import statistics
from graft.evaluate.scorer import Scorer
from graft.report.read import Run, read_run

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared" / "data"
OUT = HERE / "work" / "negation"
TWEETS, FORUM = "tox_tweets_davidson", "tox_forum_vicomtech"
KINDS = {"neither": "clean", "noHate": "clean", "offensive": "toxic", "hate": "toxic"}
Texts = dict[str, list[str]]
"""By kind."""


def read(path: Path) -> Texts:
    """The texts of a file by kind; labels that are neither are left out."""
    opened: Any = lzma.open if path.suffix == ".xz" else gzip.open
    found: Texts = {"clean": [], "toxic": []}
    with opened(path, "rt", encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            if record["label"] in KINDS:
                found[KINDS[record["label"]]].append(record["text"])
    return found


def write_data() -> None:
    """The files that the recipe reads. Of the forum, everything that is not in its test file is for training."""
    tests = [read(SHARED / TWEETS / "test.jsonl.gz"), read(SHARED / FORUM / "sampled_test.jsonl.gz")]
    tweets, forum = read(SHARED / TWEETS / "train.jsonl.xz"), read(SHARED / FORUM / "all_files.jsonl.gz")
    seen = {text for test in tests for texts in test.values() for text in texts}
    trains = [{kind: [t for t in texts if t not in seen] for kind, texts in one.items()} for one in (tweets, forum)]
    for kind in ("clean", "toxic"):
        write(f"{kind}.jsonl", [{"text": text} for one in trains for text in one[kind]])
        write(f"{kind}-test.jsonl", [{"text": text} for one in tests for text in one[kind]])
    write("kinds.jsonl", [record for one in trains for record in balanced(one)])
    write("kinds-test.jsonl", [record for one in tests for record in balanced(one)])


def balanced(texts: Texts) -> Iterator[dict[str, str]]:
    """As many texts of each kind, with their kind."""
    count = min(map(len, texts.values()))
    for kind, some in texts.items():
        yield from ({"text": text, "label": kind} for text in random.Random(0).sample(some, count))


def write(name: str, records: Sequence[dict[str, str]]) -> None:
    """JSON lines in one fixed random order."""
    (OUT / "data").mkdir(parents=True, exist_ok=True)
    shuffled = random.Random(0).sample(list(records), len(records))
    (OUT / "data" / name).write_text("".join(json.dumps(record) + "\n" for record in shuffled))


def prompts(count: int, words: int) -> list[tuple[str, str]]:
    """The first words of clean test texts that are longer than that, and the rest of each."""
    lines = (OUT / "data" / "clean-test.jsonl").read_text().splitlines()
    split = [json.loads(line)["text"].split() for line in lines]
    return [(" ".join(some[:words]), " ".join(some[words:])) for some in split if len(some) > words][:count]


@torch.inference_mode()
def continuations(folder: Path, starts: Sequence[str], tokens: int) -> list[str]:
    """What a model writes behind each start, sampled from its own distribution with one seed."""
    model, tokenizer = models.load(folder).eval(), models.load_tokenizer(folder)
    tokenizer.padding_side = "left"
    before = [tokenizer.bos_token or ""] * len(starts)
    ids = tokenizer([a + b for a, b in zip(before, starts, strict=True)], return_tensors="pt", padding=True,
                    add_special_tokens=False, return_token_type_ids=False)  # fmt: skip
    torch.manual_seed(0)
    made = model.generate(**ids, do_sample=True, top_k=0, min_new_tokens=4, max_new_tokens=tokens)
    return list(tokenizer.batch_decode(made[:, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def toxicity(judge: Scorer, texts: Sequence[str]) -> np.ndarray:
    """The judge's probability of `toxic` against `clean` behind each text, `[texts]`."""
    asked = [(text + "\n", kind) for text in texts for kind in ("toxic", "clean")]
    found = np.array([one.log_prob for one in judge.loglikelihoods(asked, start=True)]).reshape(-1, 2)
    return 1 / (1 + np.exp(found[:, 1] - found[:, 0]))


def table(run: Run, found: dict[str, np.ndarray]) -> list[str]:
    """Markdown lines: by model the mean toxicity, how often it is above one half, and perplexities."""
    sets = ["clean.test", "general.test", "toxic.test"]
    heads = ["model", "toxicity", "to base", "above ½", *(f"perplexity, {on.removesuffix('.test')}" for on in sets)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, scores in found.items():
        low, high = drawn([scores])[0]
        gap = found[name] - found["base"]
        below, above = drawn([gap])[0]
        cells = [name, f"{scores.mean():.3f} ({low:.3f} to {high:.3f})"]
        cells += [f"{gap.mean():+.3f} ({below:+.3f} to {above:+.3f})" if name != "base" else ""]
        cells += [f"{(scores > 0.5).mean():.2f}", *(perplexity(run, name, on) for on in sets)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def drawn(values: Sequence[np.ndarray]) -> np.ndarray:
    """`[values, 2]`: the interval of each mean over texts."""
    ends = [statistics.bootstrap(lambda counts, v=v: counts @ v / len(v), len(v), seed=0) for v in values]
    return np.array(ends)


def perplexity(run: Run, name: str, on: str) -> str:
    """A measured perplexity with its interval."""
    row = next(row for (model, column), row in run.scores.items() if (model, column.on) == (name, on))
    return f"{row['value']:.1f} ({row['low']:.1f} to {row['high']:.1f})"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=300, help="texts that each model writes")
    parser.add_argument("--words", type=int, default=4, help="words of a clean text that they begin with")
    parser.add_argument("--tokens", type=int, default=30, help="tokens that are written at most")
    given = parser.parse_args()
    started = time.perf_counter()
    write_data()
    graft.run(HERE / "negation.yaml", OUT / "run")
    run, folders = read_run(OUT / "run"), OUT / "run" / "models"
    judge = Scorer(models.load(folders / "judge"), models.load_tokenizer(folders / "judge"))
    starts, rests = zip(*prompts(given.texts, given.words), strict=True)
    shown = [name for name in run.models if name != "judge"]
    found = {name: toxicity(judge, continuations(folders / name, starts, given.tokens)) for name in shown}
    print("### task negation\n")
    print("\n".join(table(run, found)))
    right = {column.metric: row for (name, column), row in run.scores.items() if name == "judge"}["accuracy"]
    print(
        f"\nThe judge is right on {right['value']:.3f} ({right['low']:.3f} to {right['high']:.3f}) of test texts; by it"
    )
    print(
        f"the rest of the clean texts that are gone on from has a mean toxicity of {toxicity(judge, rests).mean():.3f}."
    )
    minutes = (time.perf_counter() - started) / 60
    print(f"`{shlex.join(['python', *sys.argv])}`: {minutes:.1f} minutes. {machine()}.")
    print(f"{versions(['graft', 'torch', 'transformers'])}; {datetime.date.today().isoformat()}.")


if __name__ == "__main__":
    main()
