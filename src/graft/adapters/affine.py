"""Adapters that lie in graft's own folders as changes of the weights of their frozen model, found in headers alone.

LoRA, its rank-stabilised, PiSSA and DoRA forms and any other linear point beside, behind or before single linear
layers, BitFit and (IA)³, gated or not: what they make of a weight can be worked out a piece at a time, some of it after
one pass over the weight.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from graft import remembered
from graft.adapters.facts import FOLD, obstacles
from graft.checkpoint import ADAPTER, Headers, read_file_headers, read_headers
from graft.errors import CheckpointError, RequestError
from graft.folders import read_config
from graft.lora import (
    Change,
    Factors,
    Fade,
    Lora,
    LoraReader,
    Mixing,
    Rescale,
    Shift,
    Stretch,
    Turning,
    stands_for,
)

KIND = "adapters"
"""Of what is kept."""


def read_affine(folder: Path, home: Path) -> Lora:
    """The active adapters in `folder`, made for the model in `home`, as changes of its tensors, in the order they run.

    Raises RequestError, naming adapter and point, for what is no such change, CheckpointError for damaged files.
    """
    from graft.adapters.facts import entry_of

    entry, path = entry_of(folder), Path(folder) / ADAPTER
    if wrong := obstacles(entry):
        raise RequestError(f"{folder}: {'; '.join(wrong)}")
    if not path.is_file():
        raise CheckpointError(f"{folder}: expected the adapters' weights in {ADAPTER}, found no such file")
    held = Lora(Path(folder), entry, {}, {}, read_file_headers(path))
    base = read_headers(home)
    first: dict[str, list[Change]] = defaultdict(list)
    last: dict[str, list[Change]] = defaultdict(list)
    for name, weight in entry["active"]:
        for site in _sites(home, name, entry["adapters"][name]):
            # what multiplies a layer's input multiplies the columns of all that comes of it
            into = last if site.before else first
            for tensor, change in _changes(held, float(weight), site, base):
                if not isinstance(change, Stretch) or first[tensor]:
                    into[tensor].append(change)
    # what runs last before a layer is next to its weight
    changes = {name: (*first[name], *reversed(last[name])) for name in {**first, **last}}
    return Lora(held.folder, entry, {name: found for name, found in changes.items() if found}, {}, held.headers)


@dataclass(frozen=True)
class Site:
    """Where a point of an adapter stands: how its tensors' names begin, and at which module of the model."""

    start: str
    target: str
    before: bool
    turned: bool
    """The module's weight is stored as `[in, out]`."""
    form: str
    scale: float | str
    after: bool = False
    """It reads what the module gives."""
    gated: bool = False
    directions: bool = False


def _sites(home: Path, name: str, points: list[dict[str, Any]]) -> list[Site]:
    """All sites of an adapter, in the order they run."""
    config = {key: value for key, value in read_config(home).items() if key not in ("dtype", "torch_dtype")}
    asked = json.dumps({"config": config, "name": name, "points": points}, sort_keys=True)
    return [Site(**one) for one in json.loads(_known(f"{metadata.version('transformers')} {asked}"))]


@lru_cache(maxsize=64)
def _known(about: str) -> str:
    """The sites, as JSON, of what is asked about (behind the version of transformers)."""
    found = remembered.recall(KIND, about)
    if found is None:
        asked = about.partition(" ")[2]
        # transformers takes seconds and hundreds of megabytes to import, which a merge has no other use for
        found = (None if "transformers" in sys.modules else _elsewhere(asked)) or placed(asked)
        remembered.keep(KIND, about, found)
    return found


def _elsewhere(asked: str) -> str | None:
    """`placed` in a process of its own; None where that fails."""
    program = "import sys; from graft.adapters.affine import placed; print(placed(sys.stdin.read()))"
    done = subprocess.run([sys.executable, "-c", program], input=asked, capture_output=True, text=True)
    return done.stdout.splitlines()[-1] if not done.returncode and done.stdout else None


