"""What is wrong with a recipe, gathered while it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from graft.errors import CheckpointError, Problem, RequestError, SettingsError, forbidden
from graft.recipe.salvage import Where, salvaged

T = TypeVar("T")


class Problems:
    """A list of problems, each with its place in the document."""

    def __init__(self, found: Iterable[Problem] = ()):
        self.found = list(found)

    def note(self, path: Where, message: str) -> None:
        """One more problem."""
        self.found.append(Problem(path, message))

    def attempt(self, path: Where, action: Callable[[], T]) -> T | None:
        """What `action` gives; None where it raises what a wrong request raises, which is noted."""
        try:
            return action()
        except SettingsError as error:
            self.found += error.problems
        except (RequestError, CheckpointError) as error:
            self.note(path, str(error))
        except PermissionError as error:
            self.note(path, str(forbidden(error)))
        return None

    def salvage(self, path: Where, parse: Callable[[Any], T], raw: Any) -> tuple[T | None, bool]:
        """What can be read of `raw`, and whether that is all that was meant; what is wrong is noted."""
        try:
            found = salvaged(parse, raw, path)
        except (RequestError, CheckpointError) as error:
            self.note(path, str(error))
            return None, False
        self.found += found.problems
        return found.settings, found.sure

    def of(self, section: str) -> set[str | int]:
        """What in this section has a problem."""
        return {p.path[1] for p in self.found if p.path[:1] == (section,) and len(p.path) > 1}
