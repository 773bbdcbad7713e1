"""The parents of a merge as they lie on disk: models, and adapters with the models that they stand on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from graft.adapters.facts import adapted_base, base_there, check_base, entry_of, frozen_config, is_adapted, obstacles
from graft.checkpoint import Headers, TensorReader, read_headers
from graft.errors import CannotCombine, CheckpointError, RequestError
from graft.folders import ADAPTED, companions, is_quantised, read_config
from graft.lora import Lora, base_folder, is_lora, new_rows, read_lora, stands_for
from graft.merge.naming import Names, Placed, alike, is_dead, renamed
from graft.pickles import converted, is_pickled, refusal
from graft.verb import Facts

if TYPE_CHECKING:
    from graft.merge.settings import MergeSettings


@dataclass(frozen=True)
class Input:
    """One parent. `home` is the folder of its configuration and tokenizer: of the base, where it is an adapter."""

    folder: Path
    home: Path
    names: Names = field(default_factory=dict, compare=False)
    """What tensors are called here that the files call otherwise."""

    @cached_property
    def headers(self) -> Headers:
        """All tensors of the model; those that an adapter changes are worked out when they are read."""
        read = {name: header for name, header in self._as_stored.items() if name not in self.dead}
        return renamed(read, self.names) if self.names else read

    @cached_property
    def dead(self) -> dict[str, str]:
        """Buffers of old versions, which are not merged: as they are stored, and as they are called here."""
        stored = self._as_stored.items()
        return {name: self.names.get(name, name) for name, header in stored if is_dead(header)}

    @cached_property
    def _as_stored(self) -> Headers:
        if self.folder == self.home:
            return read_headers(self.folder)
        from graft.merge.adapted import adapted_headers

        return adapted_headers(self.changes, read_headers(self.home), self.tied_apart)

    @cached_property
    def changes(self) -> Lora:
        """What an adapter makes of its base."""
        return changes_in(self.folder, self.home)

    @cached_property
    def apart(self) -> frozenset[str]:
        """Tensors that the base has under another name and the adapter under their own."""
        return frozenset(self.headers) & frozenset(self.tied_apart) if self.folder != self.home else frozenset()

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer: an adapter's own, where it has one."""
        return self.folder if (self.folder / "tokenizer.json").is_file() else self.home

    @property
    def companions(self) -> dict[str, Path]:
        """Files beside the weights, by name: an adapter's own tokenizer, else what its base has."""
        return companions(self.tokenizer, self.home)

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json` of the model; with as many tokens as an adapter that holds the embeddings whole has rows."""
        config = read_config(self.home)
        if self.folder == self.home:
            return config
        from graft.merge.vocabulary import with_size

        rows = new_rows(self.changes, read_headers(self.home), config.get("vocab_size"))
        return config if rows is None else with_size(config, rows)

    @cached_property
    def tied_apart(self) -> dict[str, str]:
        """Tensors that the base does not store, as they are the same as another one, and that the adapter changes."""
        base = read_headers(self.home)
        own = self.changes
        if all(stands_for(name, base) for name in (*own.changes, *own.whole)):
            return {}
        from graft.merge.architecture import architecture

        found = architecture(self.home)
        return {name: same for name, same in found.tied.items() if same in base} if found else {}

    def open(self) -> TensorReader:
        """Reads pieces of the tensors."""
        reader = self._reader()
        if not (self.names or self.dead):
            return reader
        places = {self.names.get(t, t): t for t in reader.headers if t not in self.dead}
        return Placed(reader, places, owns=True)

    def _reader(self) -> TensorReader:
        if self.folder == self.home:
            return TensorReader(self.folder)
        from graft.merge.adapted import AdaptedReader

        return AdaptedReader(self.changes, self.home, self.tied_apart)


def inputs(settings: MergeSettings, folders: Mapping[str, Path]) -> dict[str, Input]:
    """The parents by name. Raises CannotCombine for an adapter whose base is not to be found."""
    found = {name: Input(folders[name], _home(settings, name, folders)) for name in settings.parents}
    # of a part it is said how names begin
    return found if settings.part is not None else called_alike(found)


def called_alike(parts: Mapping[str, Input], model: Collection[str] = ()) -> dict[str, Input]:
    """The same, with one name for a tensor that some saved under another. `model`: the names that it has itself."""
    if len({part.home for part in parts.values()}) == 1 and not model:
        return dict(parts)
    stored: dict[str, Collection[str]] = {name: _names(part.home, _state(part.home)) for name, part in parts.items()}
    names = alike({**stored, **({"": model} if model else {})})
    return {name: replace(part, names=names[name]) for name, part in parts.items()}


@lru_cache(maxsize=64)
def _names(home: Path, state: tuple[Any, ...]) -> frozenset[str]:
    """The names of a folder's tensors, asked for more than once in a merge."""
    return frozenset(read_headers(home))


def _state(home: Path) -> tuple[Any, ...]:
    files = sorted(home.glob("*.safetensors*"))
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def once(settings: MergeSettings, folders: Mapping[str, Path]) -> None:
    """Raises CannotCombine where two names of models, or of the base, lead to one folder."""
    named: dict[Path, str] = {}
    for name in settings.parents:
        first = named.setdefault(folders[name].resolve(), name)
        if first != name:
            raise CannotCombine(f"expected each model once, found {first} and {name}, which are one folder")


def _home(settings: MergeSettings, name: str, folders: Mapping[str, Path]) -> Path:
    other = settings.base_name if settings.base_name != name else None
    adapters_of, base = (folders[found] if found is not None else None for found in (settings.adapters_of, other))
    return home_of(name, folders[name], adapters_of, base)


def home_of(name: str, folder: Path, adapters_of: Path | None = None, base: Path | None = None) -> Path:
    """The folder of the model itself, or of the one that an adapter stands on: `adapters_of` where that is said, else
    the one that the adapter names, else `base`.

    Raises CannotCombine where there is none of them, or where it is no model, and CheckpointError where graft's own
    adapter was made for other weights.
    """
    if not is_adapter(folder):
        return folder
    named = base_folder(folder) if is_lora(folder) else base_there(folder)
    found = adapters_of or named or base
    if found is None:
        raise CannotCombine(homeless(name))
    if is_lora(found) or adapted_base(found) is not None:
        raise CannotCombine(f"{name} stands on {found}, which is an adapter itself: fold that one into its model first")
    unpacked = adapters_of is not None and named is not None and is_quantised(named)
    if not (is_lora(folder) or unpacked):
        # the weights that packed ones stand for have another hash
        check_base(folder, entry_of(folder), found)
    return found


def misplaced(settings: MergeSettings, models: Mapping[str, Facts]) -> list[str]:
    """What is wrong with the models that the adapters among the parents stand on, as far as all lie on the disk yet."""
    folders = {name: Path(facts.folder) for name, facts in models.items() if facts.folder}
    if not {name for name in (settings.adapters_of, settings.base_name) if name is not None} <= folders.keys():
        return []
    found: list[str] = []
    for name in (parent for parent in settings.parents if parent in folders):
        try:
            _home(settings, name, folders)
        except (CannotCombine, CheckpointError) as error:
            found.append(str(error))
    return found


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds changes of another model's weights that can be read a piece at a time, and no model."""
    return is_lora(folder) or (adapted_base(folder) is not None and not obstacles(read_config(folder)[ADAPTED]))


def changes_in(folder: Path, home: Path) -> Lora:
    """What the adapter in `folder` makes of the model in `home`; in the form of peft, or graft's own."""
    if is_lora(folder):
        return read_lora(folder)
    from graft.adapters.affine import read_affine

    return read_affine(folder, home)


def unpickled(settings: MergeSettings, folders: Mapping[str, Path], cache: Path) -> dict[str, Path]:
    """The folders, those with pickles replaced by converted ones in `cache`, where that is allowed."""
    return {name: _safe(folder, cache) if settings.allow_pickle else folder for name, folder in folders.items()}


@contextmanager
def readable(folders: Sequence[Path], allow_pickle: bool) -> Iterator[list[Path]]:
    """The folders; instead of those with pickles converted ones, which are there until the end.

    Raises RequestError for pickles that are not allowed.
    """
    if not allow_pickle and (found := [str(folder) for folder in folders if is_pickled(folder)]):
        raise RequestError(refusal(found))
    with TemporaryDirectory(prefix="graft-") as cache:
        yield [_safe(folder, Path(cache)) for folder in folders]


def _safe(folder: Path, cache: Path) -> Path:
    return converted(folder, cache, _tied(folder)) if is_pickled(folder) else folder


def _tied(folder: Path) -> Mapping[str, str]:
    from graft.merge.architecture import architecture

    if is_lora(folder):
        return {}
    found = architecture(folder)
    return found.tied if found else {}


def homeless(name: str) -> str:
    """What is said of an adapter without a base."""
    return f"{name} is an adapter, and the model it names is not on this machine: say which it is, as `adapters_of`"


def settled(settings: MergeSettings, models: Mapping[str, Facts]) -> dict[str, Facts]:
    """Facts of the parents, an adapter's being those of the model that it stands on."""
    return {name: _settled(settings, models, models[name]) for name in settings.parents}


def _settled(settings: MergeSettings, models: Mapping[str, Facts], facts: Facts) -> Facts:
    if is_adapted(facts) and not obstacles(facts.config[ADAPTED]):
        # what is merged is the model, of which the folder holds the changes
        config = frozen_config(dict(facts.config))
        size = 4 if config.get("dtype", config.get("torch_dtype", "float32")) == "float32" else 2
        facts = replace(facts, mergeable=True, config=config, stored="adapter", bytes=size * facts.parameters)
    pickled = facts.stored == "pickle" and facts.folder != "" and is_lora(facts.folder)
    if facts.stored != "adapter" and not pickled:
        return facts
    under = models[settings.adapters_of] if settings.adapters_of is not None else facts
    if under.architecture == "unknown" and settings.base_name is not None:
        under = models[settings.base_name]
    spoken = under.vocabulary if facts.vocabulary.startswith("none:") else facts.vocabulary
    return replace(under, vocabulary=spoken, stored="adapter", trained_on=under.trained_on | facts.trained_on)
