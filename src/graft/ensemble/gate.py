"""A gate: a mixture's weights that follow the context, from what the members themselves give there.

Features are each member's entropy and the log of its highest probability at the token to be predicted; the token that
comes is never among them. Trained on kept predictions, no model in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from graft.ensemble import linear

STEPS = 200
DECAY = 1e-3
"""Squared size of the gate's weights in the loss: with few examples they stay near those that follow no context."""


class Gate(nn.Module):
    """Weights `[..., members]` that sum to one, from features `[..., 2 · members]`; `hidden` 0: linear."""

    def __init__(self, members: int, hidden: int = 0):
        super().__init__()
        self.hidden = hidden
        self.inner = nn.Sequential(nn.Linear(2 * members, hidden), nn.Tanh()) if hidden else nn.Identity()
        self.outer = nn.Linear(hidden or 2 * members, members)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The members' weights at each place."""
        return self.outer(self.inner(features)).softmax(-1)

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values; `from_plain` is the way back, exact to the bit."""
        state = {name: tensor.detach().cpu().tolist() for name, tensor in self.state_dict().items()}
        return {"hidden": self.hidden, "state": state}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Gate:
        """The gate that `plain` describes."""
        state = {name: torch.tensor(values, dtype=torch.float32) for name, values in plain["state"].items()}
        gate = cls(len(state["outer.bias"]), plain["hidden"])
        gate.load_state_dict(state)
        return gate


def features(log_probs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Entropy (nats) and highest log-probability of each member: `[..., 2 · members]` from `[..., vocabulary]` each."""
    found = [torch.stack([torch.special.entr(each.exp()).sum(-1), each.amax(-1)], -1) for each in log_probs]
    return torch.cat(found, -1)


def fit_gate(
    gold: torch.Tensor,
    inputs: torch.Tensor,
    start: torch.Tensor,
    importance: torch.Tensor,
    *,
    hidden: int = 0,
    seed: int = 0,
) -> Gate:
    """A gate that minimises the mixture's loss, starting from the best constant weights.

    `gold [members, tokens]`: log-probabilities of the tokens that come; `inputs [tokens, 2 · members]`: the features;
    `start [members]`: weights that follow no context; `importance [tokens]`. Never worse on this text than `start`.
    """
    gate = _started(len(start), hidden, start, seed)
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


def _started(members: int, hidden: int, start: torch.Tensor, seed: int) -> Gate:
    """A gate that gives `start` everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = Gate(members, hidden)
    with torch.no_grad():
        gate.outer.weight.zero_()
        gate.outer.bias.copy_(start.clamp(min=1e-4).log())
    return gate


@torch.no_grad()
def _unscaled(gate: Gate, mean: torch.Tensor, spread: torch.Tensor) -> Gate:
    """The same gate for features as they come: what they were scaled by moves into its first layer."""
    first = next(part for part in gate.modules() if isinstance(part, nn.Linear))
    first.weight.div_(spread)
    first.bias.sub_(first.weight @ mean)
    return gate
