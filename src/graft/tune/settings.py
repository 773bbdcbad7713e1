"""What `tune:` may say. Light."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from graft.data.objectives import ObjectiveSettings
from graft.folders import CONTEXTS
from graft.methods import method
from graft.settings import DataRef, ModelRef, references
from graft.train.settings import TrainSettings, no_dev
from graft.tune.tasks import Mixing, Task, problems


class TuneSettings(TrainSettings):
    """A model tuned from another one."""

    from_: Annotated[ModelRef, Field(alias="from", description="The model to start from.")]
    data: Annotated[
        DataRef | None,
        Field(description="Data set to train on (its train split; dev for the dev score). For several, see `tasks`."),
    ] = None
    tasks: Annotated[
        dict[str, Task],
        Field(description="Several tasks in the place of `data`: `{prose: prose, topic: {data: topics, head: …}}`."),
    ] = {}
    mixing: Annotated[Mixing, Field(description="How the tasks share the training.")] = Mixing()
    method: Annotated[
        dict[str, Any],
        Field(
            description="`full`, `lora`, … (`graft tune --methods` lists them), or with options `{lora: {rank: 16}}`."
        ),
    ] = {"full": {}}
    fold: Annotated[
        bool,
        Field(
            description="Fold the adapter into the weights: a whole model. Without it the node is a small folder that "
            "names the model it started from."
        ),
    ] = False
    objective: Annotated[
        ObjectiveSettings | None,
        Field(description="None: causal, masked or span, by the architecture; of a prefix LM prefix."),
    ] = None
    length: Annotated[
        int | None, Field(ge=8, description="Context in tokens; None: what the model was made for, 1024 at most.")
    ] = None
    learning_rate: float = Field(
        3e-4, gt=0, description="learning rate at its peak; few weights want more, 1e-3 and above"
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("method"), str):
            return {**raw, "method": {raw["method"]: {}}}
        return raw

    @model_validator(mode="after")
    def _something_to_learn(self) -> TuneSettings:
        if (self.data is None) == (not self.tasks):
            raise ValueError(f"expected `data` or `tasks`, found {'both' if self.tasks else 'neither'}")
        if self.data is not None and self.mixing != Mixing():
            raise ValueError("expected `mixing` beside `tasks` only, found it beside `data`")
        if self.tasks and self.bootstrap is not None:
            raise ValueError("expected `bootstrap` with one data set, found several tasks")
        return self

    def named_inside(self, path: tuple[str | int, ...]) -> Iterator[tuple[str, str, tuple[str | int, ...]]]:
        """Models that its method names."""
        for name, options in self.method.items():
            yield from references(method("graft.tune", name).Settings(**options), (*path, "method", name))

    @property
    def all_read_alike(self) -> bool:
        """With weights in parts all processes make each episode together."""
        return self.mixing.meta is not None and self.parallel is not None and self.parallel.method == "fsdp"

    def wanted_dev(self) -> Mapping[str, str]:
        """Data sets of the tasks towards which weights are learned."""
        learn = self.mixing.learn
        ends = (learn.for_ or self.tasks) if learn else ()
        return {self.tasks[name].data: no_dev(name) for name in ends if name in self.tasks}

    def wanted_labels(self) -> Sequence[tuple[str, str, Sequence[str], str]]:
        """Of the tasks whose classes or tags are named."""
        return [(name, task.data, task.labels, task.head) for name, task in self.tasks.items() if task.labels]

    def misnamed(self, architecture: str) -> list[str]:
        """What is wrong with the names in tasks and mixing, and with heads for such a model; a sentence each."""
        found = problems(self.tasks, self.mixing)
        if all(task.head == "text" for task in self.tasks.values()):
            return found
        if architecture == "encoder-decoder":
            found.append(
                "heads stand on encoders and decoders; an encoder–decoder learns all tasks as text (`head: text`)"
            )
        return found


LONGEST = 1024
"""Tokens of context that tuning uses where nothing is said, if the model can take as many."""


def stretched(config: Mapping[str, Any], length: int | None, name: str) -> str:
    """What is said of a `length` beyond the positions that the configuration of the model `name` tells of, where these
    are computed (rotary, relative); empty where it is not."""
    named = made_for(config)
    if length is None or named is None or length <= named:
        return ""
    return (
        f"{name} was made for {named} tokens, and `length` is {length}: positions are computed, so that this works, "
        f"but those from there on are new to it; measures and chats go on reading {named}, as its configuration says"
    )


def made_for(config: Mapping[str, Any]) -> int | None:
    """For how many tokens a configuration says that the model was made, stretched rotary positions included; None
    where it says nothing."""
    named = [size for name in CONTEXTS if isinstance(size := config.get(name), int) and size > 0]
    if not named:
        return None
    said = config.get("rope_parameters") or config.get("rope_scaling")
    rope = said if isinstance(said, Mapping) else {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    scaled = [int(original * factor)] if isinstance(original, int) and isinstance(factor, int | float) else []
    return max([min(named), *scaled])


def longest(config: Mapping[str, Any], *others: Any) -> int:
    """The longest context that a configuration (and `others`, if whole numbers) names, 1024 at most."""
    named = [config.get(name) for name in CONTEXTS]
    return min([LONGEST, *(count for count in (*named, *others) if isinstance(count, int) and count > 0)])
