"""What every verb of a recipe (pretrain, tune, merge, ensemble, …) must be able to do.

A verb is a folder. Its package exposes `VERB`, one instance of a subclass of `Verb`. Importing it must be light: torch
and transformers are imported inside functions. The recipe asks verbs for facts and problems, `graft plan` asks for
estimates, and the runner runs them; nobody else needs to know which verbs there are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from graft.errors import RequestError
from graft.settings import Settings, said_first


@dataclass(frozen=True)
class Facts:
    """What is known of a model before it exists: enough to say what may be combined and what it will cost."""

    architecture: str
    """`decoder`, `encoder` or `encoder-decoder`."""
    initialisation: str
    """The same for all models grown from one initialisation; only these may have their weights averaged."""
    vocabulary: str
    """The same for all models with the same tokenizer."""
    parameters: int
    """Number of parameters that are stored."""
    bytes: int
    """Size of the weights that it is loaded from, those of members and of an adapter's base among them."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The `transformers` configuration, or what of it is known already."""
    mergeable: bool = True
    """False where the node has no weights of its own to average (an ensemble)."""
    trained_on: frozenset[str] = frozenset()
    """Fingerprints of the data (with split) that went into the weights, ancestors' included."""
    stored: Literal["safetensors", "adapter", "pickle", "quantised"] = "safetensors"
    """How the weights lie on disk; `adapter`: factors in the form of peft, added to a base; `quantised`: packed."""
    tokenizer: frozenset[str] | None = None
    """What its tokenizer has of `text`, `end`, `mask` and `sentinels`: nothing where there is none; None: not known."""
    heads: Mapping[str, str] = field(default_factory=dict)
    """Heads for tasks, beside or in the place of its own: the task's name → `classification`, `tagging` or `spans`."""
    start: Path | None = None
    """Where weights lie that it grew from, if nothing else tells of its initialisation (`unknown:…`)."""
    frozen: str = ""
    """The model below its adapters, by its folder or, where it has none yet, its node's name: the same where models
    share it."""
    folder: str = ""
    """Where these very weights lie, if they are on disk already."""


@dataclass(frozen=True)
class Estimate:
    """What a node will cost. `note` says what the figures rest on."""

    parameters: int
    disk_bytes: int
    memory_bytes: int
    seconds: float | None = None
    note: str = ""
    parts: Mapping[str, int] = field(default_factory=dict)
    """Of a training the bytes of memory by what is held; see `training_estimate`."""


@dataclass(frozen=True)
class Job:
    """One node to run: settings, where its inputs are, and where its output goes."""

    name: str
    settings: Settings
    seed: int
    out: Path
    """Becomes the artifact. May hold what a killed run left: a verb goes on from there or starts over."""
    scratch: Path
    """For resuming; survives a kill, removed when the node is done."""
    cache: Path
    """Token streams and other things that nodes share, named by content."""
    models: Mapping[str, Path]
    """Folder of each model the settings name."""
    data: Mapping[str, Any]
    """Settings of every data set of the recipe, by name; opened with `graft.data.open_corpus`."""
    root: Path = Path()
    """Folder that relative paths in the recipe start from."""
    target: Path | None = None
    """Where `out` will stand in the end: relative paths to other models start there. None: it stays where it is."""
    device: str | None = None
    """None: the accelerator where there is one, else the CPU."""


S = TypeVar("S", bound=Settings)
QUANTISED = "is quantised: {quantize: {from: %s, bits: 16}} makes plain weights of it"
"""What is said of a packed model that is to be read as a plain one."""


