"""What is known before a byte of weights is read: from headers, configurations and tokenizers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.checkpoint import FLOATS, Headers, read_headers
from graft.errors import CannotCombine, CheckpointError
from graft.lineage import facts_of, read_config
from graft.merge.settings import MergeSettings
from graft.merge.slices import restacked, stack
from graft.verb import Facts

STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SHAPE_KEYS = (
    "model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "d_model", "d_ff", "num_layers", "n_embd", "n_layer", "n_head",
)  # fmt: skip
MEANING_KEYS = (
    "rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings", "n_positions", "sliding_window",
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "hidden_act", "activation_function", "vocab_size",
    "tie_word_embeddings",
)  # fmt: skip
"""Settings that leave the shapes as they are and change what the weights mean."""
INSTEAD = "an ensemble combines their predictions instead: {ensemble: {combine: linear, members: [...]}}"


@dataclass(frozen=True)
class Layout:
    """What will be written and from where."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    """Name → (dtype as safetensors names it, shape)."""
    places: Mapping[str, Mapping[str, str]]
    """Name → parent → name of the tensor there (another one, where that parent ties the two)."""
    config: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)
    forced: Sequence[str] = ()
    """What was wrong and overridden."""


def problems(settings: MergeSettings, models: Mapping[str, Facts]) -> tuple[list[str], list[str]]:
    """(what forbids this merge, what `force` may override) by the facts of the models, a sentence each."""
    first, *others = settings.parents
    never = [
        f"{name} has no weights of its own to average: merge its members, or make an {INSTEAD.removeprefix('an ')}"
        for name in settings.parents
        if not models[name].mergeable
    ]
    forced: list[str] = []
    for name in others:
        a, b = models[first], models[name]
        if not (a.mergeable and b.mergeable):
            continue
        if a.architecture != b.architecture:
            never.append(f"{name} is of architecture {b.architecture} and {first} of {a.architecture}; {INSTEAD}")
        elif different := different_keys(a.config, b.config, SHAPE_KEYS):
            never.append(f"{name} and {first} differ in shape: {'; '.join(different)}; {INSTEAD}")
        if a.vocabulary != b.vocabulary:
            forced.append(
                f"{name} and {first} have different vocabularies: rows of their embeddings stand for different tokens; "
                "an ensemble that matches their tokens combines them instead"
            )
        if not related(a, b):
            forced.append(
                f"{name} and {first} grew from different initialisations: the mean of their weights is no model; "
                f"{INSTEAD}"
            )
    return never, forced


def related(a: Facts, b: Facts) -> bool:
    """Whether two models may be of one initialisation: one without a manifest is judged by its weights, later."""
    unknown = a.initialisation.startswith("unknown:") or b.initialisation.startswith("unknown:")
    return unknown or a.initialisation == b.initialisation


def different_keys(a: Mapping[str, Any], b: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """`hidden_size 64 and 128` for each of `keys` that both configurations give, differently."""
    shared = [key for key in keys if key in a and key in b]
    return [f"{key} {a[key]!r} and {b[key]!r}" for key in shared if a[key] != b[key]]


def layout(settings: MergeSettings, folders: Mapping[str, Path]) -> Layout:
    """Check all headers and configurations against each other, and lay out the output.

    Raises CannotCombine (what is missing or of another shape, and what would work instead) and CheckpointError.
    """
    reference, *others = settings.parents
    never, forced = problems(settings, {name: facts_of(folders[name]) for name in settings.parents})
    if never or (forced and not settings.force):
        raise CannotCombine("\n".join([*never, *forced]))
    headers = {name: read_headers(folders[name]) for name in settings.parents}
    configs = {name: read_config(folders[name]) for name in settings.parents}
    tied = {name: _tied(headers[name], configs[name]) for name in settings.parents}
    names = {name: {**dict.fromkeys(headers[name])} | tied[name] for name in settings.parents}
    slices = getattr(settings, "slices", None)
    if slices:
        places = stack({name: sorted(found) for name, found in headers.items()}, slices)
        config = restacked(configs, slices)
    else:
        common = _names(settings.parents, headers, names)
        places = {t: {name: names[name][t] or t for name in settings.parents} for t in common}
        _same_shapes(settings.parents, headers, places)
        config = dict(configs[reference])
    if settings.dtype is not None:
        config = {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": settings.dtype}
    if any(t in places for t in tied[reference]):
        config["tie_word_embeddings"] = False
    differences = {
        name: found for name in others if (found := different_keys(configs[reference], configs[name], MEANING_KEYS))
    }
    notes: dict[str, Any] = {"config_from": reference}
    if differences:
        notes["config_differences"] = differences
    return Layout(
        {t: _stored(headers[name], found, settings.dtype) for t, ((name, found), *_) in _items(places)},
        places,
        config,
        notes,
        forced,
    )


def _items(places: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    for tensor in sorted(places):
        yield tensor, list(places[tensor].items())


def _stored(headers: Headers, name: str, dtype: str | None) -> tuple[str, tuple[int, ...]]:
    header = headers[name]
    if header.dtype.startswith("F8") and dtype is None:
        raise CannotCombine(f"{name} is stored as {header.dtype}, which cannot hold a merge: give a `dtype`")
    is_float = header.dtype in FLOATS or header.dtype.startswith("F8")
    return STORED[dtype] if dtype is not None and is_float else header.dtype, header.shape


def _tied(headers: Headers, config: Mapping[str, Any]) -> dict[str, str]:
    """Tensors that this parent does not store because they are the same as another: the output matrix, usually."""
    if not config.get("tie_word_embeddings"):
        return {}
    inputs = [
        n
        for n in headers
        if n.endswith(("embed_tokens.weight", "wte.weight", "shared.weight", "word_embeddings.weight"))
    ]
    return {"lm_head.weight": inputs[0]} if len(inputs) == 1 and "lm_head.weight" not in headers else {}


def _names(parents: Sequence[str], headers: Mapping[str, Headers], names: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The tensors of the output. A tied tensor is written where some parent stores it apart."""
    stored = set().union(*(headers[name] for name in parents))
    for name in parents:
        missing = sorted(stored - set(names[name]))
        if missing:
            raise CannotCombine(
                f"{name} lacks {len(missing)} tensors that other parents have: {', '.join(missing[:5])}; {INSTEAD}"
            )
    return sorted(stored)


