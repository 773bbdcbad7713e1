"""What `adapt:` may say. Light."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from graft.settings import ModelRef, Settings


class AdaptSettings(Settings):
    """Adapters on one frozen model, combined: `{adapt: {adapters: [language, task]}}`."""

    adapters: Annotated[
        list[ModelRef] | dict[ModelRef, float],
        Field(
            description="Models that are adapters on one frozen model, in the order they run, with weights if wanted."
        ),
    ] = []
    without: Annotated[
        list[str],
        Field(
            description="Adapters that are left out though models named have them: a task tuned over one language's "
            "adapter is put over another's by `{adapters: [german, task], without: [english]}`."
        ),
    ] = []
    how: Annotated[
        Literal["stack", "average"],
        Field(
            description="`stack`: all of them run, each change times its weight (1 if none is given). `average`: one "
            "adapter with the mean of their weights; all must be the same point of the design space."
        ),
    ] = "stack"
    task: Annotated[
        str | None,
        Field(
            description="The task that rows are of where an adapter mixes by tasks (POLY); None: the one that it has."
        ),
    ] = None
    peft: Annotated[
        str | None, Field(description="A folder that peft wrote, brought in as an adapter on `from`; relative.")
    ] = None
    from_: Annotated[
        ModelRef | None,
        Field(
            alias="from",
            description="The frozen model of `peft`; outside of a recipe the one that its folder names, if it is here.",
        ),
    ] = None
    fold: Annotated[bool, Field(description="Fold them into the weights: an ordinary model.")] = False
    export: Annotated[
        Literal["peft"] | None, Field(description="Write the adapter as peft would as well, into the folder `peft`.")
    ] = None

    @property
    def names(self) -> list[str]:
        """The adapters' names, in order."""
        return list(self.adapters)

    @property
    def start(self) -> str:
        """The model whose frozen weights are used."""
        return self.from_ or self.names[0]

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each adapter."""
        return self.adapters if isinstance(self.adapters, dict) else dict.fromkeys(self.adapters, 1.0)

    @model_validator(mode="after")
    def _check(self) -> AdaptSettings:
        if (self.peft is None) != (self.from_ is None):
            raise ValueError(
                "expected `peft` and `from` together: a peft folder, and the model it was made for (in its "
                "adapter_config.json: base_model_name_or_path)"
            )
        if not self.adapters and self.peft is None:
            raise ValueError("expected `adapters`, or `peft` with `from`, found neither")
        if self.adapters and self.peft is not None:
            raise ValueError("expected `adapters` or `peft`, found both: bring the peft folder in as a node of its own")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"expected every adapter once, found {', '.join(self.names)}")
        if self.without and self.peft is not None:
            raise ValueError("expected `without` beside `adapters`, found it beside `peft`")
        if self.task is not None and self.peft is not None:
            raise ValueError("expected `task` beside `adapters`, found it beside `peft`")
        if self.export and self.fold:
            raise ValueError("expected `export` or `fold`, found both: a folded adapter is no adapter any more")
        if self.how == "average" and sum(self.weights.values()) == 0:
            raise ValueError("expected weights that do not sum to zero for a mean")
        return self
