"""What a training costs before its first step: reading its data, a new tokenizer, token streams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from graft.data import has_dev, open_corpus, split_ref
from graft.data.amount import text_bytes
from graft.recipe import Node, Recipe
from graft.train.estimate import BYTES_A_TOKEN, in_tokens
from graft.train.settings import Budget, TrainSettings
from graft.verb import Estimate, Facts


def with_preparation(
    recipe: Recipe, node: Node, facts: Mapping[str, Facts], estimate: Estimate, done: set[str]
) -> Estimate:
    """The estimate with the time of what is not `done` by a node before, which is noted there.

    A budget in epochs is counted in tokens of the text that there is.
    """
    if not isinstance(node.settings, TrainSettings):
        return estimate
    models = {name: facts[name] for name in node.models}
    text = _text(recipe, node)
    if estimate.seconds is None and text:
        estimate = _of_epochs(node, node.settings, models, text)
    found = {what: s for what, s in node.verb.preparation(node.settings, models, text).items() if what not in done}
    # whatever tokenizer a node brings, what is made from it has the same
    done.update(found, (in_tokens(split, facts[node.name].vocabulary) for split in text))
    return estimate if estimate.seconds is None else replace(estimate, seconds=estimate.seconds + sum(found.values()))


def _text(recipe: Recipe, node: Node) -> dict[str, float]:
    """About how many bytes each split has that a training reads; splits of which nothing is known are left out."""
    found: dict[str, float | None] = {}
    for reference in node.data:
        name, split = split_ref(reference)
        corpus = open_corpus(recipe.data, name, recipe.root)
        for read in {split: None, **({"dev": None} if has_dev(corpus) else {})}:
            found[f"{name}.{read}"] = text_bytes(corpus, read)
    return {name: size for name, size in found.items() if size is not None}


def _of_epochs(node: Node, settings: TrainSettings, models: Mapping[str, Facts], text: Mapping[str, float]) -> Estimate:
    epoch = sum(size for name, size in text.items() if split_ref(name)[1] != "dev") / BYTES_A_TOKEN
    budget = Budget(amount=max(1, round(settings.budget.amount * epoch)), unit="tokens")
    found = node.verb.estimate(settings.model_copy(update={"budget": budget}), models)
    return replace(found, note=f"{found.note}; an epoch taken for {epoch:,.0f} tokens")