def _same_shapes(
    parents: Sequence[str], headers: Mapping[str, Headers], places: Mapping[str, Mapping[str, str]]
) -> None:
    wrong = []
    for tensor, place in places.items():
        shapes = {name: headers[name][place[name]].shape for name in parents}
        if len(set(shapes.values())) > 1:
            found = ", ".join(f"{list(shape)} in {name}" for name, shape in shapes.items())
            wrong.append(f"{tensor} is {found}")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CannotCombine(f"expected tensors of one shape, found {'; '.join(wrong[:5])}{more}; {INSTEAD}")


def verify(folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """Check names and shapes of `tensors` against the model that the configuration in `folder` builds, without weights.

    Returns what was checked. Raises CheckpointError naming tensors that the architecture needs and that are missing,
    or that have another shape there.
    """
    import torch

    from graft.models import load_config, model_class

    config = load_config(folder)
    made = model_class(config)
    with torch.device("meta"):
        model = made.from_config(config) if hasattr(made, "from_config") else made(config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
    prefix = f"{model.base_model_prefix}."
    found = {name: shape for name, (_, shape) in tensors.items()}
    found |= {prefix + name: shape for name, shape in found.items()}
    missing = sorted(set(wanted) - set(found))
    wrong = [f"{n} {list(found[n])}, expected {list(s)}" for n, s in wanted.items() if n in found and found[n] != s]
    if missing or wrong:
        raise CheckpointError(
            f"the output does not fit {type(model).__name__}: "
            + "; ".join([*([f"missing {', '.join(missing[:5])}"] if missing else []), *wrong[:5]])
        )
    return type(model).__name__
