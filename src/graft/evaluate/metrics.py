"""Metrics. Each is a function of sums of per-item statistics, so that resampling items never scores anything again.

Outputs become statistics `[items, k]`; `Metric.value` turns weighted sums of them, `[draws, k]`, into scores
`[draws]`. How often a class was right, meant and guessed are such sums, and so are BLEU's and chrF's counts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from graft.errors import UnknownName

Outputs = Sequence[Any]

SHARE = (0.0, 1.0)
"""The bounds of what is a share, or a mean of shares."""


@dataclass(frozen=True)
class Metric:
    """A named metric. `proportion`: a mean of rights and wrongs: Wilson's interval and McNemar's test hold. `bounds`:
    the least and the most that it can be, None where it has no such ends."""

    name: str
    unit: str
    higher_is_better: bool
    value: Callable[[np.ndarray], np.ndarray]
    bounds: tuple[float, float] | None = None
    proportion: bool = False
    signature: str = ""


def ratio(sums: np.ndarray) -> np.ndarray:
    """First sum over second: means, and rates per byte or token."""
    return sums[:, 0] / sums[:, 1]


BITS_PER_BYTE = Metric("bits_per_byte", "bits/byte", False, ratio)
PERPLEXITY = Metric("perplexity", "", False, lambda sums: np.exp(ratio(sums)))


def _mean(name: str, _: int) -> Metric:
    """The mean of a per-item score, statistics (score, 1)."""
    return Metric(name, "", True, ratio, SHARE)


def _right_or_wrong(name: str, _: int) -> Metric:
    """The share of items that are right, statistics (0 or 1, 1)."""
    return Metric(name, "", True, ratio, SHARE, proportion=True)


def mean_items(scores: Sequence[float]) -> np.ndarray:
    """Statistics [items, 2] of a mean."""
    values = np.asarray(scores, np.float64)
    return np.stack([values, np.ones_like(values)], axis=1)


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (SQuAD's evaluation, Rajpurkar et al. 2016)."""
    plain = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(output: str, targets: Sequence[str]) -> float:
    """1 where the output, spaces at its ends aside, is one of the targets."""
    return float(output.strip() in {t.strip() for t in targets})


def token_f1(output: str, targets: Sequence[str]) -> float:
    """F1 of the normalised words against the best target (Rajpurkar et al. 2016)."""
    return max(_f1(normalise(output).split(), normalise(target).split()) for target in targets)


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def rouge(name: str, output: str, targets: Sequence[str]) -> float:
    """F-measure of rouge1, rouge2 or rougeL against the best target (Lin 2004), with stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name], use_stemmer=True)
    return max(scorer.score(target, output)[name].fmeasure for target in targets)


def token_accuracy(output: str, targets: Sequence[str]) -> tuple[int, int]:
    """(right tags, tags) of tags in a row with spaces between them; what is missing is wrong."""
    wanted = targets[0].split()
    return sum(a == b for a, b in zip(output.split(), wanted, strict=False)), len(wanted)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first, last) of each entity in IOB tags; an I- that follows nothing of its type begins one, as in the
    evaluation of CoNLL (Tjong Kim Sang & De Meulder 2003)."""
    found, start = set(), 0
    for place, (tag, behind) in enumerate(zip(tags, [*tags[1:], "O"], strict=True)):
        mark, _, kind = tag.partition("-")
        before = tags[place - 1].partition("-") if place else ("O", "", "")
        if mark == "B" or before[0] == "O" or before[2] != kind:
            start = place
        ends = not behind.startswith("I-") or behind.partition("-")[2] != kind
        if mark != "O" and ends:
            found.add((kind, start, place))
    return found


def entity_f1(output: str, targets: Sequence[str]) -> tuple[int, int]:
    """(2 × entities found with type and borders, entities in both): their sums' ratio is micro-averaged F1."""
    wanted = targets[0].split()
    given = (output.split() + ["O"] * len(wanted))[: len(wanted)]
    found, meant = entities(given), entities(wanted)
    return 2 * len(found & meant), len(found) + len(meant)


def span_exact_match(output: str, targets: Sequence[str]) -> float:
    """1 where the normalised output is one of the normalised targets (Rajpurkar et al. 2016)."""
    return float(normalise(output) in {normalise(target) for target in targets})


def share(sums: np.ndarray) -> np.ndarray:
    """First sum over second, 0 where there is nothing to find."""
    return np.divide(sums[:, 0], sums[:, 1], out=np.zeros(len(sums)), where=sums[:, 1] > 0)


ENTITY_F1 = Metric("entity_f1", "", True, share, SHARE)


SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "span_exact_match": span_exact_match,
    "token_f1": token_f1,
    **{name: partial(rouge, name) for name in ("rouge1", "rouge2", "rougeL")},
}
"""Metrics of text that are means over the items: from an output and its targets to the item's score."""
COUNTS = {"token_accuracy": token_accuracy, "entity_f1": entity_f1}
"""Those that are the ratio of two sums over the items."""
CORPUS = ("bleu", "chrf")
TEXT_METRICS = (*SCORES, *COUNTS, *CORPUS)


