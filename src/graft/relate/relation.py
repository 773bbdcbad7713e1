"""The answer: how two checkpoints are related, on what evidence, and what may be combined how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graft.folders import ADAPTED, architecture_of
from graft.kinship.evidence import TRACE
from graft.lineage import Manifest, read_manifest
from graft.models import check_asked
from graft.relate.vocabulary import Overlap, overlap
from graft.vocabulary import token_ids

if TYPE_CHECKING:
    from rich.table import Table

    from graft.kinship.evidence import Evidence
    from graft.merge.inputs import Input

Kind = Literal[
    "same folder",
    "same weights",
    "same initialisation",
    "permuted",
    "other initialisation",
    "different size",
    "different architecture",
    "ensemble",
    "adapter",
    "not comparable",
]


@dataclass(frozen=True)
class Relation:
    """How two checkpoints are related. `p` is small where chance would seldom make unrelated models look so alike."""

    a: str
    b: str
    kind: Kind
    evidence: str
    """What the answer rests on, in words."""
    correlation: float | None
    """Of corresponding rows of weights (matched rows where `kind` is permuted)."""
    p: float | None
    vocabulary: Overlap | None
    """None where one of the two has no tokenizer."""
    weights: Literal["yes", "after alignment", "no"]
    """Whether their weights may be combined."""
    weights_why: str
    predictions: Literal["yes", "with vocabulary handling", "no"]
    """Whether their predictions may be combined."""
    predictions_why: str

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)


def relate(
    a: Path | str,
    b: Path | str,
    *,
    seed: int = 0,
    adapters_of: Path | str | None = None,
    allow_pickle: bool = False,
) -> Relation:
    """How the checkpoints in the folders `a` and `b` are related, and what may therefore be combined.

    Reads configurations, manifests, tokenizers, headers and a sample of the weights; `seed` is that of the shuffles. An
    adapter in the form of peft is read as the model that it makes of its base: the one it names, or `adapters_of`.
    Pickles are converted whole, where `allow_pickle` says so.

    Raises RequestError for a folder that holds no model or a damaged one and for a pickle that is not allowed, and
    CannotCombine for an adapter without a base or on another one.
    """
    from graft.merge.inputs import Input, home_of, readable

    named = [Path(a), Path(b), *([Path(adapters_of)] if adapters_of is not None else [])]
    check_asked(named, loads=False)
    with readable(named, allow_pickle) as (one, two, *under):
        first, second = (Input(f, home_of(str(n), f, *under)) for n, f in ((a, one), (b, two)))
        return _related(str(a), str(b), first, second, seed)


def _related(a: str, b: str, one: Input, two: Input, seed: int) -> Relation:
    first, second = token_ids(one.tokenizer), token_ids(two.tokenizer)
    words = overlap(first, second) if first is not None and second is not None else None
    same = Path(a).resolve() == Path(b).resolve()
    kind, evidence, correlation, p = SAME_FOLDER if same else _kinship(one, two, words, seed)
    weights = _weights(kind, correlation, _rows_differ(one, two, words), _family(one) != "encoder-decoder")
    adapters = {name: part.home for name, part in ((a, one), (b, two)) if part.home != part.folder}
    said = [f"{name} is an adapter, read as the model that it makes of {home}" for name, home in adapters.items()]
    evidence = "; ".join([evidence, *said])
    return Relation(a, b, kind, evidence, correlation, p, words, *weights, *_predictions(one, two, kind, words))


Kinship = tuple[Kind, str, float | None, float | None]
SAME_FOLDER: Kinship = ("same folder", "both paths lead to it", None, None)


def _kinship(a: Input, b: Input, words: Overlap | None, seed: int) -> Kinship:
    """(kind, evidence, correlation, p)."""
    from graft.merge.preflight import SHAPE_KEYS, different_keys

    ours, theirs = a.config, b.config
    manifests = [_manifest(part) for part in (a, b)]
    if ADAPTED in ours or ADAPTED in theirs:
        return "adapter", "what one of them holds lies beside the weights of a frozen model", None, None
    if any(m is not None and not m.mergeable and p.folder == p.home for m, p in zip(manifests, (a, b), strict=True)):
        return "ensemble", "a manifest says that the model has no weights of its own", None, None
    if different := different_keys(ours, theirs, ("model_type",)):
        return "different architecture", "; ".join(different), None, None
    if different := different_keys(ours, theirs, SHAPE_KEYS):
        return "different size", "; ".join(different), None, None
    return _by_weights(a, b, manifests, words, seed)


def _manifest(part: Input) -> Manifest | None:
    """The model's own; that of its base for an adapter without one."""
    return read_manifest(part.folder) or read_manifest(part.home)


