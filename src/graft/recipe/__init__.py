"""The typed recipe: a whole family tree in one YAML file, checked before anything runs.

`read_recipe` reports everything that is wrong at once, each problem with its line. What it returns is complete: every
setting resolved, every name known, the order of the nodes found, and the facts of each model that is to be made.
"""

from graft.recipe.reader import build_recipe, read_recipe
from graft.recipe.sections import Node, Outline, Recipe

__all__ = ["Node", "Outline", "Recipe", "build_recipe", "read_recipe"]
