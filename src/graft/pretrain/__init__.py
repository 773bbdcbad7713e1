"""Pretraining: a model from scratch on real text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.errors import CannotCombine, RequestError
from graft.pretrain.settings import NewTokenizer, PretrainSettings, TokenizerAt, TokenizerOf
from graft.settings import Settings, parse
from graft.verb import Estimate, Facts, Job, Verb

if TYPE_CHECKING:
    from graft.train.memory import Dimensions

ROOMS = ("architectures", "settings", "work")


class Pretrain(Verb[PretrainSettings]):
    """Trains a model of a given architecture and size from fresh weights."""

    name = "pretrain"
    summary = "Train a model from scratch on a data set."
    together = True
    weighed = True
    version = 2

    def types(self) -> Mapping[str, type[Settings]]:
        return {"pretrain": PretrainSettings}

    def parse(self, raw: Any, path: tuple[str | int, ...] = ()) -> PretrainSettings:
        return parse(PretrainSettings, raw, path)

    def located(self, settings: PretrainSettings, root: Path) -> PretrainSettings:
        if not isinstance(settings.tokenizer, TokenizerAt):
            return settings
        folder = (root / Path(settings.tokenizer.path).expanduser()).resolve()
        if not (folder / "tokenizer.json").is_file():
            raise RequestError(f"expected a tokenizer (tokenizer.json) at {folder}, found none")
        return settings.model_copy(update={"tokenizer": TokenizerAt(path=str(folder))})

    def content(self, settings: PretrainSettings) -> Any:
        from graft.hashing import hash_file

        if not isinstance(settings.tokenizer, TokenizerAt):
            return settings.content()
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        files = [Path(settings.tokenizer.path) / name for name in names]
        hashes = {file.name: hash_file(file) for file in files if file.is_file()}
        return {**settings.content(), "tokenizer": hashes}

    def check(self, settings: PretrainSettings, models: Mapping[str, Facts]) -> list[str]:
        from graft.data.objectives import objective_for
        from graft.pretrain.architectures import NO_SIZE, positions_for

        found = []
        for test in (
            lambda: positions_for(settings.architecture, settings.positions),
            lambda: objective_for(settings.architecture, settings.objective),
        ):
            try:
                test()
            except CannotCombine as error:
                found.append(str(error))
        given = [name for name in ("hidden", "layers", "heads") if getattr(settings, name) is not None]
        if settings.size is not None and given:
            found.append(f"expected either `size` or {', '.join(f'`{name}`' for name in given)}, found both")
        elif settings.size is None and not {"hidden", "layers"} <= set(given):
            found.append(NO_SIZE)
        elif settings.hidden and settings.heads and settings.hidden % settings.heads:
            found.append(f"expected `heads` to divide `hidden`, found {settings.heads} and {settings.hidden}")
        return (
            found
            or self._check_tokenizer(settings)
            or self._check_size(settings, models)
            or self._check_parallel(settings, models)
        )

    @staticmethod
    def _check_tokenizer(settings: PretrainSettings) -> list[str]:
        from graft.data.objectives import Span, objective_for
        from graft.data.tokenizers import too_small

        new = settings.tokenizer
        if not isinstance(new, NewTokenizer):
            return []
        spans = isinstance(objective_for(settings.architecture, settings.objective), Span)
        said = too_small(new.algorithm, new.size, sentinels=spans)
        return [said] if said else []

    def _check_parallel(self, settings: PretrainSettings, models: Mapping[str, Facts]) -> list[str]:
        from graft.train.parallel import problems

        return problems(settings.parallel, self._config(settings, models), adapter=False, quantised=False)

    def _check_size(self, settings: PretrainSettings, models: Mapping[str, Facts]) -> list[str]:
        found = self._parameters(settings, models)
        if settings.size is None or abs(found / settings.size - 1) <= 0.1:
            return []
        return [
            f"expected a size that a model of this kind can have, found {settings.size:,}: the nearest has {found:,} "
            f"parameters, {self._vocabulary_size(settings, models):,} tokens included"
        ]

    def facts(self, settings: PretrainSettings, models: Mapping[str, Facts], key: str) -> Facts:
        from graft.vocabulary import vocabulary_hash

        if isinstance(settings.tokenizer, TokenizerOf):
            vocabulary = models[settings.tokenizer.of].vocabulary
        elif isinstance(settings.tokenizer, TokenizerAt):
            vocabulary = vocabulary_hash(Path(settings.tokenizer.path))
        else:
            vocabulary = f"of:{key}"
        parameters = self._parameters(settings, models)
        config = self._config(settings, models)
        has = self._tokenizer(settings, models)
        return Facts(settings.architecture, f"of:{key}", vocabulary, parameters, 4 * parameters, config, tokenizer=has)

    def check_data(
        self, settings: PretrainSettings, models: Mapping[str, Facts], formats: Mapping[str, str]
    ) -> list[str]:
        from graft.data import split_ref
        from graft.data.objectives import objective_for, unspeakable

        named = settings.tokenizer
        name = named.of if isinstance(named, TokenizerOf) else getattr(named, "path", "the new tokenizer")
        objective = objective_for(settings.architecture, settings.objective)
        return unspeakable(objective, name, self._tokenizer(settings, models), formats.get(split_ref(settings.data)[0]))

    @staticmethod
    def _tokenizer(settings: PretrainSettings, models: Mapping[str, Facts]) -> frozenset[str] | None:
        """What of special tokens the tokenizer will have (see `Facts.tokenizer`)."""
        from graft.data.objectives import Span, objective_for
        from graft.vocabulary import tokenizer_of

        if isinstance(settings.tokenizer, TokenizerOf):
            return models[settings.tokenizer.of].tokenizer
        if isinstance(settings.tokenizer, TokenizerAt):
            return tokenizer_of(Path(settings.tokenizer.path))
        spans = isinstance(objective_for(settings.architecture, settings.objective), Span)
        return frozenset({"text", "end", "mask", *(["sentinels"] if spans else [])})

    def estimate(self, settings: PretrainSettings, models: Mapping[str, Facts]) -> Estimate:
        from graft.train.estimate import training_estimate

        known = self._dimensions(settings, models)
        return training_estimate(self._parameters(settings, models), settings, settings.length, known)

    def preparation(
        self, settings: PretrainSettings, models: Mapping[str, Facts], text: Mapping[str, float]
    ) -> Mapping[str, float]:
        from graft.data import split_ref
        from graft.data.objectives import Span, objective_for
        from graft.train.estimate import learning_tokens, tokenising

        if not isinstance(settings.tokenizer, NewTokenizer):
            return tokenising(text, self.facts(settings, models, "").vocabulary)
        name = split_ref(settings.data)[0]
        spans = isinstance(objective_for(settings.architecture, settings.objective), Span)
        made = f"a tokenizer of {name}: {settings.tokenizer}, {spans}, {settings.length}"
        learning = learning_tokens(text.get(f"{name}.train", 0.0), settings.tokenizer.algorithm)
        return {made: learning, **tokenising(text, made)}

    def run(self, job: Job) -> dict[str, Any]:
        from graft.pretrain.work import run

        return run(job)

    @staticmethod
    def _vocabulary_size(settings: PretrainSettings, models: Mapping[str, Facts]) -> int:
        """Tokens; of a new tokenizer what was asked for."""
        if isinstance(settings.tokenizer, TokenizerOf):
            return int(models[settings.tokenizer.of].config["vocab_size"])
        if isinstance(settings.tokenizer, TokenizerAt):
            from tokenizers import Tokenizer

            return Tokenizer.from_file(str(Path(settings.tokenizer.path) / "tokenizer.json")).get_vocab_size()
        return settings.tokenizer.size

    def _parameters(self, settings: PretrainSettings, models: Mapping[str, Facts]) -> int:
        from graft.pretrain.architectures import estimate_parameters, positions_for, shape_of

        positions = positions_for(settings.architecture, settings.positions)
        vocabulary = self._vocabulary_size(settings, models)
        shape = shape_of(settings, vocabulary)
        return estimate_parameters(settings.architecture, positions, *shape, vocabulary, settings.length)

    def _config(self, settings: PretrainSettings, models: Mapping[str, Facts]) -> dict[str, Any]:
        """The configuration; of the ids of special tokens, those of a new tokenizer or of the other model's."""
        from graft.data.objectives import objective_for, told_of
        from graft.pretrain.architectures import Shape, planned_config, positions_for, shape_of

        vocabulary = self._vocabulary_size(settings, models)
        positions = positions_for(settings.architecture, settings.positions)
        ids = {"pad": 0, "bos": 1, "eos": 2}
        if isinstance(settings.tokenizer, TokenizerOf):
            said = models[settings.tokenizer.of].config
            named = {word: said.get(f"{word}_token_id") for word in ids}
            ids |= {word: place for word, place in named.items() if isinstance(place, int)}
        shape = Shape(*shape_of(settings, vocabulary), vocabulary, settings.length, settings.dropout, ids)
        objective = objective_for(settings.architecture, settings.objective)
        return told_of(planned_config(settings.architecture, positions, shape), objective)

    def _dimensions(self, settings: PretrainSettings, models: Mapping[str, Facts]) -> Dimensions:
        from graft.pretrain.architectures import positions_for, shape_of, units_of
        from graft.train.memory import Dimensions

        vocabulary = self._vocabulary_size(settings, models)
        positions = positions_for(settings.architecture, settings.positions)
        width, layers, _ = shape_of(settings, vocabulary)
        hidden, gated = units_of(positions, width)
        stacks = 2 if settings.architecture == "encoder-decoder" else 1
        return Dimensions(width, stacks * layers, hidden, 4 if gated else 5, width, gated, vocabulary)


VERB = Pretrain()
__all__ = ["VERB", "NewTokenizer", "PretrainSettings", "TokenizerAt", "TokenizerOf"]
