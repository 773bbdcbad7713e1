"""Pretraining: a model from scratch on real text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graft.errors import CannotCombine
from graft.pretrain.settings import NewTokenizer, PretrainSettings, TokenizerOf
from graft.settings import Settings, parse
from graft.verb import Estimate, Facts, Job, Verb

ROOMS = ("architectures", "settings", "work")


class Pretrain(Verb[PretrainSettings]):
    """Trains a model of a given architecture and size from fresh weights."""

    name = "pretrain"
    summary = "Train a model from scratch on a data set."

    def types(self) -> Mapping[str, type[Settings]]:
        return {"pretrain": PretrainSettings}

    def parse(self, raw: Any, path: tuple[str | int, ...] = ()) -> PretrainSettings:
        return parse(PretrainSettings, raw, path)

    def check(self, settings: PretrainSettings, models: Mapping[str, Facts]) -> list[str]:
        from graft.data.objectives import objective_for
        from graft.pretrain.architectures import positions_for

        found = []
        for test in (
            lambda: positions_for(settings.architecture, settings.positions),
            lambda: objective_for(settings.architecture, settings.objective),
        ):
            try:
                test()
            except CannotCombine as error:
                found.append(str(error))
        if (settings.size is None) == (settings.hidden is None or settings.layers is None):
            found.append("expected either `size`, or `hidden` and `layers`")
        if settings.hidden and settings.heads and settings.hidden % settings.heads:
            found.append(f"expected `heads` to divide `hidden`, found {settings.heads} and {settings.hidden}")
        return found

    def facts(self, settings: PretrainSettings, models: Mapping[str, Facts], key: str) -> Facts:
        own = isinstance(settings.tokenizer, NewTokenizer)
        vocabulary = f"of:{key}" if own else models[settings.tokenizer.of].vocabulary  # type: ignore[union-attr]
        parameters = self._parameters(settings, models)
        return Facts(settings.architecture, f"of:{key}", vocabulary, parameters, 4 * parameters)

    def estimate(self, settings: PretrainSettings, models: Mapping[str, Facts]) -> Estimate:
        from graft.train.estimate import training_estimate

        return training_estimate(self._parameters(settings, models), settings, settings.length)

    def run(self, job: Job) -> dict[str, Any]:
        from graft.pretrain.work import run

        return run(job)

    @staticmethod
    def _parameters(settings: PretrainSettings, models: Mapping[str, Facts]) -> int:
        from graft.pretrain.architectures import dimensions, estimate_parameters, positions_for

        positions = positions_for(settings.architecture, settings.positions)
        if isinstance(settings.tokenizer, TokenizerOf):
            vocabulary = int(models[settings.tokenizer.of].config.get("vocab_size", 32_000))
        else:
            vocabulary = settings.tokenizer.size
        if settings.size is not None:
            shape = dimensions(settings.size, settings.architecture, positions, vocabulary, settings.length)
        else:
            shape = (settings.hidden or 0, settings.layers or 0, settings.heads or 1)
        return estimate_parameters(settings.architecture, positions, *shape, vocabulary, settings.length)


VERB = Pretrain()
__all__ = ["VERB", "NewTokenizer", "PretrainSettings", "TokenizerOf"]
