"""Quantising: a model's linear layers in 8 or 4 bits, to serve it or to tune adapters on it; and back."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from graft.adapters.facts import folded_facts, is_adapted
from graft.errors import nearest
from graft.settings import ModelRef, Settings, parse
from graft.train.memory import PROCESS
from graft.verb import Estimate, Facts, Job, Verb

LIBRARY = "bitsandbytes"
BYTES = {4: 4.127 / 8, 8: 1.0}
"""A weight: 4 bits and 0.127 for doubly quantised constants (Dettmers et al. 2023, section 3); 8 bits."""
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a weight that is not packed."""
PACKING, UNPACKING = 1.5, 2.25
"""Times the plain weights are held at the peak beside the packed ones, on a CPU: a Llama of 163M parameters took 1.54
GB into 4 bits and 1.64 into 8, 1.88 and 2.25 back, where these say 1.51, 1.58, 1.99 and 2.07."""
THROUGHPUT = 50e6
"""Guess: parameters a second that are read, packed and written on a CPU."""


class QuantizeSettings(Settings):
    """A model in fewer bits: `{quantize: {from: base, bits: 4}}`; `bits: 16` makes plain weights of one again."""

    from_: Annotated[ModelRef, Field(alias="from", description="The model.")]
    bits: Annotated[
        Literal[4, 8, 16],
        Field(
            description="Of a weight of the linear layers; 16: plain weights of a quantised model, with its adapters "
            "folded into them."
        ),
    ] = 4
    kind: Annotated[
        Literal["nf4", "fp4"], Field(description="Of 4 bits: quantiles of a normal distribution, or a tiny float.")
    ] = "nf4"
    double: Annotated[bool, Field(description="Of 4 bits: the constants of each block are quantised too.")] = True
    keep: Annotated[list[str], Field(description="Ends of names of linear layers that stay as they are.")] = []
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        Field(description="Of what is not quantised, and of the arithmetic with 4 bits."),
    ] = "float32"

    @model_validator(mode="after")
    def _of_4_bits(self) -> QuantizeSettings:
        said = {"kind": self.kind} if self.kind != "nf4" else {} if self.double else {"double": self.double}
        for name, value in said.items() if self.bits != 4 else ():
            raise ValueError(f"expected `{name}: {str(value).lower()}` beside 4 bits, found it beside {self.bits}")
        return self


class Quantize(Verb[QuantizeSettings]):
    """Packs a model's linear layers, or unpacks them."""

    name = "quantize"
    summary = "Pack a model's linear layers into 8 or 4 bits, or unpack them."
    reads = Verb.reads | {"quantised"}
    weighed = True

    def types(self) -> Mapping[str, type[Settings]]:
        return {"quantize": QuantizeSettings}

    def parse(self, raw: Any, path: tuple[str | int, ...] = ()) -> QuantizeSettings:
        return parse(QuantizeSettings, raw, path)

    def check(self, settings: QuantizeSettings, models: Mapping[str, Facts]) -> list[str]:
        from graft.adapters.trial import unfoldable_in

        start = models[settings.from_]
        packed = start.stored == "quantised"
        if importlib.util.find_spec(LIBRARY) is None:
            return [f"quantised models need {LIBRARY}, which is not installed: pip install graft[quantised]"]
        if settings.bits == 16 and not packed:
            return [f"expected a quantised model to unpack, found {settings.from_} with plain weights"]
        if settings.bits == 16:
            return [f"{settings.from_}: {wrong}" for wrong in unfoldable_in(start)] if is_adapted(start) else []
        if not start.mergeable or start.stored == "adapter":
            return [
                f"{settings.from_} has no weights of its own to quantise: fold its adapters (`fold: true`, merge), "
                "quantise the members of an ensemble"
            ]
        if packed:
            return [f"{settings.from_} is quantised already: quantise what it was made from, or unpack it (bits: 16)"]
        return _keeping_nothing(settings, start) if settings.keep and start.config.get("architectures") else []

    def facts(self, settings: QuantizeSettings, models: Mapping[str, Facts], key: str) -> Facts:
        from graft.adapters.trial import expert_numbers

        start = folded_facts(models[settings.from_])
        config = {name: value for name, value in start.config.items() if name != "quantization_config"}
        if settings.bits == 16:
            return replace(start, config=config, stored="safetensors", bytes=4 * start.parameters, folder="")
        config["quantization_config"] = wanted(settings)
        plain = min(embedded(start.config) + expert_numbers(start.config), start.parameters)
        size = BYTES[settings.bits] * (start.parameters - plain) + WIDTHS[settings.dtype] * plain
        return replace(start, config=config, stored="quantised", bytes=int(size), folder="")

    def estimate(self, settings: QuantizeSettings, models: Mapping[str, Facts]) -> Estimate:
        start, made = models[settings.from_], self.facts(settings, models, "")
        if settings.bits == 16:
            memory, note = PROCESS + start.bytes + UNPACKING * made.bytes, "the weights that the packed ones stand for"
        else:
            memory = PROCESS + PACKING * start.bytes + made.bytes
            note = "embeddings, and experts in one parameter, stay as they are: such models shrink less"
        return Estimate(start.parameters, made.bytes, int(memory), start.parameters / THROUGHPUT, note)

    def run(self, job: Job) -> dict[str, Any]:
        from graft.quantize.work import run

        return run(job)


def _keeping_nothing(settings: QuantizeSettings, start: Facts) -> list[str]:
    """What of `keep` names no linear layer of the model, tried on its skeleton."""
    from graft.adapters.places import sizes
    from graft.adapters.trial import skeleton

    model = skeleton(start.config)
    if model is None:
        return []
    linears = [name for name, module in model.named_modules() if sizes(module) is not None]
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    return [
        f"expected `keep` to have ends of names of linear layers of {settings.from_}, found {end!r}"
        f"{nearest(end, leaves)}; there are: {', '.join(leaves[:16])}"
        for end in settings.keep
        if not any(name.endswith(end) or name.startswith(end) for name in linears)
    ]


def wanted(settings: QuantizeSettings, heads: Sequence[str] = ()) -> dict[str, Any]:
    """The entry `quantization_config` of a configuration, as transformers and bitsandbytes write it.

    `heads`: layers that stay as they are anyhow, but that the library packs where others are named.
    """
    kept = {"llm_int8_skip_modules": [*settings.keep, *heads]} if settings.keep else {}
    if settings.bits == 8:
        return {"quant_method": LIBRARY, "load_in_8bit": True, **kept}
    return {
        "quant_method": LIBRARY,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": settings.kind,
        "bnb_4bit_use_double_quant": settings.double,
        "bnb_4bit_compute_dtype": settings.dtype,
        **kept,
    }


def embedded(config: Mapping[str, Any]) -> int:
    """Parameters of the embeddings and of a head of their size, which are not packed; 0 where it cannot be told."""
    from graft.train.memory import Dimensions

    known = Dimensions.of(config)
    return 0 if known is None else known.vocabulary * known.width * (1 if config.get("tie_word_embeddings") else 2)


VERB = Quantize()
__all__ = ["VERB", "QuantizeSettings"]