def placed(asked: str) -> str:
    """The sites of an adapter's points in the model of a configuration, which is built without memory; as JSON.

    Raises RequestError where the model is not known, or has not the places.
    """
    from graft.adapters.point import Point
    from graft.adapters.stack import adopt
    from graft.adapters.trial import skeleton
    from graft.settings import parse

    said = json.loads(asked)
    name, model = said["name"], skeleton(said["config"])
    if model is None:
        kind = said["config"].get("model_type")
        raise RequestError(f"{name}: this version of transformers does not know {kind}, nor where adapters stand in it")
    points = [parse(Point, raw, (name,)) for raw in said["points"]]
    # where a start or a length lies in the weights, it is in the file
    light = [point.model_copy(update={"start": "zero", "directions": False}) for point in points]
    turns = {id(one): point.directions for one, point in zip(light, points, strict=True)}
    stack = adopt(model, light, name)
    found = []
    for key, site in stack.sites[name].items():
        if site.place.parameter:
            raise RequestError(
                f"{name} changes {site.place.path}, a parameter of several experts, of which a merge knows no part: "
                f"{FOLD}"
            )
        point, place, turned = site.point, site.place, type(site.module).__name__ == "Conv1D"
        scale = point.scale if point.composition == "scaled" else 1.0
        start = f"{name}.{key.replace('/', '.')}."
        after, gated = point.insertion == "after" and not place.before, point.composition == "gated"
        turns_rows = turns[id(point)]
        found.append(Site(start, place.target, place.before, turned, point.form, scale, after, gated, turns_rows))
    return json.dumps([asdict(site) for site in found])


def _changes(held: Lora, weight: float, site: Site, base: Headers) -> Iterator[tuple[str, Change]]:
    """(tensor of the model, what becomes of it) at one site, `weight` times."""
    matrix, bias = f"{site.target}.weight", f"{site.target}.bias"
    if site.form == "linear":
        biased = stands_for(bias, base) is not None and not site.before
        yield from (_turned if site.directions else _of_linear)(held, weight, site, bias if biased else None)
        return
    scale = weight * _scale(held, site)
    keep = 1.0 - scale if site.gated else 1.0
    if site.form == "bias":
        if site.gated:
            yield from ((name, Fade(keep)) for name in (matrix, bias))
        yield bias, Shift(_there(held, f"{site.start}change"), scale)
        return
    factor = _there(held, f"{site.start}factor")
    yield matrix, Rescale(factor, scale, int(site.before) ^ int(site.turned), keep)
    if not site.before and stands_for(bias, base):
        yield bias, Rescale(factor, scale, 0, keep)


def _turned(held: Lora, weight: float, site: Site, bias: str | None) -> Iterator[tuple[str, Change]]:
    parts = _product(held, site, _scale(held, site))
    turning = Turning(parts, _there(held, f"{site.start}magnitude"), weight, int(site.turned))
    yield f"{site.target}.weight", turning
    if bias is not None:
        yield bias, Stretch(f"{site.target}.weight", turning)


def _of_linear(held: Lora, weight: float, site: Site, bias: str | None) -> Iterator[tuple[str, Change]]:
    matrix, scale = f"{site.target}.weight", weight * _scale(held, site)
    keep = 1.0 - scale if site.gated else 1.0
    if site.after or site.before:
        (factors,) = _product(held, site, scale)
        yield matrix, Mixing(factors, int(site.before) ^ int(site.turned), keep)
        if bias is not None:
            yield bias, Mixing(replace(factors, transposed=False), 0, keep)
        return
    if site.gated:
        yield from ((name, Fade(keep)) for name in (matrix, bias) if name is not None)
    yield from ((matrix, part) for part in _product(held, site, scale))


def _product(held: Lora, site: Site, scale: float) -> tuple[Factors, ...]:
    """What adds up to the site's change: with PiSSA less what it started with."""
    now = _factors(held, f"{site.start}down", f"{site.start}up", scale, site.turned)
    if f"{site.start}first_down" not in held.headers:
        return (now,)
    return now, _factors(held, f"{site.start}first_down", f"{site.start}first_up", -scale, site.turned)


def _scale(held: Lora, site: Site) -> float:
    """What the site's change is multiplied by: as written, or learned, or its gate."""
    if site.scale != "learned" and not (site.gated and not site.directions):
        return float(site.scale)
    with LoraReader(held) as reader:
        return float(reader.read(_there(held, f"{site.start}{'gate' if site.gated else 'scale'}")))


def _factors(held: Lora, a: str, b: str, scale: float, turned: bool) -> Factors:
    inner, outer = held.headers[_there(held, a)].shape, held.headers[_there(held, b)].shape
    if inner[0] != outer[1]:
        raise CheckpointError(f"{held.folder / ADAPTER}: expected one rank in {a} {inner} and {b} {outer}, found two")
    return Factors(a, b, inner[0], scale, turned)


def _there(held: Lora, name: str) -> str:
    if name not in held.headers:
        raise CheckpointError(f"{held.folder / ADAPTER}: expected the tensor {name}, found none")
    return name
