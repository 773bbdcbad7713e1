"""What every `merge:` may say. Light. Each method adds its own options beside these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from graft.merge.judged import Barrier, Search, Seeds
from graft.merge.varying import Varied, replaced, split, written
from graft.settings import Bytes, ModelRef, Number, Settings

PerModel = Number | dict[ModelRef, Number]
"""One number for all models, or one for each."""


class MergeSettings(Settings):
    """One model out of the weights of several."""

    draws: ClassVar[bool] = False
    """Whether the method draws at random."""
    aligns: ClassVar[bool] = False
    """Whether the method makes models of different initialisation comparable before it merges them."""
    makes: ClassVar[Literal["model", "adapter"]] = "model"
    """What the method writes."""
    of_one_base: ClassVar[bool] = False
    """Whether the parents are changes that mean something on one model only."""

    method: Annotated[str, Field(description="How the weights are combined.")]
    models: Annotated[
        list[ModelRef] | dict[ModelRef, Number],
        Field(min_length=1, description="Models, or models with their weights (1 each where none are given)."),
    ]
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        Field(description="Type of the weights written; none: that of the base, or of the first model."),
    ] = None
    anyway: Annotated[
        bool, Field(description="Merge even what is not of one initialisation or vocabulary; the manifest says so.")
    ] = False
    vocabulary: Annotated[
        Literal["union", "base"] | None,
        Field(
            description="Match the rows of embeddings by token string: all models' tokens, or those of the base (or "
            "first model); none: all must have one vocabulary."
        ),
    ] = None
    part: Annotated[
        list[str] | dict[str, str] | None,
        Field(
            description="Merge only the base's (or first model's) tensors whose names begin so, and copy the others; "
            "as a mapping, to how their names begin in the other models."
        ),
    ] = None
    allow_pickle: Annotated[
        bool, Field(description="Read weights that lie in PyTorch's pickles, by torch.load(weights_only=True).")
    ] = False
    adapters_of: Annotated[
        ModelRef | None,
        Field(
            description="The model that adapters among the models were trained on, where they do not name it rightly."
        ),
    ] = None
    shard: Annotated[Bytes, Field(gt=0, description="Largest size of one file of weights.")] = 5 * 10**9
    slices: Annotated[
        list[dict[ModelRef, tuple[int, int]]],
        Field(
            description="The output's layers, slice after slice: of each model [first, after the last], equally many."
        ),
    ] = []
    search: Annotated[
        Search | None, Field(description="Look for the best parameters on held-out data, before the merge.")
    ] = None
    seeds: Annotated[
        Seeds | None,
        Field(description="Of a method that draws at random: report how far merges with so many seeds lie apart."),
    ] = None
    barrier: Annotated[
        Barrier | None,
        Field(description="Measure the models along the straight lines between each two of them, on held-out data."),
    ] = None

    _varied: Mapping[tuple[str, ...], Varied] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _varying(cls, raw: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        plain, varied = split(cls, raw)
        made = handler(plain)
        if varied:
            made._varied = varied
        return made

    @property
    def of_the_whole_model(self) -> frozenset[str]:
        """Numbers that may not vary, though they are marked so."""
        return frozenset()

    @property
    def in_float64(self) -> bool:
        """Whether something is worked out in float64 where the tensors lie, which not every accelerator has."""
        return False

    @property
    def varied(self) -> Mapping[tuple[str, ...], Varied]:
        """The numbers that follow layers or names, by their place; the fields hold one of them."""
        return self._varied

    def plain(self) -> dict[str, Any]:
        """As written, gradients and rules too."""
        return replaced(super().plain(), {spot: written(one) for spot, one in self._varied.items()})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy; a number that is given anew no longer varies."""
        made = super().model_copy(update=update, deep=deep)
        made._varied = {spot: one for spot, one in self._varied.items() if spot[0] not in (update or {})}
        return made

    @model_validator(mode="after")
    def _once(self) -> MergeSettings:
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"expected each model once, found {', '.join(self.names)}")
        if self.base_name is not None and self.base_name in self.names:
            raise ValueError(f"expected a base that is not among the models, found {self.base_name} there")
        return self

    @model_validator(mode="after")
    def _can_be_searched(self) -> MergeSettings:
        if self.seeds is not None and not self.draws:
            raise ValueError(f"expected a method that draws at random, found {self.method}: all seeds give one merge")
        if self.search is not None:
            from graft.merge.space import check

            check(self, self.search)
        return self

    @model_validator(mode="after")
    def _has_lines(self) -> MergeSettings:
        if self.barrier is None:
            return self
        if self.aligns:
            raise ValueError(f"expected no `barrier` beside {self.method}, which measures the lines itself with `on`")
        if len(self.names) < 2:
            raise ValueError(f"expected two models or more to measure a `barrier` between, found {self.names[0]} alone")
        for name in ("part", "slices", "vocabulary"):
            if getattr(self, name):
                raise ValueError(f"expected no `barrier` beside `{name}`: no straight line joins such models")
        return self

    @model_validator(mode="after")
    def _part_or_slices(self) -> MergeSettings:
        if self.part is not None and (self.slices or not self.part):
            raise ValueError("expected prefixes of names in `part`, and no slices beside it")
        return self

    @model_validator(mode="after")
    def _stackable(self) -> MergeSettings:
        for part in self.slices:
            if not part or set(part) - set(self.parents):
                raise ValueError(
                    f"expected slices of {', '.join(self.parents)}, found one of {', '.join(part) or 'none'}"
                )
            if wrong := [list(span) for span in part.values() if not 0 <= span[0] < span[1]]:
                raise ValueError(f"expected layers as [first, after the last], found {wrong[0]}")
            if len({after - first for first, after in part.values()}) > 1:
                found = ", ".join(f"{name}: {list(span)}" for name, span in part.items())
                raise ValueError(f"expected as many layers of each model, found {found}")
            self._with_base(part)
        return self

    @property
    def stacked(self) -> list[dict[str, tuple[int, int]]]:
        """The slices with the layers of the base, which are those of the models where nothing else is written."""
        return [self._with_base(part) for part in self.slices]

    def _with_base(self, part: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        if self.base_name is None or self.base_name in part:
            return part
        if len(set(part.values())) > 1:
            raise ValueError(f"expected the layers of {self.base_name} too, where those of the models differ")
        return {self.base_name: next(iter(part.values())), **part}

    @property
    def names(self) -> list[str]:
        """The models that are combined, in order, the base not among them."""
        return list(self.models)

    @property
    def weights(self) -> list[float]:
        """One weight a model."""
        return list(self.models.values()) if isinstance(self.models, dict) else [1.0] * len(self.models)

    def each(self, value: PerModel) -> list[float]:
        """One number a model. Raises ValueError where a mapping does not name the models."""
        if not isinstance(value, dict):
            return [value] * len(self.names)
        if set(value) != set(self.names):
            raise ValueError(f"expected a value for each of {', '.join(self.names)}, found {', '.join(value)}")
        return [value[name] for name in self.names]

    @property
    def base_name(self) -> str | None:
        """The model that the others are measured from, where the method has one."""
        return getattr(self, "base", None)

    @property
    def parents(self) -> list[str]:
        """All models that are read; the first gives configuration, tokenizer and stored types."""
        return [*([self.base_name] if self.base_name is not None else []), *self.names]


class PositiveSettings(MergeSettings):
    """Models that all have a weight above 0."""

    @model_validator(mode="after")
    def _above_zero(self) -> Self:
        if min(self.weights) <= 0:
            raise ValueError(f"expected weights above 0, found {min(self.weights)}")
        return self


class NormalisedSettings(MergeSettings):
    """A sum over models, whose weights may be divided by their sum."""

    normalise: Annotated[bool, Field(description="Divide the weights by their sum.")] = True

    @model_validator(mode="after")
    def _can_be_normalised(self) -> Self:
        if self.normalise and abs(sum(self.weights)) < 1e-9:
            raise ValueError("expected weights whose sum is not 0, or `normalise: false`")
        return self

    @property
    def factors(self) -> list[float]:
        """One a model: its weight, divided by the sum of all where that is asked for."""
        whole = sum(self.weights) if self.normalise else 1.0
        return [weight / whole for weight in self.weights]


class DeltaSettings(MergeSettings):
    """One model out of a base and the differences (task vectors) of models tuned from it."""

    base: Annotated[ModelRef, Field(description="The model that the others were tuned from.")]


class DensitySettings(DeltaSettings):
    """A base plus a share of each task vector."""

    density: Annotated[PerModel, Field(description="Share of each task vector that is kept, in (0, 1].")] = 0.5

    @property
    def densities(self) -> list[float]:
        """One density a model."""
        return self.each(self.density)

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if wrong := [d for d in self.densities if not 0 < d <= 1]:
            raise ValueError(f"expected a density above 0 and at most 1, found {wrong[0]}")
        return self


class SparseSettings(DensitySettings):
    """A base plus sparse task vectors."""

    scale: Annotated[Number, Field(description="Factor of the combined task vector, λ in the papers.")] = 1.0
    normalise: Annotated[bool, Field(description="Divide by the sum of the weights that take part.")] = False
