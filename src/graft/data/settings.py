"""What a recipe's `data:` section may say. Light: nothing heavy is imported here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from graft.errors import Problem, SettingsError, UnknownName
from graft.misfits import near_misses
from graft.settings import DataRef, Settings
from graft.settings import parse as parse_settings

Format = Literal["text", "completion", "chat", "labelled", "pairs", "tagged", "spans", "raw"]
Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")

FIELDS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "pairs": ("source", "target"),
    "labelled": ("text", "label"),
    "tagged": ("tokens", "tags"),
    "spans": ("question", "context", "answer"),
    "text": ("text",),
}
"""The fields of a record of each format, in the order in which formats are inferred. `raw` keeps all, for tasks."""


class Shares(Settings):
    """How documents are shared out; train gets the rest."""

    dev: Annotated[float, Field(ge=0, lt=1, description="Share of the documents that go to dev.")] = 0.05
    test: Annotated[float, Field(ge=0, lt=1, description="Share of the documents that go to test.")] = 0.05

    @model_validator(mode="after")
    def _leave_some(self) -> Shares:
        if self.dev + self.test >= 1:
            raise ValueError(f"expected dev + test below 1, so that train gets some, found {self.dev + self.test}")
        return self


class Source(Settings):
    """What all sources share."""

    limit: Annotated[
        int | None,
        Field(gt=0, description="Read at most this many documents of each group of files, or each split."),
    ] = None
    splits: Annotated[Shares, Field(description="Shares of dev and test, by the hash of each document.")] = Shares()
    pieces: Annotated[
        int | None,
        Field(
            gt=0, description="Cut texts, once they are split, into pieces of about so many characters, at line ends."
        ),
    ] = None

    def feeds(self, split: str) -> bool:
        """Whether documents go into `split`, as far as the settings tell."""
        return split == "train" or getattr(self.splits, split) > 0


class PythonLibrary(Source):
    """The running interpreter's own library: real text on every machine, without a download."""

    source: Literal["python-library"]
    keep: Annotated[
        Literal["code", "docstrings", "tokens", "packages"],
        Field(
            description="`code`: whole files; `docstrings`: their prose, one a document; `tokens`: statements as lists "
            "of tokens, each tagged with its kind; `packages`: what docstrings begin with, labelled with the package "
            "they stand in."
        ),
    ] = "code"
    packages: Annotated[
        list[str], Field(description="Only these packages or modules, such as `json` or `email`; empty: all of them.")
    ] = []


Paths = str | list[str]
"""A file, a folder, a glob, or a list of them, relative to the recipe's folder."""


class Files(Source):
    """What sources made of files share. Where `dev` or `test` are given, nothing else goes into that split.

    Without `path` nothing is split by hash: a split of which no files are given is empty, and a model that is trained
    where there is no dev split has no dev score.
    """

    source: str
    path: Annotated[Paths | None, Field(description="File, folder or glob, or a list of them; split by hash.")] = None
    train: Annotated[Paths | None, Field(description="Files of the train split, where the split is given.")] = None
    dev: Annotated[Paths | None, Field(description="Files of the dev split.")] = None
    test: Annotated[Paths | None, Field(description="Files of the test split.")] = None

    @model_validator(mode="after")
    def _some_path(self) -> Files:
        if not (self.path or self.train or self.dev or self.test):
            raise ValueError("expected `path` (split by hash) or `train`, `dev`, `test` (splits given), found none")
        if self.path and self.train:
            raise ValueError("expected `path` or `train`, found both: `path` is what is split by hash")
        return self

    def feeds(self, split: str) -> bool:
        """Whether documents go into `split`: from files of its own, or as a share of what is split by hash."""
        return bool(getattr(self, split)) or (self.path is not None and super().feeds(split))

    def groups(self) -> dict[str, list[str]]:
        """Paths as written, by what they feed: `path` (to be split by hash) or the name of a split.

        A given test split comes first: of exact duplicates the first is kept, so a benchmark stays whole.
        """
        given = {"test": self.test, "dev": self.dev, "train": self.train, "path": self.path}
        return {name: [paths] if isinstance(paths, str) else list(paths) for name, paths in given.items() if paths}


