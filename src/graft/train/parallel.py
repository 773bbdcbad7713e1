"""How several processes train one model together: the setting, and what speaks against it before work starts. Light."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from graft.errors import MissingExtra
from graft.settings import Settings

TOGETHER = 1 << 24
"""Numbers that `zero` sends together, and may put together before they are needed; DeepSpeed's own 5·10⁸ take 2 GB."""


class Parallel(Settings):
    """Several processes, each with a device, train one model together; what comes out is the same but for rounding."""

    method: Literal["ddp", "fsdp", "zero"] = Field(
        default="ddp",
        description="`ddp`: every process holds the whole model; `fsdp`: weights, gradients and optimizer state are "
        "spread over the processes (FSDP2); `zero`: the same by DeepSpeed",
    )
    stage: Literal[1, 2, 3] | None = Field(
        default=None,
        description="For `zero`: 1 spreads the optimizer's state, 2 gradients too, 3 (and none) weights too",
    )
    offload: Literal["cpu"] | None = Field(
        default=None,
        description="Where what is spread lies between its uses, and where the optimizer works; none: on the device",
    )
    tensor: int = Field(
        default=1,
        ge=1,
        description="For `fsdp`: so many processes share each matrix and read the same rows (tensor parallelism, by "
        "the plan that `transformers` has for the model); such groups spread what remains",
    )
    devices: int | None = Field(
        default=None,
        ge=1,
        description="How many processes: a run without a launcher starts them on this machine, and `graft plan` says "
        "the memory of one of them",
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            return {"method": raw}
        if isinstance(raw, Mapping) and "method" not in raw and raw.get("tensor", 1) != 1:
            return {**raw, "method": "fsdp"}
        return raw

    @model_validator(mode="after")
    def _check(self) -> Parallel:
        if self.stage is not None and self.method != "zero":
            raise ValueError(f"expected `stage` with `method: zero` only, found it with {self.method}")
        if self.offload is not None and self.method == "ddp":
            raise ValueError("expected `offload` with `fsdp` or `zero`, found ddp: it spreads nothing")
        if self.tensor > 1 and self.method != "fsdp":
            raise ValueError(f"expected `tensor` with `method: fsdp`, found it with {self.method}")
        if self.devices is not None and self.devices % self.tensor:
            raise ValueError(f"expected `devices` to be a multiple of `tensor`, found {self.devices} and {self.tensor}")
        if self.method == "zero" and importlib.util.find_spec("deepspeed") is None:
            raise ValueError(str(MissingExtra("deepspeed", "deepspeed", "`method: zero`")))
        return self

    @property
    def spread(self) -> Literal[0, 1, 2, 3]:
        """What is spread, in ZeRO's stages: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 weights too."""
        if self.method == "ddp":
            return 0
        return self.stage or 3


def problems(parallel: Parallel | None, config: Mapping[str, Any], *, adapter: bool, quantised: bool) -> list[str]:
    """What speaks against training a model of this configuration so, a sentence each; empty if nothing does.

    `adapter`: few weights are trained on frozen ones; `quantised`: these are packed.
    """
    if parallel is None or parallel.method == "ddp":
        return []
    if quantised and parallel.method == "zero" and parallel.spread == 3:
        return [
            "DeepSpeed cannot spread packed weights, as stage 3 would: use stage 1 or 2, or `parallel: fsdp`, which "
            "leaves them whole and spreads the rest"
        ]
    if parallel.tensor == 1:
        return []
    if adapter:
        return [
            "adapters read and change whole layers, which `parallel.tensor` splits: leave it out (fsdp alone spreads "
            "the frozen weights too), or use `method: full`"
        ]
    return _unplanned(config, parallel.tensor)


def _unplanned(config: Mapping[str, Any], tensor: int) -> list[str]:
    """Why the layers of a model of this configuration cannot be split; nothing where it is not known yet."""
    if not config.get("architectures"):
        return []
    from graft.train.tensor_parallel import unsplittable

    return unsplittable(config, tensor)
