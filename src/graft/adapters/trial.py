"""Adapters tried on a model's skeleton, which takes no memory: what is wrong is found before anything is loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from graft.adapters.facts import frozen_config, points_of
from graft.adapters.point import JOINING, Point
from graft.errors import RequestError
from graft.folders import ADAPTED
from graft.settings import parse
from graft.verb import Facts

if TYPE_CHECKING:
    from graft.adapters.stack import Adapters


def skeleton(config: Mapping[str, Any]) -> Any:
    """The model that a configuration (as in `config.json`) names, without weights; None where it names none here."""
    import torch
    from transformers import CONFIG_MAPPING

    from graft.models import model_class

    plain = frozen_config(dict(config))
    kind = plain.pop("model_type", None)
    plain.pop("quantization_config", None)
    if kind not in CONFIG_MAPPING:
        return None
    made = CONFIG_MAPPING[kind].from_dict(_numbers(plain))
    cls = model_class(made)
    with torch.device("meta"):
        model = cls.from_config(made) if hasattr(cls, "from_config") else cls(made)
    if hasattr(model, "set_experts_implementation"):  # tokens without values cannot be sorted by their experts
        model.set_experts_implementation("batched_mm")
    return model


def _numbers(said: Any) -> Any:
    """What a configuration says, with the infinities for which JSON has no word, as `transformers` writes them."""
    if isinstance(said, list):
        return [_numbers(one) for one in said]
    if not isinstance(said, dict):
        return said
    return float(said["__float__"]) if set(said) == {"__float__"} else {key: _numbers(one) for key, one in said.items()}


def expert_numbers(config: Mapping[str, Any]) -> int:
    """Numbers in parameters of fused experts of the model of this configuration; 0 where it is not known here."""
    said = json.dumps(dict(config), sort_keys=True, default=str)
    return _expert_numbers(said) if "expert" in said else 0


@lru_cache(maxsize=64)
def _expert_numbers(said: str) -> int:
    from graft.adapters.places import Layout

    model = skeleton(json.loads(said))
    return 0 if model is None else sum(model.get_parameter(path).numel() for path in Layout(model).experts())


def learned_positions(config: Mapping[str, Any]) -> int | None:
    """For how many tokens the model of this configuration has positions in a table; None where they are computed, or
    the model is not known here."""
    from graft.adapters.positions import positions_in

    model = skeleton(config)
    return None if model is None else positions_in(model, config)


def unfoldable_in(model: Facts, without: Sequence[str] = ()) -> list[str]:
    """Why the active adapters of a model, but for those named, do not fold, tried on its skeleton where its
    configuration is known; empty if nothing is known to speak against it."""
    if set(without) - set(model.config[ADAPTED].get("adapters", {})):
        return []  # one that is yet to be made has no name before
    points = [parse(Point, point) for point in points_of(model, without)]
    if any(point.form == "mixture" for point in points):
        return ["a mixture of experts does not fold, since its scalings differ between tokens"]
    if not points or not model.config.get("architectures") or any(point.form == "fusion" for point in points):
        return []
    return problems(model.config, points, fold=True)


def unfusable(start: Facts, names: Sequence[str]) -> list[str]:
    """Why these adapters of a model (none named: all that are active) do not fuse, tried on its skeleton; empty if
    nothing is known to speak against it."""
    from graft.adapters.composed import check_no_mixture
    from graft.adapters.stack import adopt

    each = _own(start.config)
    active = [name for name, _ in start.config[ADAPTED].get("active", [])]
    try:
        check_no_mixture({name: each[name] for name in names or active if name in each})
    except RequestError as error:
        return [str(error)]
    joined = any(point.form in JOINING for points in each.values() for point in points)
    if joined or not set(names) <= set(each):
        return []
    try:
        if (model := _with_own(start.config)) is not None:
            adopt(model, [Point(form="fusion", on=["adapters"], of=list(names))], "fusion of them")
    except RequestError as error:
        return [str(error)]
    except (RuntimeError, NotImplementedError):
        return []
    return []


def _own(config: Mapping[str, Any]) -> dict[str, list[Point]]:
    """The points of each adapter that a model of this configuration has."""
    entry = config.get(ADAPTED, {})
    return {name: [parse(Point, raw) for raw in held] for name, held in entry.get("adapters", {}).items()}


def _with_own(config: Mapping[str, Any]) -> Any:
    """The skeleton of a model with its adapters, those active that are; None where it has none of graft's own, or the
    model is not known here. Raises RequestError and RuntimeError where they cannot be put there without weights."""
    from graft.adapters.stack import adopt

    own, model = _own(config), skeleton(config)
    if model is None or "peft" in config.get(ADAPTED, {}) or not own:
        return None
    for name, points in own.items():
        stack = adopt(model, points, name)
    stack.use([name for name, _ in config[ADAPTED]["active"]])
    return model


def trained_on_top(config: Mapping[str, Any], points: Sequence[Point] | None, names: Sequence[str]) -> int | None:
    """Numbers that are trained where a model's adapters are: by these points beside them, or (None) those of its own
    adapters `names`, all that are active if none are named. None where it cannot be tried."""
    from graft.adapters.stack import adapters_of, adopt

    try:
        model = _with_own(config)
        if model is None:
            return None
        if points is not None:
            return adopt(model, points, "joined").count("joined")
        stack = adapters_of(model)
        assert stack is not None
        mine = names or [name for name, _ in stack.active]
        return sum(stack.count(one) for name in mine for one in (name, *stack.experts_trained_with(name)))
    except (RequestError, RuntimeError, NotImplementedError):
        return None


def problems(
    config: Mapping[str, Any], points: Sequence[Point], *, fold: bool = False, compiled: bool = False
) -> list[str]:
    """What is wrong with these points on the model of this configuration, a sentence each; empty if nothing.

    `fold`, `compiled`: whether the adapter is to be folded, and the model compiled.
    """
    from graft.adapters.expert_junction import uncompilable
    from graft.adapters.folding import unfoldable
    from graft.adapters.stack import adopt

    model = skeleton(config)
    if model is None:
        return []
    try:
        stack = adopt(model, points)
    except RequestError as error:
        return [str(error)]
    except (RuntimeError, NotImplementedError):  # a model that cannot be tried without weights is tried with them
        return []
    if compiled and (wrong := uncompilable(stack.junctions.values())):
        return wrong
    try:
        passed = passed_by(model, stack)
    except RequestError as error:  # said where sites are called
        return [str(error)]
    if passed:
        return [
            f"{type(model).__name__} takes the weights of {', '.join(passed[:4])}{' …' if len(passed) > 4 else ''} "
            "without calling these layers, so that an adapter there would learn nothing: name other places "
            f"(`on`), such as {', '.join(_others(model, passed))}"
        ]
    wrong = unfoldable(model, stack) if fold else []
    return [f"the adapter does not fold: {wrong[0]}; say `fold: false`"] if wrong else []


def passed_by(model: Any, stack: Adapters) -> list[str]:
    """Modules with sites that a call of the model passes by, though it calls what they stand in; none where a skeleton
    cannot be called."""
    from torch import nn

    from graft.adapters.places import call_briefly

    paths = [place for junction in stack.junctions.values() for place in (junction.place.source, junction.place.target)]
    paths = list(dict.fromkeys(paths))
    called: set[int] = set()
    watched = {one for path in paths for one in (path, path.rpartition(".")[0])}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda module, args, output: called.add(id(module)))
        for path in watched
    ]
    try:
        call_briefly(model)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return []
    finally:
        for handle in handles:
            handle.remove()
    inside = [path for path in paths if id(model.get_submodule(path.rpartition(".")[0])) in called]
    # one of several embeddings of one weight is called
    return [
        path
        for path in inside
        if id(model.get_submodule(path)) not in called and not isinstance(model.get_submodule(path), nn.Embedding)
    ]


def _others(model: Any, passed: Sequence[str]) -> list[str]:
    """Patterns of names of linear layers in the blocks that are not passed by."""
    from graft.adapters.places import Layout

    leaves = dict.fromkeys(f"*.{one.path.rpartition('.')[2]}" for one in Layout(model).linears)
    gone = {f"*.{path.rpartition('.')[2]}" for path in passed}
    return [leaf for leaf in leaves if leaf not in gone]


def trained(config: Mapping[str, Any], points: Sequence[Point]) -> int | None:
    """How many numbers these points train in the model of this configuration; None where that cannot be tried."""
    return counter(config)(points)


def counter(config: Mapping[str, Any]) -> Callable[[Sequence[Point]], int | None]:
    """`trained` for many choices of points in one model, whose skeleton is built once."""
    from graft.adapters.stack import adopt

    model = skeleton(config)

    def count(points: Sequence[Point]) -> int | None:
        if model is None:
            return None
        try:
            return adopt(copy.deepcopy(model), points).count("adapter")
        except (RequestError, RuntimeError, NotImplementedError):
            return None

    return count


def parameter_names(config: Mapping[str, Any]) -> list[str]:
    """Names of the parameters of the model of this configuration, tied ones once; empty where it is not known here."""
    model = skeleton(config)
    return [] if model is None else [name for name, _ in model.named_parameters()]
