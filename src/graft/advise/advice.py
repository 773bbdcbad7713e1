"""Which way of tuning to try first for a model, data and a budget; on what evidence; and a recipe that checks it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from graft import data as sets
from graft.advise.candidates import Candidate, fitted, sized
from graft.advise.check import learned, recipe
from graft.advise.evidence import Claim, Standing, Study, alike, evidence, standing
from graft.errors import RequestError
from graft.evaluate.limits import named_length
from graft.facts import facts_of
from graft.machine import size
from graft.methods import method_names
from graft.plan.table import count
from graft.recipe import build_recipe
from graft.verb import Facts
from graft.yaml_lines import Document

TASKS = {
    "labelled": "classification", "tagged": "classification", "spans": "classification", "pairs": "generation",
    "completion": "generation", "chat": "instructions", "text": "text",
}  # fmt: skip
"""Format of the data → the task that evidence is looked up for."""
ENOUGH = 0.98
"""A method that keeps this share of what full tuning reaches is taken in its place: it costs less."""
BITS = {"a byte": 1.0, "a number": 2.0}
"""Guesses: what text holds for a model that has read much, and what a trained number can hold (Schulman 2025)."""
SHARES = {"classification": 0.5, "least": 0.1, "most": 7.0}
"""Percent of the parameters: where published figures for classification are; the bounds for everything else."""


@dataclass(frozen=True)
class Advice:
    """A method, why, how sure that is, and what was weighed beside it."""

    task: str
    method: str
    options: Mapping[str, Any]
    why: Sequence[str]
    strength: str
    """How strong the evidence is, in words."""
    candidates: Sequence[Candidate]
    standings: Mapping[str, Standing]
    """How methods stood to full tuning in the evidence."""
    recipe: Mapping[str, Any]
    """A recipe as plain values: the method, its neighbours and full tuning."""

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)

    def yaml(self) -> str:
        """The recipe as a file, with what it checks above it."""
        import yaml

        head = [f"# Checks the advice: {self.method} for {self.task}, beside its neighbours and full tuning."]
        head += ["# Two learning rates each: compare a method at its better one.", ""]
        # as values that nodes do not share, which would be written as anchors
        apart = json.loads(json.dumps(dict(self.recipe)))
        return "\n".join(head) + yaml.safe_dump(apart, sort_keys=False, allow_unicode=True, width=110)


def advise(
    model: Path,
    data: Mapping[str, Any],
    name: str,
    root: Path,
    *,
    limit: int | None = None,
    share: float | None = None,
    many: bool = False,
    budget: str = "1 epochs",
) -> Advice:
    """What to try first with the model in a folder and the data set `name` of `data` (settings as in a recipe).

    `limit`: bytes of memory; `share`: percent of the parameters that may be trained; `many`: adapters for many tasks on
    one base, so that no whole model comes out. Raises RequestError for data that say nothing of what is to be produced,
    and where nothing fits.
    """
    facts, parsed = facts_of(model), {key: sets.parse(raw, ("data", key)) for key, raw in data.items()}
    corpus = sets.open_corpus(parsed, name, root)
    if corpus.format not in TASKS:
        raise RequestError(f"{name} is {corpus.format}: expected data that say what to produce: give its `format`")
    if not facts.mergeable:
        raise RequestError(f"{model}: expected whole weights to tune, found adapters or members: name their base")
    task = TASKS[corpus.format]
    documents, characters = _amount(corpus)
    wanted = share if share is not None else _wanted(task, characters, facts.parameters)
    studies = [study for study in evidence().studies if study.task == task] or _others(evidence().studies)
    studies = alike(studies, facts.parameters)
    training = {**learned(name, corpus.format, facts.architecture), "budget": budget}
    names = sorted({score.method for study in studies for score in study.scores} & set(method_names("graft.tune")))
    found = [fitted(each, facts, training, limit) for each in sized(names, facts, int(wanted * facts.parameters / 100))]
    stood = {each.method: s for each in found[1:] if (s := standing(studies, each.method, each.share or wanted))}
    ranked, why = _ranked(task, found, stood, whole=share is None and not many)
    shown = [ranked[0], *[each for each in ranked[1:] if each.method != "full"][:2]]
    shown += [found[0]] if found[0] not in shown and not found[0].why_not else []
    placed = {key: _absolute(raw, root) for key, raw in data.items()}
    made = recipe(model, placed, name, corpus.format, facts.architecture, training, shown, named_length(facts.config))
    build_recipe(Document(made), root.resolve())
    said = [_data(name, documents, characters, wanted, task, share is not None), *why, *_memory(ranked[0], limit)]
    strength = _strength(studies, task, stood.get(ranked[0].method), facts)
    return Advice(task, ranked[0].method, ranked[0].options, said, strength, found, stood, made)


def _amount(corpus: sets.AnyCorpus) -> tuple[int, int]:
    """(documents, characters) of the train splits."""
    counts = [part.describe()["splits"]["train"] for part, _ in corpus.parts]
    return sum(count["documents"] for count in counts), sum(count["characters"] for count in counts)


def _wanted(task: str, characters: int, parameters: int) -> float:
    """Percent of the parameters to train, where nobody says: as many numbers as can hold what the data say."""
    if task == "classification":
        return SHARES["classification"]
    numbers = characters * BITS["a byte"] / BITS["a number"]
    return min(SHARES["most"], max(SHARES["least"], 100 * numbers / parameters))


def _others(studies: Sequence[Study]) -> list[Study]:
    """Studies that stand in where none is of the task: those of generation."""
    return [study for study in studies if study.task == "generation"]


def _ranked(
    task: str, found: Sequence[Candidate], stood: Mapping[str, Standing], *, whole: bool
) -> tuple[list[Candidate], list[str]]:
    """What is possible, the best first, and why the first is."""
    full, few = found[0], [each for each in found[1:] if not each.why_not]
    claims = [claim for claim in evidence().claims if task in claim.tasks]
    preferred = next((claim.prefers for claim in claims if claim.prefers != "full"), None)
    few.sort(key=lambda each: (each.method != preferred, -stood[each.method].kept, each.trained))
    told = [f"{claim.says} ({claim.on}; {claim.source})" for claim in claims]
    possible = whole and not full.why_not
    if not few and not possible:
        raise RequestError(f"nothing fits: {_obstacles(found)}")
    if possible and (not few or _full_is_better(claims, few[0], stood)):
        short = (
            f"full tuning fits, and no method with few weights is known to keep {100 * ENOUGH:.0f} % of what it reaches"
        )
        return [full, *few], [*(told or [short] * bool(few)), *_figures(few[:1], stood)]
    best = few[0]
    why = [*told, *_figures([best], stood), *_passed_over(task, few, stood)]
    why += [f"full tuning: {full.why_not}"] if full.why_not else []
    if best.packed:
        why += [f"{c.says} ({c.on}; {c.source})" for c in evidence().claims if "packed" in c.tasks]
    return few + ([full] if possible else []), why


def _passed_over(task: str, few: Sequence[Candidate], stood: Mapping[str, Standing]) -> list[str]:
    """Why a method comes first though another one kept more of what full tuning reaches."""
    highest = max(few, key=lambda each: stood[each.method].kept)
    if stood[highest.method].kept <= stood[few[0].method].kept:
        return []
    return [
        f"{highest.method} kept more in the table below ({100 * stood[highest.method].kept:.3g} % of full tuning), but "
        f"what is published of {task} goes before these figures: the recipe compares both"
    ]


def _obstacles(found: Sequence[Candidate]) -> str:
    """What is in the way of which methods, each reason once."""
    reasons = dict.fromkeys(each.why_not for each in found if each.why_not)
    return "; ".join(f"{', '.join(e.method for e in found if e.why_not == why)}: {why}" for why in reasons)


def _full_is_better(claims: Sequence[Claim], best: Candidate, stood: Mapping[str, Standing]) -> bool:
    """Whether sources prefer full tuning for the task, or, where none says, figures of the best other one do."""
    if claims:
        return claims[0].prefers == "full"
    return stood[best.method].kept < ENOUGH


def _figures(candidates: Sequence[Candidate], stood: Mapping[str, Standing]) -> list[str]:
    """What the evidence says of them in numbers."""
    return [f"{each.method}: {'; '.join(stood[each.method].figures)}" for each in candidates if each.method in stood]


def _data(name: str, documents: int, characters: int, wanted: float, task: str, given: bool) -> str:
    why = "as asked" if given else "where the published figures are"
    if not given and task != "classification":
        why = "a trained number holds about 2 bits, a byte of such text says about 1 (guesses)"
    return f"{name}: {documents:,} documents, {characters:,} characters; {percent(wanted)} % of the parameters ({why})"


def _memory(best: Candidate, limit: int | None) -> list[str]:
    """How it fits."""
    if limit is None:
        return [f"it needs about {size(best.memory_bytes)} of memory"]
    how = ", ".join(f"{name}: {str(value).lower()}" for name, value in best.changes.items())
    how = f" with {how}" if how else ""
    return [f"it needs about {size(best.memory_bytes)} of {size(limit)}{how}{', on the base in 4 bits' * best.packed}"]


def _strength(studies: Sequence[Study], task: str, stood: Standing | None, facts: Facts) -> str:
    """How far the evidence is from the case at hand."""
    models = ", ".join(dict.fromkeys(study.model for study in studies))
    own = [study for study in studies if study.here]
    said = [f"{len(studies)} comparisons on {models}; {len(own) or 'none'} of them measured with graft"]
    if all(study.task != task for study in studies):
        said.append(f"none of them is of {task}: those of generation stand in")
    if all(study.architecture != facts.architecture for study in studies):
        article = "a" if facts.architecture == "decoder" else "an"
        said.append(f"none with {article} {facts.architecture}")
    if stood is not None and stood.far:
        said.append("figures of the advised method are at other shares of the parameters")
    return "; ".join([*said, f"this model has {count(facts.parameters)} parameters: a place to start, no more"])


def percent(share: float) -> str:
    """A percentage to two digits, without an exponent: `100`, `0.023`."""
    return f"{Decimal(f'{share:.2g}'):f}"


PATHS = ("path", "train", "dev", "test")
"""Settings of a data set that name files."""


def _absolute(raw: Any, root: Path) -> Any:
    """Settings of a data set with its files named from anywhere."""
    if not isinstance(raw, Mapping):
        return raw
    return {key: _placed(value, root) if key in PATHS else value for key, value in raw.items()}


def _placed(value: Any, root: Path) -> Any:
    if isinstance(value, list):
        return [_placed(each, root) for each in value]
    return str((root / Path(value).expanduser()).resolve()) if isinstance(value, str) else value
