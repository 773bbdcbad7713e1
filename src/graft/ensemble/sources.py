"""What the members of an ensemble come from: models, checkpoints of one training, passes with dropout. Light."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.ensemble.settings import EnsembleSettings, MemberSettings
from graft.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Source:
    """One member: its name in the ensemble, the folder it is loaded from, and what is done to it then."""

    name: str
    folder: Path
    model: str
    """The model of the recipe that it is, or comes from."""
    entry: int = 0
    """Place of the line of the recipe that it stands in."""
    share: float = 1.0
    """Of the weight that that line has."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """`dropout` (share, seed), `dtype`, `device`, as the configuration names them."""

    def load(self, device: str | None = None) -> PreTrainedModel:
        """The member alone."""
        from graft.ensemble.members import loaded

        return loaded(self.folder, self.extras, device=device)


def sources_of(settings: EnsembleSettings, folders: Mapping[str, Path], seed: int) -> list[Source]:
    """Every member, in order, from the folders of the models that the settings name.

    Raises RequestError for a checkpoint that a model does not have.
    """
    short = short_names(settings.names)
    found = [
        replace(source, entry=place)
        for place, entry in enumerate(settings.entries)
        for source in _of_entry(entry, short[entry.model], folders[entry.model], seed)
    ]
    names = [source.name for source in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(
            f"expected members of different names, found {twice} twice among {', '.join(names)}: name one by a link to "
            "its folder"
        )
    return found


def short_names(models: Sequence[str]) -> dict[str, str]:
    """What members are called: in a recipe as the models, outside one as many last parts of their folders as tell them
    apart."""
    every = [_parts(model) for model in models]
    return {model: _short(parts, every) for model, parts in zip(models, every, strict=True)}


def _parts(model: str) -> Sequence[str]:
    """The folders of a path as it is written, or from the root on where it leads upwards."""
    path = Path(model)
    upwards = not path.name or ".." in path.parts
    return [part for part in (path.resolve() if upwards else path).parts if part != path.anchor]


def _short(parts: Sequence[str], every: Sequence[Sequence[str]]) -> str:
    """The shortest end of a path that no other of `every` has; all of it where each end is another's too."""
    least = (n for n in range(1, len(parts) + 1) if sum(each[-n:] == parts[-n:] for each in every) == 1)
    return "-".join(parts[-next(least, len(parts)) :])


def _of_entry(entry: MemberSettings, name: str, folder: Path, seed: int) -> list[Source]:
    extras = {name: value for name in ("dtype", "device") if (value := getattr(entry, name)) is not None}
    made = [replace(source, extras=extras) for source in _checkpoints(entry, name, folder)]
    if entry.dropout is not None:
        made = [each for source in made for each in _passes(source, entry, extras, seed)]
    return [replace(source, share=1 / len(made)) for source in made]


def _passes(source: Source, entry: MemberSettings, extras: dict[str, Any], seed: int) -> list[Source]:
    dropout = entry.dropout
    assert dropout is not None
    first = seed if dropout.seed is None else dropout.seed
    masks = [{"share": dropout.share, "seed": first * 10_000 + number} for number in range(dropout.passes)]
    return [
        replace(source, name=f"{source.name}.{number}", extras={**extras, "dropout": mask})
        for number, mask in enumerate(masks, start=1)
    ]


def _checkpoints(entry: MemberSettings, name: str, folder: Path) -> list[Source]:
    if entry.checkpoint is None and entry.checkpoints is None:
        return [Source(name, folder, entry.model)]
    there = _kept(folder)
    if entry.checkpoint is not None:
        wanted = [entry.checkpoint]
    else:
        steps = [each for each in there if each.startswith("step-")]
        count = entry.last_checkpoints
        wanted = steps if count is None else steps[-count:]
        if not wanted or (count is not None and len(wanted) < count):
            raise RequestError(
                f"{entry.model}: expected {count or 'some'} checkpoints, found {', '.join(steps) or 'none'}: keep more "
                "of them in its training (`keep: {last: N}`)"
            )
    missing = [each for each in wanted if each not in there]
    if missing:
        raise RequestError(
            f"{entry.model}: expected the checkpoint {missing[0]}, found {', '.join(there) or 'none'}: keep it in its "
            "training (`keep: {last: N}`)"
        )
    return [Source(f"{name}-{step}", folder / "checkpoints" / step, entry.model) for step in wanted]


def _kept(folder: Path) -> list[str]:
    """Names of the checkpoints of a training, the oldest first."""
    found = [place.name for place in (folder / "checkpoints").glob("*") if (place / "config.json").is_file()]
    return sorted(found, key=lambda name: (int(name[5:]) if name[5:].isdigit() else 0, name))
