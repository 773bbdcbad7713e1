"""Settings are strict, understand units, and tell which nodes they name."""

from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from graft.errors import SettingsError, UnknownName
from graft.evaluate.tasks import TaskSettings
from graft.misfits import CALLED, keys_of
from graft.settings import Bytes, DataRef, ModelRef, Parameters, Settings, Tokens, parse, references
from graft.verbs import verb


class Inner(Settings):
    rank: int = 8


class Example(Settings):
    from_: ModelRef = Field(alias="from")
    models: dict[ModelRef, float] | list[ModelRef] = Field(default_factory=list)
    data: DataRef | None = None
    density: Annotated[float, Field(ge=0, le=1)] = 1.0
    budget: Tokens = 0
    size: Parameters = 0
    limit: Bytes = 0
    inner: Inner = Inner()


def problems(raw):
    with pytest.raises(SettingsError) as error:
        parse(Example, raw, ("models", "soup"))
    return [str(p) for p in error.value.problems]


def test_a_misspelt_key_is_an_error_that_shows_the_nearest_right_one():
    (problem,) = problems({"from": "base", "denisty": 0.2})
    assert problem.startswith("models.soup.denisty: unknown key (did you mean 'density'?); there are: from, models")


def test_a_misspelt_key_in_nested_settings_lists_the_keys_of_those_settings():
    (problem,) = problems({"from": "base", "inner": {"rnak": 4}})
    assert problem == "models.soup.inner.rnak: unknown key (did you mean 'rank'?); there are: rank"


def test_names_that_other_packages_have_for_a_setting_lead_to_it():
    told = problems({"from": "base", "base_model": "x", "inner": {"r": 4}, "lambda": 0.5})
    assert told[0].startswith("models.soup.inner.r: unknown key (here it is called 'rank'); there are: rank")
    assert [problem.partition(";")[0] for problem in told[1:]] == [
        "models.soup.base_model: unknown key (did you mean 'models'?)", "models.soup.lambda: unknown key",
    ]  # fmt: skip


def test_what_other_names_lead_to_is_there():
    verbs = [verb(name).types() for name in ("tune", "merge")]
    known = {key for types in verbs for settings in types.values() for key in keys_of(settings)}
    assert set(CALLED.values()) <= known | set(keys_of(TaskSettings))


class Careful(Example):
    @model_validator(mode="after")
    def _check(self):
        if self.data == "none":
            raise ValueError("no data, no model")
        return self


def test_a_validator_that_looks_at_all_settings_does_not_show_all_of_them():
    with pytest.raises(SettingsError) as error:
        parse(Careful, {"from": "base", "data": "none"}, ("models", "soup"))
    assert str(error.value) == "models.soup: no data, no model"


class New(Settings):
    algorithm: Literal["bpe", "unigram"] = "bpe"
    size: Annotated[int, Field(ge=260)] = 4096


class Of(Settings):
    of: ModelRef


class Named(Settings):
    kind: Literal["named"] = "named"
    share: float = 0.5


class Nameless(Settings):
    kind: Literal["nameless"] = "nameless"


class Either(Settings):
    tokenizer: New | Of = New()
    weights: dict[str, float] | Of | float | None = None
    rules: list[New | Of] = []
    by: Annotated[Named | Nameless, Field(discriminator="kind")] = Named()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            {"tokenizer": {"sise": 512}},
            ["a.tokenizer.sise: unknown key (did you mean 'size'?); there are: algorithm, size"],
        ),
        (
            {"tokenizer": {"size": 3, "algorithm": "bpee"}},
            [
                "a.tokenizer.algorithm: expected 'bpe' or 'unigram', found 'bpee'",
                "a.tokenizer.size: expected a number greater than or equal to 260, found 3",
            ],
        ),
        (
            {"tokenizer": {"x": 1}},
            ["a.tokenizer: expected a mapping with algorithm, size or a mapping with of, found {"],
        ),
        ({"tokenizer": 512}, ["a.tokenizer: expected a mapping with algorithm, size or a mapping with of, found 512"]),
        ({"tokenizer": {"of": 3}}, ["a.tokenizer.of: expected text, found 3"]),
        (
            {"weights": {"coder": "half"}},
            ["a.weights.coder: expected a number"],
        ),
        (
            {"weights": "half"},
            ["a.weights: expected a mapping or a mapping with of or a number"],
        ),
        ({"rules": [{"size": 512}, {"sise": 512}]}, ["a.rules.1.sise: unknown key (did you mean 'size'?)"]),
        ({"by": {"kind": "nmaed"}}, ["a.by: unknown kind 'nmaed' (did you mean 'named'?); there are: named, nameless"]),
        ({"by": {"kind": "named", "sahre": 1}}, ["a.by.sahre: unknown key (did you mean 'share'?)"]),
    ],
)
def test_of_several_types_that_may_stand_somewhere_only_the_meant_one_is_spoken_of(raw, expected):
    with pytest.raises(SettingsError) as error:
        parse(Either, raw, ("a",))
    found = sorted(str(p) for p in error.value.problems)
    assert len(found) == len(expected)
    assert [line[: len(start)] for line, start in zip(found, expected, strict=True)] == expected


def test_what_is_to_be_a_mapping_is_said_by_its_keys_not_by_the_name_of_a_class():
    assert problems({"from": "base", "inner": 3}) == ["models.soup.inner: expected a mapping with rank, found 3"]
    (problem,) = problems("base")
    assert problem.startswith("models.soup: expected a mapping with from, models, data, density")
    assert problem.endswith("found 'base'")


def test_all_problems_are_reported_at_once():
    found = problems({"density": 2, "budget": "two", "x": 1})
    assert len(found) == 4
    assert "models.soup.from: this key is required and missing" in found


@pytest.mark.parametrize(
    ("written", "tokens"), [("2M tokens", 2_000_000), ("500k", 500_000), ("1.5M", 1_500_000), (7, 7)]
)
def test_tokens_are_read_with_their_unit(written, tokens):
    assert parse(Example, {"from": "b", "budget": written}).budget == tokens


def test_sizes_tell_powers_of_ten_from_powers_of_two():
    assert parse(Example, {"from": "b", "limit": "2GB"}).limit == 2 * 10**9
    assert parse(Example, {"from": "b", "limit": "2GiB"}).limit == 2 * 2**30


def test_references_are_found_from_the_types():
    settings = parse(Example, {"from": "base", "models": {"a": 0.5, "b": 0.5}, "data": "mixed.dev"})
    assert [(kind, name) for kind, name, _ in references(settings)] == [
        ("model", "base"),
        ("model", "a"),
        ("model", "b"),
        ("data", "mixed.dev"),
    ]
    as_list = parse(Example, {"from": "base", "models": ["a", "b"]})
    assert [name for _, name, _ in references(as_list)] == ["base", "a", "b"]


def test_an_unknown_name_lists_the_valid_ones():
    assert str(UnknownName("verb", "mrege", ["merge", "tune"])) == (
        "unknown verb 'mrege' (did you mean 'merge'?); there are: merge, tune"
    )


def test_lists_that_are_too_long_or_too_short_are_told_by_their_bounds():
    from graft.merge import VERB

    for models, bound in (
        ("[a]", "at least 2 items, found ['a']"),
        ("[a, b, c]", "at most 2 items, found ['a', 'b', 'c']"),
    ):
        with pytest.raises(SettingsError) as error:
            VERB.parse({"method": "slerp", "models": models[1:-1].split(", ")})
        assert f"models: expected {bound}" in str(error.value)
