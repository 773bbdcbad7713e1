"""What putting adapters together does: the frozen model, the adapters on it, a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graft import models
from graft.adapt.settings import AdaptSettings
from graft.errors import RequestError, UnknownName
from graft.verb import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run(job: Job) -> dict[str, Any]:
    """Write the folder into `job.out`; returns which adapters are in it."""
    from graft.adapters.folder import save
    from graft.adapters.folding import save_folded
    from graft.adapters.peft_format import save_peft
    from graft.adapters.stack import adapters_of

    settings = job.settings
    assert isinstance(settings, AdaptSettings)
    model = assembled(job, settings)
    stack = adapters_of(model)
    if settings.fold:
        save_folded(model, job.out)
    else:
        save(model, job.out, seen_from=job.target or job.out)
    if settings.export:
        save_peft(model, job.out / "peft", seen_from=(job.target or job.out) / "peft")
    models.load_tokenizer(job.models[settings.start]).save_pretrained(job.out)
    if stack is None:
        return {"adapters": dict.fromkeys(settings.names, 1.0)}
    parameters = {name: stack.count(name) for name, _ in stack.active}
    return {"adapters": dict(stack.active), "adapter_parameters": parameters}


def assembled(job: Job, settings: AdaptSettings) -> PreTrainedModel:
    """The frozen model with the adapters that the settings name, active as they say.

    Raises UnknownName for one in `without` and for a `task` that are not there, RequestError where a fusion listens to
    it or none is left.
    """
    from graft.adapters.folder import add_from, averaged, load
    from graft.adapters.foreign import tasks_of
    from graft.adapters.peft_format import load_peft
    from graft.adapters.stack import adapters_of

    if settings.peft is not None:
        return load_peft(settings.peft, base=job.models[settings.start], name=job.name)
    first, *others = settings.names
    model = load(job.models[first])
    stack = adapters_of(model)
    if stack is None:  # of one of peft's own types, which `check` lets by where it is alone
        if settings.task is not None and (tasks := tasks_of(model)) is not None:
            tasks.use(settings.task)
        return model
    active = {first: list(stack.active)}
    for name in others:
        active[name] = add_from(model, job.models[name])
    if unknown := next((name for name in settings.without if name not in stack.points), None):
        raise UnknownName("adapter", unknown, list(stack.points))
    for name in reversed(list(stack.points)):  # fusions first, and then those that they listen to
        if name in settings.without:
            stack.drop(name)
    active = {name: [(a, w) for a, w in held if a in stack.points] for name, held in active.items()}
    if not any(active.values()):
        raise RequestError(f"expected an adapter that is not left out, found none beside {', '.join(settings.without)}")
    if settings.how == "average":
        averaged(model, {a: w * settings.weights[name] for name, held in active.items() for a, w in held}, job.name)
        return model
    stack.use({a: w * settings.weights[name] for name, held in active.items() for a, w in held})
    return model
