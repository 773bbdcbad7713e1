"""A gate: a mixture's weights that follow the context, from what the members themselves give there.

Features are a member's entropy and the log of its highest probability at the token to be predicted, and where that is
wanted its last hidden state; the token that comes is never among them. A gate that looks at some members only decides
before the others are run: whoever gets too little is not run. Trained on kept predictions, no model in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graft.ensemble import linear
from graft.errors import RequestError

STEPS = 200
DECAY = 1e-3
"""Squared size of the gate's weights in the loss: with few examples they stay near those that follow no context."""


class Gate(nn.Module):
    """Weights `[..., members]` that sum to one, from features `[..., inputs]`; `hidden` 0: linear.

    `looks_at`: places of the members whose features it reads, None for all. `states`: whether hidden states are among
    them. A weight of at most `skip` counts as zero, the rest is scaled to one: such a member need not be run.
    """

    def __init__(
        self,
        members: int,
        hidden: int = 0,
        *,
        inputs: int | None = None,
        looks_at: Sequence[int] | None = None,
        states: bool = False,
        skip: float = 0.0,
    ):
        super().__init__()
        self.looks_at = list(range(members)) if looks_at is None else list(looks_at)
        self.hidden, self.states, self.skip = hidden, states, skip
        if not 0 <= skip * members < 1:
            raise RequestError(
                f"expected `skip` from 0 to below {1 / members:.3g}, so that a member is always left, found {skip:g}"
            )
        width = 2 * len(self.looks_at) if inputs is None else inputs
        self.inner = nn.Sequential(nn.Linear(width, hidden), nn.Tanh()) if hidden else nn.Identity()
        self.outer = nn.Linear(hidden or width, members)

    @property
    def skips(self) -> bool:
        """Whether it decides before all members are run."""
        return len(self.looks_at) < self.outer.out_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The members' weights at each place, none of them cut off yet."""
        return self.outer(self.inner(features)).softmax(-1)

    def decide(self, told: Sequence[Told]) -> torch.Tensor:
        """The weights to mix by `[..., members]`, from what the members say that the gate looks at."""
        return self.cut(features([each.log_probs for each in told], [each.state for each in told]))

    def cut(self, seen: torch.Tensor) -> torch.Tensor:
        """The weights to mix by `[..., members]` from features `[..., inputs]`: those of at most `skip` are zero."""
        weights = self(seen.to(self.outer.weight.dtype)).float()
        kept = weights > self.skip
        cut = weights * kept
        return torch.where(kept.all(-1, keepdim=True), weights, cut / cut.sum(-1, keepdim=True))

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values; `from_plain` is the way back, exact to the bit."""
        state = {name: tensor.detach().cpu().tolist() for name, tensor in self.state_dict().items()}
        conduct = {"looks_at": self.looks_at, "states": self.states, "skip": self.skip}
        return {"hidden": self.hidden, **conduct, "state": state}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Gate:
        """The gate that `plain` describes."""
        state = {name: torch.tensor(values, dtype=torch.float32) for name, values in plain["state"].items()}
        hidden, first = plain["hidden"], "inner.0.weight" if plain["hidden"] else "outer.weight"
        conduct = {name: plain[name] for name in ("looks_at", "states", "skip") if name in plain}
        gate = cls(len(state["outer.bias"]), hidden, inputs=state[first].shape[1], **conduct)
        gate.load_state_dict(state)
        return gate


@dataclass(frozen=True)
class Told:
    """What a member says: `log_probs [..., vocabulary] float32` and, where it was asked for, the last hidden `state`
    `[..., channels] float32` that they come from."""

    log_probs: torch.Tensor
    state: torch.Tensor | None = None

    def last(self, count: int) -> Told:
        """Of `[batch, length, …]` the last so many places."""
        if count == self.log_probs.shape[1]:
            return self
        return Told(self.log_probs[:, -count:], None if self.state is None else self.state[:, -count:])


def joined(told: Sequence[Told]) -> Told:
    """What a member said piece by piece, `[batch, length, …]` each, as one."""
    states = [each.state for each in told if each.state is not None]
    return Told(torch.cat([each.log_probs for each in told], 1), torch.cat(states, 1) if states else None)


def last_state(found: Any, name: str) -> torch.Tensor:
    """The hidden state `[..., channels] float32` behind a model's logits, of an output that has them all.

    Raises RequestError naming the member where it gives none.
    """
    states = getattr(found, "decoder_hidden_states", None) or getattr(found, "hidden_states", None)
    if not states:
        raise RequestError(f"member {name!r} gives no hidden states: leave `hidden_states` out of the gate")
    return states[-1].float()


def features(log_probs: Sequence[torch.Tensor], states: Sequence[torch.Tensor | None] = ()) -> torch.Tensor:
    """Entropy (nats) and highest log-probability of each member `[..., 2 · members]` from `[..., vocabulary]` each, and
    behind them the hidden states that are given."""
    found = [torch.stack([torch.special.entr(each.exp()).sum(-1), each.amax(-1)], -1) for each in log_probs]
    return torch.cat([*found, *(state for state in states if state is not None)], -1)


def fit_gate(
    gold: torch.Tensor,
    inputs: torch.Tensor,
    start: torch.Tensor,
    importance: torch.Tensor,
    *,
    hidden: int = 0,
    seed: int = 0,
    **conduct: Any,
) -> Gate:
    """A gate that minimises the mixture's loss, starting from the best constant weights.

    `gold [members, tokens]`: log-probabilities of the tokens that come; `inputs [tokens, inputs]`: the features;
    `start [members]`: weights that follow no context; `importance [tokens]`; `conduct`: `looks_at`, `states` and `skip`
    as of `Gate`. Never worse on this text than `start`, as long as no weight is cut off.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = Gate(len(start), hidden, inputs=inputs.shape[-1], **conduct)
    _start(gate, start)
    mean, spread = inputs.mean(0), inputs.std(0, correction=0).clamp(min=1e-3)
    scaled, share = (inputs - mean) / spread, importance / importance.sum()
    optimizer = torch.optim.LBFGS(gate.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        mixed = linear.combine(list(gold[..., None]), gate(scaled), linear.Settings())[:, 0]
        size = sum(weight.square().sum() for weight in gate.parameters() if weight.dim() > 1)
        found = -(share * mixed).sum() + DECAY * size
        found.backward()
        return found

    optimizer.step(loss)
    return _unscaled(gate, mean, spread)


@torch.no_grad()
def _start(gate: Gate, weights: torch.Tensor) -> None:
    """Makes the gate give `weights` everywhere."""
    gate.outer.weight.zero_()
    gate.outer.bias.copy_(weights.clamp(min=1e-4).log())


@torch.no_grad()
def _unscaled(gate: Gate, mean: torch.Tensor, spread: torch.Tensor) -> Gate:
    """The same gate for features as they come: what they were scaled by moves into its first layer."""
    first = next(part for part in gate.modules() if isinstance(part, nn.Linear))
    first.weight.div_(spread)
    first.bias.sub_(first.weight @ mean)
    return gate