def text_metric(name: str, outputs: Sequence[str], targets: Sequence[Sequence[str]]) -> tuple[Metric, np.ndarray]:
    """A metric of generated text with its per-item statistics. `targets[i]` are the acceptable answers of item i."""
    pairs = list(zip(outputs, targets, strict=True))
    if name in CORPUS:
        return _sacrebleu(name, outputs, targets)
    if name in COUNTS:
        return metric_of(name), np.array([COUNTS[name](*pair) for pair in pairs], np.float64)
    if name not in SCORES:
        raise UnknownName("metric", name, TEXT_METRICS)
    return metric_of(name), mean_items([SCORES[name](*pair) for pair in pairs])


def _sacrebleu(name: str, outputs: Sequence[str], targets: Sequence[Sequence[str]]) -> tuple[Metric, np.ndarray]:
    """BLEU (Papineni et al. 2002) or chrF (Popović 2015) as sacrebleu counts them; per-item counts add up."""
    scorer = _corpus_scorer(name)
    most = max(len(t) for t in targets)
    references = [[t[i] if i < len(t) else None for t in targets] for i in range(most)]
    score = scorer.corpus_score(list(outputs), references)
    counts = np.asarray(scorer._extract_corpus_statistics(list(outputs), references), np.float64)
    metric = replace(metric_of(name), signature=str(scorer.get_signature()))
    assert abs(float(metric.value(counts.sum(0, keepdims=True))[0]) - score.score) < 1e-6
    return metric, counts


def _corpus_scorer(name: str) -> Any:
    from sacrebleu.metrics import BLEU, CHRF

    return BLEU() if name == "bleu" else CHRF()


def _of_corpus(name: str, _: int) -> Metric:
    scorer = _corpus_scorer(name)

    def value(sums: np.ndarray) -> np.ndarray:
        return np.array([scorer._compute_score_from_stats(row.tolist()).score for row in sums])

    return Metric(name, "", True, value, (0.0, 100.0))


def class_metric(name: str, found: Sequence[int], wanted: Sequence[int], classes: int) -> tuple[Metric, np.ndarray]:
    """A metric of classes with its statistics: accuracy as a mean, the others from how often each class was right,
    meant and guessed, `[items, 3 · classes]`."""
    guesses, truths = np.asarray(found), np.asarray(wanted)
    if name == "accuracy":
        return metric_of(name), mean_items((guesses == truths).astype(float).tolist())
    if name not in _OF_CLASSES:
        raise UnknownName("metric", name, ("accuracy", *_OF_CLASSES))
    counts = np.zeros((len(truths), 3, classes))
    items = np.arange(len(truths))
    counts[items, 0, truths] = guesses == truths
    counts[items, 1, truths] = 1
    counts[items, 2, guesses] = 1
    return metric_of(name, 3 * classes), counts.reshape(len(truths), 3 * classes)


def _f1_macro(right: np.ndarray, meant: np.ndarray, guessed: np.ndarray) -> np.ndarray:
    """Mean over the classes that occur, as truth or guess, of F1; all `[draws, classes]`."""
    either = meant + guessed
    f1 = np.divide(2 * right, either, out=np.zeros_like(right), where=either > 0)
    return f1.sum(1) / np.maximum((either > 0).sum(1), 1)


def _f1_micro(right: np.ndarray, meant: np.ndarray, guessed: np.ndarray) -> np.ndarray:
    """F1 over all decisions, which for one label an item is the accuracy."""
    return 2 * right.sum(1) / (meant + guessed).sum(1)


def _mcc(right: np.ndarray, meant: np.ndarray, guessed: np.ndarray) -> np.ndarray:
    """Matthews' correlation for any number of classes (Gorodkin 2004)."""
    total = meant.sum(1)
    top = right.sum(1) * total - (meant * guessed).sum(1)
    bottom = np.sqrt((total**2 - (guessed**2).sum(1)) * (total**2 - (meant**2).sum(1)))
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)


_OF_CLASSES = {"f1_macro": _f1_macro, "f1_micro": _f1_micro, "mcc": _mcc}
"""Metrics of how often each class was right, meant and guessed."""


def _of_classes(name: str, columns: int) -> Metric:
    compute = _OF_CLASSES[name]
    bounds = (-1.0, 1.0) if name == "mcc" else SHARE
    return Metric(name, "", True, lambda sums: compute(*sums.reshape(-1, 3, columns // 3).swapaxes(0, 1)), bounds)


_METRICS: dict[str, Callable[[int], Metric]] = {
    "bits_per_byte": lambda _: BITS_PER_BYTE,
    "perplexity": lambda _: PERPLEXITY,
    "entity_f1": lambda _: ENTITY_F1,
    **{name: partial(_right_or_wrong, name) for name in ("exact_match", "span_exact_match")},
    **{name: partial(_right_or_wrong, name) for name in ("accuracy", "accuracy_per_byte", "accuracy_per_token")},
    **{name: partial(_mean, name) for name in ("token_accuracy", "token_f1", "rouge1", "rouge2", "rougeL")},
    **{name: partial(_of_corpus, name) for name in CORPUS},
    **{name: partial(_of_classes, name) for name in _OF_CLASSES},
}
"""The metric behind each name, from how many columns its statistics have."""


def metric_of(name: str, columns: int = 2) -> Metric:
    """The metric of this name for statistics `[items, columns]`. Raises UnknownName."""
    if name not in _METRICS:
        raise UnknownName("metric", name, _METRICS)
    return _METRICS[name](columns)
