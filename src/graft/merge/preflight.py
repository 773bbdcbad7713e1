"""What is known before a byte of weights is read: from headers, configurations and tokenizers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.adapters.facts import is_adapted, obstacles
from graft.checkpoint import FLOATS, Headers
from graft.data.objectives import PREFIX_LM, is_prefix_lm
from graft.errors import CannotCombine
from graft.facts import facts_of
from graft.fitting import unread
from graft.folders import ADAPTED
from graft.merge._options import OnData
from graft.merge.architecture import architecture
from graft.merge.inputs import Input, homeless, inputs, settled
from graft.merge.part import partial
from graft.merge.settings import MergeSettings
from graft.merge.slices import COUNTS, LAYER, restacked, stack
from graft.merge.varying import by_tensor
from graft.merge.vocabulary import Vocabulary, joined, with_size
from graft.pickles import refusal
from graft.verb import QUANTISED, Facts

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
Places = Mapping[str, Mapping[str, str]]
Tied = Mapping[str, Mapping[str, str]]
INSTEAD = "an ensemble combines their predictions instead: {ensemble: {combine: linear, members: [...]}}"
BY_TOKEN = "`vocabulary: union` (or base) matches them by token, and so does an ensemble"
BY_ENSEMBLE = "an ensemble with `vocabulary: union` or `bytes` takes both"
OTHER_BASES = "stand on different bases: the sum of their changes belongs to neither"
PACKED = (
    "{name} stands on a quantised model, into which nothing folds: unpack that ({{quantize: {{from: …, bits: 16}}}}) "
    "and name what comes of it as `adapters_of` (--adapters-of)"
)
ANYWAY = "`anyway: true` (--anyway) merges them all the same, and the manifest says so"


@dataclass(frozen=True)
class Layout:
    """What will be written and from where."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    """Name → (dtype as safetensors names it, shape)."""
    places: Places
    """Name → parent → name of the tensor there (another one, where that parent ties the two)."""
    config: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)
    forced: Sequence[str] = ()
    """What was wrong and overridden."""
    facts: Mapping[str, Facts] = field(default_factory=dict)
    """Of the parents."""
    copied: frozenset[str] = frozenset()
    """Tensors that are taken from the first parent as they are: no part of what is merged."""
    vocabulary: Vocabulary | None = None
    """How the rows of embeddings are matched, where that is asked for."""


def _weightless(name: str, facts: Facts) -> str:
    """That a model has no weights to merge, and what works instead."""
    if is_adapted(facts):
        return _not_read(name, facts.config)
    return f"{name} has no weights of its own to average: merge its members; {INSTEAD}"


def _not_read(name: str, config: Mapping[str, Any]) -> str:
    """Why an adapter is none of those that a merge reads."""
    return f"{name} is an adapter that no merge can read: {'; '.join(obstacles(config[ADAPTED]))}"


def problems(settings: MergeSettings, models: Mapping[str, Facts]) -> tuple[list[str], list[str]]:
    """(what forbids this merge, what `anyway` may override) by the facts of the models, a sentence each."""
    first, *others = settings.parents
    pickled = [name for name, facts in models.items() if facts.stored == "pickle"]
    packed = [name for name in settings.parents if is_adapted(models[name]) and models[name].stored == "quantised"]
    models = settled(settings, models)
    if lost := [name for name in settings.parents if models[name].architecture == "unknown"]:
        # adapters are added up without a base; whether they stand on one is told by their shapes
        return ([] if settings.makes == "adapter" else [homeless(name) for name in lost]), []
    never = [_weightless(name, models[name]) for name in settings.parents if not models[name].mergeable]
    never += [refusal(pickled)] if pickled and not settings.allow_pickle else []
    never += [f"{name} {QUANTISED % name}" for name, facts in models.items() if facts.stored == "quantised"]
    never += [PACKED.format(name=name) for name in packed if settings.adapters_of is None]
    if isinstance(settings, OnData) and settings.on is not None:
        never += [
            f"{name} is of architecture {models[name].architecture}: {settings.method} reads text with causal language "
            f"models; {INSTEAD}"
            for name in settings.parents
            if models[name].architecture != "decoder"
        ]
    forced: list[str] = []
    for name in others:
        a, b = models[first], models[name]
        if not (a.mergeable and b.mergeable):
            continue
        if settings.part is not None:
            # a part is compared by its tensors
            pass
        elif a.architecture != b.architecture:
            never.append(
                f"{name} is of architecture {b.architecture} and {first} of {a.architecture}: neither their weights "
                "nor their predictions can be combined"
            )
        elif different := different_keys(a.config, b.config, _shape_keys(settings)):
            never.append(f"{name} and {first} differ in shape: {'; '.join(different)}; {INSTEAD}")
        known = not any(found.startswith("none:") for found in (a.vocabulary, b.vocabulary))
        if known and a.vocabulary != b.vocabulary and settings.vocabulary is None:
            forced.append(
                f"{name} and {first} have different vocabularies: rows of their embeddings stand for different tokens; "
                f"{BY_ENSEMBLE if settings.aligns else BY_TOKEN}"
            )
        if settings.of_one_base and a.initialisation != b.initialisation:
            forced.append(f"{name} and {first} {OTHER_BASES}")
        elif not (settings.aligns or related(a, b)):
            forced.append(
                f"{name} and {first} grew from different initialisations: the mean of their weights is no model; "
                f"{INSTEAD}"
            )
    return never, forced


def anyway(settings: MergeSettings, wrong: Sequence[str]) -> list[str]:
    """What of `wrong`, which may be overridden, forbids this merge, with the way to override it."""
    return [] if settings.anyway else [f"{one}; {ANYWAY}" for one in wrong]


def _shape_keys(settings: MergeSettings) -> list[str]:
    """What must be alike; models of slices may have different numbers of layers."""
    return [key for key in SHAPE_KEYS if not settings.slices or key not in COUNTS]


def related(a: Facts, b: Facts) -> bool:
    """Whether two models may be of one initialisation: one that is not known is judged by the weights, later."""
    unknown = a.initialisation.startswith("unknown:") or b.initialisation.startswith("unknown:")
    return unknown or a.initialisation == b.initialisation


def different_keys(a: Mapping[str, Any], b: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """`hidden_size 64 and 128` for each of `keys` that both configurations give, differently."""
    shared = [key for key in keys if key in a and key in b]
    return [f"{key} {a[key]!r} and {b[key]!r}" for key in shared if a[key] != b[key]]


def agree(settings: MergeSettings, parts: Mapping[str, Input]) -> None:
    """Compare configurations and the shapes of layers: what needs nothing but headers, and so comes first of all.

    Raises CannotCombine for dimensions and shapes that differ. Slices and parts are compared later, as they are placed.
    """
    reference, *others = settings.parents
    if apart := [_not_read(name, part.config) for name, part in parts.items() if ADAPTED in part.config]:
        raise CannotCombine("\n".join(apart))
    packed = {name: part for name, part in parts.items() if part.config.get("quantization_config")}
    if packed:
        said = (f"{n} {QUANTISED % n}" if p.folder == p.home else PACKED.format(name=n) for n, p in packed.items())
        raise CannotCombine("; ".join(said))
    if settings.slices or settings.part:
        return
    for name in others:
        if different := different_keys(parts[reference].config, parts[name].config, SHAPE_KEYS):
            raise CannotCombine(f"{name} and {reference} differ in shape: {'; '.join(different)}; {INSTEAD}")
    headers = {name: part.headers for name, part in parts.items()}
    shared = set.intersection(*(set(found) for found in headers.values()))
    layers = sorted(tensor for tensor in shared if LAYER.fullmatch(tensor))
    _same_shapes(headers, {tensor: dict.fromkeys(parts, tensor) for tensor in layers})


def layout(settings: MergeSettings, folders: Mapping[str, Path]) -> Layout:
    """Check all headers and configurations against each other, and lay out the output.

    Raises CannotCombine (what is missing or of another shape, and what would work instead) and CheckpointError.
    """
    reference, *others = settings.parents
    facts = {name: facts_of(folder) for name, folder in folders.items()}
    never, forced = problems(settings, facts)
    if refused := [*never, *anyway(settings, forced)]:
        raise CannotCombine("\n".join(refused))
    parts = inputs(settings, folders)
    headers = {name: part.headers for name, part in parts.items()}
    configs = {name: part.config for name, part in parts.items()}
    same = settings.part is None and all(headers[name].keys() == headers[reference].keys() for name in others)
    left = {} if same else _unread_by_some(parts)
    headers = {name: {t: h for t, h in own.items() if t not in left} for name, own in headers.items()}
    left |= {dead: [n for n, p in parts.items() if dead in p.dead.values()] for dead in _dead(parts)}
    # who ties what matters only where not all store the same tensors
    alike = same and not any(part.apart for part in parts.values())
    said = {name: {} if alike else _tied(parts[name].home, headers[name]) for name in settings.parents}
    tied = {name: {t: o for t, o in said[name].items() if t not in parts[name].apart} for name in settings.parents}
    places = _all_places(settings, headers, tied)
    vocabulary = None
    if settings.vocabulary is not None:
        vocabulary = joined(settings, parts, headers, places)
        headers = {name: vocabulary.headers(name, own, places) for name, own in headers.items()}
    _same_shapes(headers, places)
    config = dict(configs[reference])
    if settings.slices:
        config = restacked(configs, reference, settings.stacked)
    if any(name in said[reference] for name in places):
        config["tie_word_embeddings"] = False
    if vocabulary is not None:
        config = with_size(config, vocabulary.size)
    if settings.dtype is not None:
        config = {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": settings.dtype}
    notes: dict[str, Any] = {"config_from": reference}
    causal = [name for name in settings.parents if not is_prefix_lm(configs[name])]
    if causal and len(causal) < len(configs):
        config.pop(PREFIX_LM, None)
        notes[PREFIX_LM] = f"{', '.join(causal)} read from left to right, and so does the merge"
    notes |= _compared(settings, facts, configs, config)
    tensors = {t: _stored(headers[name], found, settings.dtype) for t, ((name, found), *_) in _items(places)}
    copied = frozenset(t for t, place in places.items() if settings.part is not None and list(place) == [reference])
    by_tensor(settings, {tensor: place for tensor, place in places.items() if tensor not in copied})
    if left:
        notes["unread"] = left
    if copied:
        notes["copied"] = f"{len(copied)} tensors of {reference}"
    if vocabulary is not None:
        notes["vocabulary"] = dict(vocabulary.notes)
    return Layout(tensors, places, config, notes, forced, facts, copied, vocabulary)


def _compared(
    settings: MergeSettings,
    facts: Mapping[str, Facts],
    configs: Mapping[str, Mapping[str, Any]],
    made: Mapping[str, Any],
) -> dict[str, Any]:
    """Notes of what may not mean the same: configurations, that of the output (`made`) among them, and tokens."""
    reference, *others = settings.parents
    notes: dict[str, Any] = {}
    unknown = [name for name, found in settled(settings, facts).items() if found.vocabulary.startswith("none:")]
    if unknown and others and "vocab_size" in made:
        notes["tokens_unknown"] = unknown
    differ = {name: different_keys(configs[reference], configs[name], MEANING_KEYS) for name in others}
    if any(differ.values()):
        notes["config_differences"] = {name: found for name, found in differ.items() if found}
        own = {key: made[key] for key in MEANING_KEYS if key in made and made[key] != configs[reference].get(key)}
        notes |= {"config_of_its_own": own} if own else {}
    return notes


def _all_places(settings: MergeSettings, headers: Mapping[str, Headers], tied: Tied) -> Places:
    if settings.part is not None:
        return partial(settings, headers, tied)
    return _stacked(settings, headers, tied) if settings.slices else _places(settings.parents, headers, tied)


def _items(places: Places) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    for tensor in sorted(places):
        yield tensor, list(places[tensor].items())


def _stored(headers: Headers, name: str, dtype: str | None) -> tuple[str, tuple[int, ...]]:
    header = headers[name]
    if header.dtype.startswith("F8") and dtype is None:
        raise CannotCombine(f"{name} is stored as {header.dtype}, which cannot hold a merge: give a `dtype`")
    is_float = header.dtype in FLOATS or header.dtype.startswith("F8")
    return STORED[dtype] if dtype is not None and is_float else header.stored, header.shape


def _dead(parts: Mapping[str, Input]) -> list[str]:
    return sorted({called for part in parts.values() for called in part.dead.values()})


def _unread_by_some(parts: Mapping[str, Input]) -> dict[str, list[str]]:
    """Tensors that some parents store and others do not, and that no model makes anything of (buffers of old versions,
    for example), with who stores them."""
    headers = {name: part.headers for name, part in parts.items()}
    everywhere = set.intersection(*(set(own) for own in headers.values()))
    found: dict[str, list[str]] = {}
    for name, own in headers.items():
        made = architecture(parts[name].home) if own.keys() - everywhere else None
        for tensor in unread(made, sorted(own.keys() - everywhere)) if made is not None else ():
            found.setdefault(tensor, []).append(name)
    holders = {tensor: [name for name, own in headers.items() if tensor in own] for tensor in found}
    return {tensor: names for tensor, names in found.items() if names == holders[tensor]}


def _tied(folder: Path, headers: Headers) -> dict[str, str]:
    """Tensors that a parent says are the same as another one it stores: the output matrix, usually."""
    found = architecture(folder)
    return {name: same for name, same in found.tied.items() if same in headers} if found else {}


def _places(parents: Sequence[str], headers: Mapping[str, Headers], tied: Tied) -> dict[str, dict[str, str]]:
    """Where each tensor of the output stands in each parent. One that all parents tie is left out."""
    everywhere = set.intersection(*(set(tied[name]) for name in parents))
    stored = sorted(set().union(*(headers[name] for name in parents)) - everywhere)
    for name in parents:
        missing = [t for t in stored if t not in headers[name] and t not in tied[name]]
        if missing:
            count = "a tensor" if len(missing) == 1 else f"{len(missing)} tensors"
            raise CannotCombine(f"{name} lacks {count} that other parents have: {', '.join(missing[:5])}; {INSTEAD}")
    return {t: {name: _stands(t, headers[name], tied[name]) for name in parents} for t in stored}


def _stands(tensor: str, headers: Headers, tied: Mapping[str, str]) -> str:
    return tensor if tensor in headers else tied[tensor]


def _stacked(settings: MergeSettings, headers: Mapping[str, Headers], tied: Tied) -> dict[str, dict[str, str]]:
    """Where each tensor of a stack of slices stands. One that is tied in all models it comes from is left out."""
    made = stack({name: {*found, *tied[name]} for name, found in headers.items()}, settings.stacked)
    return {
        tensor: {name: _stands(there, headers[name], tied[name]) for name, there in place.items()}
        for tensor, place in made.items()
        if not all(there in tied[name] for name, there in place.items())
    }


def _same_shapes(headers: Mapping[str, Headers], places: Places) -> None:
    wrong = []
    for tensor, place in places.items():
        shapes = {name: headers[name][there].shape for name, there in place.items()}
        if len(set(shapes.values())) > 1:
            found = ", ".join(f"{list(shape)} in {name}" for name, shape in shapes.items())
            wrong.append(f"{tensor} is {found}")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CannotCombine(f"expected tensors of one shape, found {'; '.join(wrong[:5])}{more}; {INSTEAD}")
