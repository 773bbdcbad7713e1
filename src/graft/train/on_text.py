"""Training a node on text: the part that every verb shares which trains on a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graft import data, models
from graft.data.bootstrap import described
from graft.data.objective_rows import objective_rows
from graft.data.objectives import Prefix
from graft.data.rows import Rows
from graft.errors import CannotCombine
from graft.one_way import check_one_way
from graft.prefix_lm import mark
from graft.settings import Settings
from graft.train.attention import keeps_apart, predicts_in_place
from graft.train.loop import Save, train
from graft.train.losses import TokenLoss
from graft.train.place import main_first, tell
from graft.train.settings import TrainSettings
from graft.train.trackers import Title
from graft.verb import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def train_on_text(
    job: Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    corpus: data.AnyCorpus,
    split: str,
    objective: Settings,
    length: int,
    save: Save | None = None,
) -> dict[str, Any]:
    """Train `model` in place on a split of `corpus`, write it into `job.out` (by `save`, if given), return the metrics.

    The dev loss is measured on the corpus's dev split, unless its settings (of any part) say `splits: {dev: 0}`.
    """
    assert isinstance(job.settings, TrainSettings)
    together = reads_together(model, objective, length)
    mark(model, isinstance(objective, Prefix))
    bootstrap = job.settings.bootstrap

    def rows(split: str, bootstrap: int | None = None) -> Rows:
        return objective_rows(
            corpus, split, tokenizer, objective, length=length, seed=job.seed, cache=job.cache, together=together,
            bootstrap=bootstrap,
        )  # fmt: skip

    write = save or (lambda trained, folder: models.save(trained, tokenizer, folder))
    tell(job, f"{counted(model)}; reading {corpus.name}.{split}")
    with main_first():
        learned, dev = rows(split, bootstrap), rows("dev") if data.has_dev(corpus) else None
    tell(job, f"training on {len(learned):,} rows of up to {length:,} tokens")
    result = train(
        model, learned, TokenLoss(), job.settings, job.out, scratch=job.scratch, seed=job.seed, dev=dev,
        device=job.device, save=write, title=Title.of(job),
    )  # fmt: skip
    write(model, job.out)
    notes = {}
    if bootstrap is not None:
        notes = {"notes": {"bootstrap": described(corpus, split, tokenizer, job.cache, bootstrap)}}
    return {**result.metrics, "parameters": model.num_parameters(), **notes}


def counted(model: PreTrainedModel) -> str:
    """`1,000 parameters`, and how many of them are trained where that is not all."""
    whole, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    said = f"{whole:,} parameters"
    return said if trained == whole else f"{said}, {trained:,} of them trained ({100 * trained / whole:.2g} %)"


def reads_together(model: PreTrainedModel, objective: Settings, length: int) -> bool:
    """Whether rows of several documents can be made for a model. Raises CannotCombine where the objective needs it, and
    RequestError for a decoder that sees what it is to predict."""
    if not predicts_in_place(model):
        check_one_way(model)
    together = bool(model.config.is_encoder_decoder) or keeps_apart(model, length)
    if isinstance(objective, Prefix) and not together:
        raise CannotCombine(
            f"prefix LM needs a model that takes a mask of its own over {length} tokens, which "
            f"{type(model).__name__} does not; use `objective: causal` or a shorter `length`"
        )
    return together