def _by_weights(a: Input, b: Input, manifests: Sequence[Manifest | None], words: Overlap | None, seed: int) -> Kinship:
    from graft.kinship.evidence import same_weights, weigh
    from graft.merge.inputs import called_alike

    a, b = called_alike({"a": a, "b": b}).values()
    with a.open() as ours, b.open() as theirs:
        if same_weights(ours, theirs, (a.folder, b.folder)):
            return "same weights", "every tensor is the same", None, None
        found = weigh(ours, theirs, same_tokens=words is None or words.same, seed=seed)
    return _said(found, _common_start(manifests))


def _common_start(manifests: Sequence[Manifest | None]) -> bool | None:
    """What the manifests say about the initialisations; None where they say nothing."""
    first, second = (m.initialisation if m is not None else "unknown:" for m in manifests)
    return None if first.startswith("unknown:") or second.startswith("unknown:") else first == second


def _said(found: Evidence, common: bool | None) -> Kinship:
    """Weights and manifests together: a common start that manifests record is one; else the weights decide."""
    kinds: dict[str, Kind] = {
        "related": "same initialisation",
        "permuted": "permuted",
        "unrelated": "other initialisation",
        "incomparable": "not comparable",
    }
    kind, evidence = kinds[found.found], found.what
    value, p = (found.test.value, found.test.p) if found.test is not None else (None, None)
    if common and found.found in ("related", "unrelated"):
        return "same initialisation", f"the manifests name one initialisation; {evidence}", value, p
    if common is False:
        evidence = f"{evidence}; the manifests name two initialisations: without `anyway`, no merge takes both"
    return kind, evidence, value, p


def _rows_differ(a: Input, b: Input, words: Overlap | None) -> bool:
    """Whether the embeddings have other rows, by tokens or by number."""
    from graft.merge.preflight import different_keys

    return (words is not None and not words.same) or bool(different_keys(a.config, b.config, ("vocab_size",)))


def _weights(
    kind: Kind, correlation: float | None, rows_differ: bool, aligns: bool
) -> tuple[Literal["yes", "after alignment", "no"], str]:
    match kind:
        case "same folder" | "same weights":
            return "yes", "a mean of the two is either of them: there is nothing to gain"
        case "same initialisation" if correlation is not None and correlation < TRACE:
            return "no", f"only a trace of their common start is left (correlation {correlation:.3f})"
        case "same initialisation" if rows_differ:
            return "after alignment", (
                "the rows of their embeddings stand for different tokens or differ in number: a merge with "
                "`vocabulary: union` (or base) matches them by token"
            )
        case "same initialisation":
            return "yes", "any method of merge"
        case "permuted" | "other initialisation" if rows_differ or not aligns:
            takes = "models of one vocabulary only" if rows_differ else "no encoder–decoders"
            return "no", (
                "a plain mean of their weights is no model, and the merge `rebasin`, which would match their units "
                f"first, takes {takes}: an ensemble works"
            )
        case "permuted":
            return "after alignment", "their units stand in different orders: the merge `rebasin` matches them first"
        case "other initialisation":
            return (
                "after alignment",
                "a plain mean of their weights is no model; the merge `rebasin` matches their units first",
            )
        case "ensemble":
            return "no", "an ensemble has no weights of its own: merge its members"
        case "adapter":
            return "no", (
                "what it changes is no sum with the weights of its model: where it folds, merge what folding gives "
                "({adapt: {adapters: [...], fold: true}}); adapters on one model are put together without (adapt)"
            )
        case "not comparable":
            return "no", "their tensors have different names or shapes, or are stored packed: convert one of the two"
    return "no", f"{kind}: their tensors do not correspond"


def _predictions(
    a: Input, b: Input, kind: Kind, words: Overlap | None
) -> tuple[Literal["yes", "with vocabulary handling", "no"], str]:
    first, second = (_family(part) for part in (a, b))
    if first != second:
        return "no", f"one is of architecture {first} and the other of {second}"
    if kind in ("same folder", "same weights"):
        return "yes", "an ensemble of the two predicts what either does"
    if words is None:
        return "with vocabulary handling", "one has no tokenizer.json: nothing says that their tokens are the same"
    if not words.same:
        return "with vocabulary handling", f"an ensemble with `vocabulary: union` or `bytes`: {words}"
    return "yes", "an ensemble: their tokens are the same"


def _family(part: Input) -> str:
    manifest = _manifest(part)
    return manifest.architecture if manifest is not None else architecture_of(part.config)


def render(relation: Relation) -> Table:
    """The answer as a table for people."""
    from rich.table import Table

    table = Table(title=f"{relation.a} and {relation.b}", show_header=False, title_justify="left")
    table.add_row("related as", relation.kind)
    numbers = "" if relation.correlation is None else f" (correlation {relation.correlation:.3f}, p {_p(relation.p)})"
    table.add_row("evidence", relation.evidence + numbers)
    table.add_row("vocabulary", str(relation.vocabulary or "unknown: no tokenizer.json"))
    table.add_row("weights", f"{relation.weights}: {relation.weights_why}")
    table.add_row("predictions", f"{relation.predictions}: {relation.predictions_why}")
    return table


def _p(p: float | None) -> str:
    return "unknown" if p is None else f"{p:.2g}"
