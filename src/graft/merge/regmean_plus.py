"""RegMean++: RegMean layer by layer, with the inputs that a layer gets in the merged model and not in its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from graft.merge._options import WholeModel
from graft.merge.regmean import RegressionSettings
from graft.merge.regmean import rule as regress

if TYPE_CHECKING:
    from graft.merge.prepared import Prepared
    from graft.merge.stream import Combine, Tensors
    from graft.verb import Facts, Job


class Settings(WholeModel, RegressionSettings):
    """As `regmean`, with each G from inputs that have come through the merged layers before: what a model's layer would
    be given inside the merged model. Other tensors: the weighted mean."""

    method: Literal["regmean_plus"] = "regmean_plus"

    def passes(self, model: Facts) -> float:
        """A layer is reached through all before it."""
        layers = int(model.config.get("num_hidden_layers", model.config.get("n_layer", 2)))
        return super().passes(model) * (layers / 2 + 1)


def prepare(job: Job, settings: Settings) -> Prepared:
    """The Gram matrices of every layer, the layers before it merged already; in files in the scratch.

    Nguyen et al. 2025, arXiv:2508.03121, algorithm 1.
    """
    from graft.merge._through import measured

    return measured(job, settings)


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """As RegMean."""
    return regress(tensors, settings)
