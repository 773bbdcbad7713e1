"""Settings are strict, understand units, and tell which nodes they name."""

from typing import Annotated

import pytest
from pydantic import Field, model_validator

from graft.errors import SettingsError, UnknownName
from graft.settings import Bytes, DataRef, ModelRef, Parameters, Settings, Tokens, parse, references


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
