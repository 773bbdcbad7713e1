"""What is wrong with a recipe, in words."""

from __future__ import annotations

import pytest

from graft.errors import RecipeError
from graft.recipe import read_recipe


def problems(path):
    """Each with its line."""
    with pytest.raises(RecipeError) as error:
        read_recipe(path)
    return [str(problem) for problem in error.value.problems]
