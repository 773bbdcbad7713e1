"""What was found out before and beside a merge, in lines for people. Light."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

TOKENIZER = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "source.spm", "tekken", "special_tokens")
"""How the names of a tokenizer's files begin."""


def lines(notes: Mapping[str, Any]) -> list[str]:
    """What people should know of a merge, from its manifest's notes (with what was `forced`): what was wrong first."""
    told: dict[str, Callable[[Any], Iterator[str]]] = {
        "forced": _forced,
        "config_differences": lambda found: _differences(found, notes),
        "tokens_unknown": _unknown,
        "alignment": _alignment,
        "search": _search,
        "greedy_soup": _greedy,
        "learned_soup": _learned,
        "checkpoints": _checkpoints,
        "seeds": _seeds,
        "entropy_by_step": _entropy,
        "share_in_region": _regions,
        "merged_by_regression": _regression,
        "barriers": _barriers,
        "correlation_of_weights": _correlations,
        "vocabulary": _vocabulary,
        "unread": _unread,
        "ranks": lambda found: _adapter(found, notes),
        "copied": _copied,
        "files_taken": lambda found: _taken(found, notes),
    }
    return [line for key, words in told.items() if key in notes for line in words(notes[key])]


def _forced(found: list[str]) -> Iterator[str]:
    yield from (f"merged anyway: {sentence}" for sentence in found)


def _differences(found: Mapping[str, list[str]], notes: Mapping[str, Any]) -> Iterator[str]:
    kept, own = notes["config_from"], notes.get("config_of_its_own", {})
    beside = f", but {', '.join(f'{key} {value!r}' for key, value in own.items())}" if own else ""
    for name, differences in found.items():
        yield f"{kept} and {name} differ in {'; '.join(differences)}: the merge has what {kept} has{beside}"


def _unknown(found: list[str]) -> Iterator[str]:
    yield f"the tokens of {', '.join(found)} are not known: rows of embeddings were taken to stand for the same ones"


def _correlations(found: Mapping[str, float]) -> Iterator[str]:
    each = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    yield f"correlation of the weights with those of the first model: {each}"


def _taken(files: list[str], notes: Mapping[str, Any]) -> Iterator[str]:
    parent = notes["config_from"]
    joined = notes.get("vocabulary", {})
    new = joined.get("how") == "union" and joined.get("new_tokens")
    spoken = not new and any(file.startswith(TOKENIZER) for file in files)
    known = {
        "tokenizer": spoken,
        "chat template": "chat_template.jinja" in files,
        "processor": any(file.endswith("processor_config.json") for file in files),
        "generation settings": "generation_config.json" in files,
    }
    *first, last = ["configuration", *(what for what, taken in known.items() if taken)]
    yield f"{' and '.join([', '.join(first), last] if first else [last])} of {parent}"
    if not new and not spoken:
        yield f"no tokenizer: {parent} has none beside its weights"


def _vocabulary(found: Mapping[str, Any]) -> Iterator[str]:
    lacking = ", ".join(f"{name} lacked {rows}" for name, rows in found["lacking"].items())
    yield f"vocabulary of {found['rows']} rows ({found['how']}), {found['new_tokens']} of them new: {lacking}"


def _copied(found: str) -> Iterator[str]:
    yield f"copied: {found}"


def _unread(found: Mapping[str, list[str]]) -> Iterator[str]:
    names = ", ".join(list(found)[:3]) + (", …" if len(found) > 3 else "")
    holders = ", ".join(dict.fromkeys(name for each in found.values() for name in each))
    yield f"left out: {len(found)} tensors of {holders} that no such model reads ({names})"


def _adapter(ranks: Mapping[str, int], notes: Mapping[str, Any]) -> Iterator[str]:
    if not ranks:
        return
    least, most = min(ranks.values()), max(ranks.values())
    rank = f"rank {least}" if least == most else f"ranks {least} to {most}"
    layer, error = max(notes.get("relative_error", {"": 0.0}).items(), key=lambda one: one[1])
    lost = f", relative error {error:.2%} at most ({layer})" if error > 0 else ""
    yield f"an adapter of {rank} for {len(ranks)} layers{lost}"
    if "share_kept" in notes:
        out = f"; left out: {len(notes['left_out'])} tensors that changed too" if notes["left_out"] else ""
        yield f"  {notes['share_kept']:.2%} of the squared difference from {notes['config_from']} kept{out}"


def _alignment(found: Mapping[str, Any]) -> Iterator[str]:
    for name, each in found["models"].items():
        cosines = f"cosine {each['cosine_before']:.3f} before, {each['cosine_after']:.3f} after"
        yield f"{name} was put into the order of {found['to']}: {cosines}"
        if "barrier_before" in each:
            heights = f"{_height(each['barrier_before'])} before, {_height(each['barrier_after'])} after"
            yield f"  barrier on the straight line between them: {heights} ({each['metric']})"


def _barriers(found: Mapping[str, Any]) -> Iterator[str]:
    for each in found["lines"]:
        between = " and ".join(each["between"])
        yield f"barrier on the straight line between {between}: {_height(each['barrier'])} ({found['metric']})"


def _height(barrier: float | None) -> str:
    return "no number on the way" if barrier is None else f"{barrier:.4f}"


def _search(found: Mapping[str, Any]) -> Iterator[str]:
    turned = ", ".join(f"{name} {_value(value)}" for name, value in found["parameters"].items()) or "as written"
    scores = f"{_value(found['best'])}, as written {_value(found['as_written'])}"
    yield f"searched by {found['by']}, {len(found['tried'])} merges: {turned} gives {found['metric']} {scores}"


def _greedy(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"greedy soup by {found['metric']} on {', '.join(found['on'])}:"
    for one in found["decisions"]:
        inside = _value(one["with"]) if one["without"] is not None else "the first"
        taken = "taken" if one["taken"] else "left"
        yield f"  {one['model']}: alone {_value(one['alone'])}, in the soup {inside}: {taken}"


def _learned(found: Mapping[str, Any]) -> Iterator[str]:
    losses = found["losses"]
    yield f"learned shares: {losses[0]:.4f} nats a token with equal ones, {min(losses):.4f} with the best"
    for group, shares in found["shares"].items():
        yield f"  {group}: {_value(shares)}"


def _checkpoints(found: list[Mapping[str, Any]]) -> Iterator[str]:
    yield "averaged: " + ", ".join(f"{one['name']} ({one['share']:.3g})" for one in found)


def _seeds(found: Mapping[str, Any]) -> Iterator[str]:
    apart, cosine = found["distance"], found["cosine"]
    yield (
        f"{len(found['seeds'])} seeds: {apart['mean']:.1%} of the task vector's length apart "
        f"({apart['least']:.1%} to {apart['most']:.1%}), cosine {cosine['mean']:.3f}"
    )
    if "score" in found:
        score = found["score"]
        yield (
            f"  {found['metric']} {_value(score['mean'])} ± {_value(found['deviation'])} "
            f"({_value(score['least'])} to {_value(score['most'])})"
        )


def _entropy(found: list[float]) -> Iterator[str]:
    if found:
        yield f"learned λ in {len(found)} steps: entropy {found[0]:.4f} to {found[-1]:.4f} nats a token"


def _regions(found: Mapping[str, float]) -> Iterator[str]:
    yield "regions: " + ", ".join(f"{name} {share:.2%}" for name, share in found.items())


def _regression(found: int) -> Iterator[str]:
    yield f"{found} tensors merged by regression, the others by their mean"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_value(one) for one in value) + "]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else str(value)
