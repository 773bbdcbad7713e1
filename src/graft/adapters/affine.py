"""Adapters that lie in graft's own folders as changes of the weights of their frozen model, found in headers alone.

LoRA, its rank-stabilised and PiSSA forms and any other linear point beside single linear layers, BitFit and (IA)³:
what they make of a weight can be worked out a piece at a time. Of the rest, what folds is folded whole first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from graft.adapters.facts import obstacles
from graft.checkpoint import ADAPTER, Headers, read_file_headers, read_headers
from graft.errors import CheckpointError, RequestError
from graft.lineage import read_config
from graft.lora import Change, Factors, Lora, LoraReader, Rescale, Shift, stands_for

if TYPE_CHECKING:
    from graft.adapters.forms import Site


def read_affine(folder: Path, home: Path) -> Lora:
    """The active adapters in `folder`, made for the model in `home`, as changes of its tensors, in the order they run.

    Raises RequestError, naming adapter and point, for what is no such change, CheckpointError for damaged files.
    """
    from graft.adapters.folder import entry_of

    entry, path = entry_of(folder), Path(folder) / ADAPTER
    if wrong := obstacles(entry):
        raise RequestError(f"{folder}: {'; '.join(wrong)}")
    if not path.is_file():
        raise CheckpointError(f"{folder}: expected the adapters' weights in {ADAPTER}, found no such file")
    held = Lora(Path(folder), entry, {}, {}, read_file_headers(path))
    base = read_headers(home)
    first: dict[str, list[Change]] = defaultdict(list)
    last: dict[str, list[Change]] = defaultdict(list)
    for start, weight, site in _sites(entry, home):
        # what multiplies a layer's input multiplies the columns of all that comes of it
        into = last if site.place.before else first
        for name, change in _changes(held, start, weight, site, base):
            into[name].append(change)
    return Lora(held.folder, entry, {n: (*first[n], *last[n]) for n in {**first, **last}}, {}, held.headers)


def _sites(entry: dict, home: Path) -> Iterator[tuple[str, float, Site]]:
    """(how its tensors' names begin, weight, site) of the active adapters, on a model without memory."""
    from graft.adapters.point import Point
    from graft.adapters.stack import adopt
    from graft.adapters.trial import skeleton
    from graft.settings import parse

    model = skeleton(read_config(home))
    if model is None:
        raise RequestError(
            f"{home}: this version of transformers does not know the model, nor where its adapters stand"
        )
    for name, weight in entry["active"]:
        points = [parse(Point, raw, (name,)) for raw in entry["adapters"][name]]
        # where a start lies in the weights, its factors are in the file
        stack = adopt(model, [point.model_copy(update={"start": "zero"}) for point in points], name)
        for key, site in stack.sites[name].items():
            yield f"{name}.{key.replace('/', '.')}.", float(weight), site


def _changes(held: Lora, start: str, weight: float, site: Site, base: Headers) -> Iterator[tuple[str, Change]]:
    """(tensor of the model, what becomes of it) at one site, `weight` times."""
    point, place = site.point, site.place
    turned = type(site.module).__name__ == "Conv1D"
    scale = weight * _scale(held, start, point.composition, point.scale)
    matrix, bias = f"{place.target}.weight", f"{place.target}.bias"
    if point.form == "linear":
        yield matrix, _factors(held, f"{start}down", f"{start}up", scale, turned)
        if f"{start}first_down" in held.headers:
            yield matrix, _factors(held, f"{start}first_down", f"{start}first_up", -scale, turned)
    elif point.form == "bias":
        yield bias, Shift(_there(held, f"{start}change"), scale)
    else:
        factor = _there(held, f"{start}factor")
        yield matrix, Rescale(factor, scale, int(place.before) ^ int(turned))
        if not place.before and stands_for(bias, base):
            yield bias, Rescale(factor, scale, 0)


def _scale(held: Lora, start: str, composition: str, said: float | str) -> float:
    if composition != "scaled":
        return 1.0
    if said != "learned":
        return float(said)
    with LoraReader(held) as reader:
        return float(reader.read(_there(held, f"{start}scale")))


def _factors(held: Lora, a: str, b: str, scale: float, turned: bool) -> Factors:
    return Factors(_there(held, a), _there(held, b), held.headers[a].shape[0], scale, turned)


def _there(held: Lora, name: str) -> str:
    if name not in held.headers:
        raise CheckpointError(f"{held.folder / ADAPTER}: expected the tensor {name}, found none")
    return name