class Verb(Generic[S]):
    """Base of the verbs. `S` is the settings type that `parse` gives."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for help texts and the recipe reference."""
    version: ClassVar[int] = 1
    """Counted up when the same settings give other weights: cached nodes are then made anew."""
    together: ClassVar[bool] = False
    """Whether `run` may be called in several processes at once, started together by a launcher, to share the work."""
    weighed: ClassVar[bool] = False
    """Whether its estimate of memory is sure enough to refuse what needs more than there is."""
    comes_first: ClassVar[bool] = False
    """Whether it is done before what takes long, since it may show that its input is no good."""
    options_in: ClassVar[str | None] = None
    """The setting in which the options of its methods stand, `{method: {lora: {rank: 4}}}`; None: beside the others."""
    stands_for: ClassVar[str] = "model"
    on_disk: ClassVar[bool] = True
    """Whether what is made is waited for until the disk has it; else its hash is taken again when the machine has
    started anew, and it is made anew where that is another one."""
    loads: ClassVar[bool] = True
    """Whether the models it is made from are loaded, so that weights and configuration must fit; else it looks."""
    reads: ClassVar[frozenset[str]] = frozenset({"safetensors", "adapter"})
    """How the weights of the models it is made from may be stored."""

    def types_of(self, raw: Mapping[str, Any]) -> Mapping[str, type[Settings]]:
        """Of `types` those that may matter for settings in which `raw` is written; all, if nothing else is known."""
        return self.types()

    def types(self) -> Mapping[str, type[Settings]]:
        """The settings type of each method (key: the method's name, or the verb's name where it has one form only)."""
        raise NotImplementedError

    legend: ClassVar[str] = ""
    """What the letters of the table of methods stand for."""

    def methods(self, settings: Mapping[str, Any]) -> list[dict[str, str]]:
        """A table of the methods, a row each; `settings` may say on which model. Raises RequestError where it may not.

        Here: names and what each method's settings say first of themselves.
        """
        if settings:
            raise RequestError(f"expected nothing beside --methods, found {', '.join(settings)}")
        types = {name: cls for name, cls in self.types().items() if name != self.name} or self.types()
        return [{"method": name, "does": said_first(cls)} for name, cls in types.items()]

    def parse(self, raw: Any, path: tuple[str | int, ...] = ()) -> S:
        """Settings from plain YAML values. Raises SettingsError (all problems) or UnknownName."""
        raise NotImplementedError

    def located(self, settings: S, root: Path) -> S:
        """The settings with the paths in them made absolute. Raises RequestError for what is not there."""
        return settings

    def content(self, settings: S) -> Any:
        """What of the (located) settings decides the weights, as JSON-ready values: hashed into the node's key."""
        return settings.content()

    def check(self, settings: S, models: Mapping[str, Facts]) -> list[str]:
        """What is wrong with this node given the facts of the models it names: one sentence each, empty if nothing."""
        return []

    def check_data(self, settings: S, models: Mapping[str, Facts], formats: Mapping[str, str]) -> list[str]:
        """What is wrong with the data it names for the models it names; `formats` of data sets by name, if known."""
        return []

    def measured(self, settings: S) -> Mapping[str, Any]:
        """Data sets (with split) that models are only measured on, with the measure."""
        return {}

    def shown(self, settings: S) -> Collection[str]:
        """Data sets (with split) that are only looked at by people: nothing is learned from them or chosen by them."""
        return ()

    def told(self, notes: Mapping[str, Any]) -> list[str]:
        """What people should read of a manifest's notes, a line each; beside them, as `forced`, what was overridden,
        and as `metrics` what was measured."""
        return []

    def unreadable(self, models: Mapping[str, Facts]) -> list[str]:
        """Models that are stored as this verb does not read them: one sentence each, with what makes them readable."""
        lost = (
            "is an adapter whose base is not on this machine: "
            "{merge: {models: [%s], adapters_of: BASE}} makes a model of it"
        )
        ways = {
            "pickle": "is stored as a pickle: {merge: {models: [%s], allow_pickle: true}} makes a model of it",
            "quantised": QUANTISED,
        }
        wrong = [f"{name} {ways[f.stored] % name}" for name, f in models.items() if f.stored not in self.reads]
        return wrong + [f"{name} {lost % name}" for name, f in models.items() if f.architecture == "unknown"]

    def facts(self, settings: S, models: Mapping[str, Facts], key: str) -> Facts:
        """Facts of the model this node will make. `key` identifies the node (the hash of all that makes it)."""
        raise NotImplementedError

    def estimate(self, settings: S, models: Mapping[str, Facts]) -> Estimate:
        """What it will cost, from facts alone."""
        raise NotImplementedError

    def preparation(self, settings: S, models: Mapping[str, Facts], text: Mapping[str, float]) -> Mapping[str, float]:
        """Seconds of what is done before the work that `estimate` counts, by what identifies it: of nodes that share
        it the first pays. `text`: about how many bytes each split (`mixed.train`) has that is learned from.
        """
        return {}

    def alone(self, raw: Any, root: Path) -> Any:
        """Settings of a node that stands alone, completed with what folders they name say of themselves."""
        return raw

    def begin(self, settings: S, folders: Mapping[str, Path], cache: Path) -> None:
        """Start what takes long and needs only the models' folders and the cache that the job will have, beside the
        checks; nothing may rest on it."""

    def run(self, job: Job) -> dict[str, Any]:
        """Write a complete Hugging Face folder into `job.out`; return what the manifest is to hold as metrics.

        Two names in it stand apart there: `notes` (a mapping) and `forced` (checks that were overridden).
        """
        raise NotImplementedError
