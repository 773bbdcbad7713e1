"""What tuning does: a model from disk, its method applied, the training loop, a model's folder or an adapter's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft import data, models
from graft.data.objectives import objective_for
from graft.errors import RequestError
from graft.folders import architecture_of
from graft.methods import method
from graft.tune.settings import TuneSettings, longest, stretched
from graft.verb import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from graft.train.loop import Save


def run(job: Job) -> dict[str, Any]:
    """Tune and write a model's folder into `job.out`; returns the metrics of the training."""
    import torch

    from graft.adapters.stack import Adapted, adapters_of
    from graft.train.on_text import train_on_text
    from graft.train.optimizer import check_optimizer
    from graft.train.place import tell

    settings = job.settings
    assert isinstance(settings, TuneSettings)
    check_optimizer(settings.optimizer, job.device)
    start = job.models[settings.from_]
    torch.manual_seed(job.seed)
    tell(job, f"loading {settings.from_}")
    model = applied(models.load(start, dtype=torch.float32), settings, job.name, start, job.models)
    objective = objective_for(architecture_of(model.config.to_dict()), settings.objective, model.config)
    tokenizer = models.load_tokenizer(start)
    stack = adapters_of(model)
    taken = stack.taken(model) if stack else 0
    length = settings.length or longest(model.config.to_dict(), tokenizer.model_max_length) - taken
    if far := stretched(model.config.to_dict(), settings.length, settings.from_):
        tell(job, f"warning: {far}")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    save = _save(job, tokenizer, settings.fold) if isinstance(model, Adapted) else None
    if settings.data is None:
        from graft.tune.several import train_on_tasks

        metrics = train_on_tasks(job, model, tokenizer, objective, length, save)
    else:
        name, split = data.split_ref(settings.data)
        corpus = data.open_corpus(job.data, name, job.root)
        metrics = train_on_text(job, model, tokenizer, corpus, split, objective, length, save)
    return {**metrics, "trained_parameters": trained}


def applied(
    model: PreTrainedModel, settings: TuneSettings, name: str, start: Path, folders: Mapping[str, Path]
) -> PreTrainedModel:
    """The model with the method of `settings`: an adapter called `name`, or its own weights made trainable.

    `folders`: where the models lie that the settings name.

    Raises RequestError for places that the model does not have and for an adapter that shall be folded and cannot be.
    """
    from graft.adapters.expert_junction import uncompilable
    from graft.adapters.folding import unfoldable
    from graft.adapters.foreign import tasks_of
    from graft.adapters.stack import adapters_of, adopt, free_name

    ((how, options),) = settings.method.items()
    chosen = method("graft.tune", how)
    parsed, earlier = chosen.Settings(**options), adapters_of(model)
    own = free_name(name, earlier.points if earlier else ())
    if hasattr(chosen, "points"):
        adopt(model, chosen.points(parsed), own, base=start)
    else:
        model = chosen.apply(model, parsed, start, own, folders) if how == "peft" else chosen.apply(model, parsed)
        if settings.tasks and (tasks := tasks_of(model)) is not None:
            tasks.call(list(settings.tasks))
    stack = adapters_of(model)
    wrong = unfoldable(model, stack) if settings.fold and stack else []
    if wrong:
        raise RequestError(f"expected adapters that fold into the weights, found that {wrong[0]}: say `fold: false`")
    if settings.compile and stack and (wrong := uncompilable(stack.junctions.values())):
        raise RequestError(wrong[0])
    return model


def _save(job: Job, tokenizer: PreTrainedTokenizerFast, folded: bool) -> Save:
    """How a model with adapters is written: alone, naming the frozen model from where it will stand; or folded."""
    from graft.adapters.folder import save
    from graft.adapters.folding import save_folded

    def write(model: Any, folder: Path) -> None:
        if folded:
            save_folded(model, folder)
        else:
            save(model, folder, seen_from=(job.target or job.out) / folder.relative_to(job.out))
        tokenizer.save_pretrained(folder)

    return write