class TextFiles(Files):
    """Plain text: `.txt` and the like, also `.gz` and `.xz`."""

    source: Literal["text"]
    document: Annotated[
        Literal["file", "line", "paragraph"],
        Field(
            description="What a document is: a file, a line, or lines up to an empty one. "
            "One of more than 4 MB comes in parts, all of one split."
        ),
    ] = "file"
    separator: Annotated[
        str | None, Field(description="Documents end at a line that reads exactly so; goes before `document`.")
    ] = None


class Records(Files):
    """What sources of records share."""

    format: Annotated[
        Format | None, Field(description="Format of the records; None: from the fields of the first.")
    ] = None
    fields: Annotated[
        dict[str, str],
        Field(
            description="Where our fields stand in the file: `{text: body, label: class}`. "
            "A text may also be a list of lines or of [speaker, line] pairs."
        ),
    ] = {}


class Jsonl(Records):
    """One JSON object a line, also `.gz` and `.xz`."""

    source: Literal["jsonl"]


class Csv(Records):
    """Comma-separated values with a header line, also `.gz` and `.xz`; `.tsv` with tabs."""

    source: Literal["csv"]


class Parquet(Records):
    """Parquet files."""

    source: Literal["parquet"]


class HuggingFace(Source):
    """A Hugging Face data set: a local folder, or an id on the hub when `hub: true` allows the network."""

    source: Literal["huggingface"]
    name: Annotated[str, Field(description="Folder (as `save_to_disk` wrote it, or of data files) or id.")]
    subset: Annotated[str | None, Field(description="Configuration of the data set.")] = None
    split: Annotated[
        str | None, Field(description="Read only this split of it and split that by hash; None: its own splits.")
    ] = None
    revision: Annotated[
        str | None, Field(description="Commit, tag or branch on the hub; None: `main`. Its commit is part of the keys.")
    ] = None
    hub: Annotated[bool, Field(description="Allow the network.")] = False
    format: Annotated[
        Format | None, Field(description="Format of the records; None: from the fields of the first.")
    ] = None
    fields: Annotated[dict[str, str], Field(description="Where our fields stand in the data set.")] = {}


class Mixture(Settings):
    """A mixture of data sets: each is drawn in proportion to weight^(1/temperature)."""

    mix: Annotated[dict[DataRef, float], Field(min_length=1, description="Data sets and their weights.")]
    temperature: Annotated[float, Field(gt=0, description="1 keeps the weights; higher evens them out.")] = 1.0

    @model_validator(mode="after")
    def _positive(self) -> Mixture:
        for name, weight in self.mix.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"expected a weight above 0 for {name!r}, found {weight}")
        return self

    def probabilities(self) -> dict[str, float]:
        """Share of the tokens that each part gives."""
        raised = {name: weight ** (1 / self.temperature) for name, weight in self.mix.items()}
        total = sum(raised.values())
        return {name: value / total for name, value in raised.items()}


SOURCES: dict[str, type[Source]] = {
    "python-library": PythonLibrary,
    "text": TextFiles,
    "jsonl": Jsonl,
    "csv": Csv,
    "parquet": Parquet,
    "huggingface": HuggingFace,
}

DataSettings = Source | Mixture


def parse(raw: Any, path: tuple[str | int, ...] = ()) -> DataSettings:
    """Settings of one data set. Raises SettingsError (all problems) or UnknownName for a source that does not exist."""
    if not isinstance(raw, dict):
        raise SettingsError([Problem(path, f"expected a mapping with `source:` or `mix:`, found {raw!r}")])
    if "mix" in raw:
        return parse_settings(Mixture, raw, path)
    if "source" not in raw:
        known = f"expected `source:` or `mix:`; sources are: {', '.join(sorted(SOURCES))}"
        raise SettingsError(near_misses(raw, ("source", "mix"), path) or [Problem(path, known)])
    if raw["source"] not in SOURCES:
        raise UnknownName("data source", str(raw["source"]), SOURCES)
    return parse_settings(SOURCES[raw["source"]], raw, path)
