"""Where things lie in the folder of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """The folder of a recipe's run: `models/`, `work/`, `cache/`, results."""

    folder: Path

    @property
    def models(self) -> Path:
        """Where the artifacts lie."""
        return self.folder / "models"

    def model(self, name: str) -> Path:
        """The artifact of a node."""
        return self.models / name

    def work(self, name: str) -> Path:
        """Where a node is made: `out`, `scratch`, and the key of what is being made."""
        return self.folder / "work" / name

    @property
    def cache(self) -> Path:
        """What nodes share, named by content."""
        return self.folder / "cache"

    @property
    def lock(self) -> Path:
        """Held by the one run that works here."""
        return self.folder / ".lock"


@dataclass(frozen=True)
class OneModel(Places):
    """One model without a recipe: `target` is its folder, everything else lies in `folder` beside it."""

    target: Path

    def model(self, name: str) -> Path:
        """The artifact: the folder that was asked for."""
        return self.target

    @property
    def lock(self) -> Path:
        """Held by the one command that makes this model."""
        return self.folder / f"{self.target.name}.lock"


def beside(target: Path) -> OneModel:
    """The places for one model: work and cache lie in `.graft` beside it."""
    target = target.absolute()
    return OneModel(target.parent / ".graft", target)
