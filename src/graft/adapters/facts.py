"""What is known of models with adapters before they exist. Light."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from graft.lineage import ADAPTED
from graft.verb import Facts


def is_adapted(facts: Facts) -> bool:
    """Whether the model is a frozen one with adapters that lie apart."""
    return facts.config.get("model_type") == ADAPTED


def adapted_facts(start: Facts) -> Facts:
    """Facts of `start` with an adapter that lies apart: it has no whole weights to average."""
    if is_adapted(start):
        return start
    inner: dict[str, Any] = {"model_type": start.config.get("model_type")}
    return replace(start, mergeable=False, config={**start.config, "model_type": ADAPTED, ADAPTED: inner})


def folded_facts(start: Facts) -> Facts:
    """Facts of `start` with adapters folded in: an ordinary model again."""
    return replace(start, mergeable=True, config=frozen_config(dict(start.config)))


def frozen_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the frozen model below adapters; `config` itself where it has none."""
    if config.get("model_type") != ADAPTED:
        return config
    return {key: value for key, value in config.items() if key != ADAPTED} | {
        "model_type": config[ADAPTED]["model_type"]
    }
