"""The reference says of every key what may be written, what stands there otherwise, and what it means."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from graft import recipe_reference as reference
from graft.settings import Bytes, DataRef, ModelRef, Settings, Tokens
from graft.train.settings import Budget

COMMITTED = Path(__file__).resolve().parents[1] / "docs" / "recipe.md"


class Inner(Settings):
    """What stands inside."""

    depth: Annotated[int, Field(description="How deep.")] = 2


class Sample(Settings):
    """Shows every kind of field."""

    from_: Annotated[ModelRef, Field(alias="from", description="The model | to start from.")]
    data: DataRef | None = None
    window: Tokens = 512
    room: Annotated[Bytes | None, Field(description="Room.")] = None
    how: Literal["sum", "mean"] = "mean"
    weights: dict[ModelRef, float] = {}
    budget: Annotated[Budget, Field(description="How long.")]
    inner: Inner = Inner()


ROWS = {line.split("|")[1].strip(): line for line in reference.section("x", Sample).splitlines() if line[:3] == "| `"}


def test_a_key_stands_under_the_name_that_people_write():
    assert ROWS["`from`"] == "| `from` | model | **required** | The model \\| to start from |"


def test_types_stand_in_words():
    assert ROWS["`data`"].startswith("| `data` | data set | none |")
    assert ROWS["`window`"].startswith("| `window` | tokens, such as `2M tokens` | `512` |")
    assert ROWS["`room`"] == "| `room` | bytes, such as `24GB` | none | Room |"
    assert ROWS["`how`"].startswith("| `how` | `sum` or `mean` | `mean` |")
    assert ROWS["`weights`"].startswith("| `weights` | mapping of model to number | `{}` |")


def test_settings_that_are_one_value_show_how_they_are_written():
    assert ROWS["`budget`"] == (
        "| `budget` | `2M tokens` (or `2M`), `500 steps` or `2 epochs` | **required** | How long |"
    )
    assert "`amount`" not in ROWS


def test_settings_inside_settings_are_linked():
    assert ROWS["`inner`"].startswith("| `inner` | [`Inner`](#inner) | its own |")


def test_every_link_inside_the_reference_has_its_heading():
    text = reference.reference()
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in text.splitlines()
        if line[:1] == "#"
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_the_committed_reference_is_current():
    assert COMMITTED.read_text() == reference.reference(), "run: python -m graft.recipe_reference > docs/recipe.md"
