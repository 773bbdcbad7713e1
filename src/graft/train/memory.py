"""What training holds in memory, in bytes, from sizes alone: said before it is spent. Light.

Model states by the convention of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1): bytes a parameter for
weights, gradients and optimizer. Activations by what backward needs of each layer of a transformer with fused
attention, as `transformers` computes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

PROCESS = 400 * 2**20
"""Bytes that a process with torch and transformers holds before it holds a model."""


@dataclass(frozen=True)
class Convention:
    """Bytes for each trained parameter."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def whole(self) -> float:
        """All three."""
        return self.weights + self.gradients + self.optimizer


CONVENTIONS = {
    "fp32": Convention(4, 4, 8),
    "mixed": Convention(2, 2, 12),
    "mixed, fp32 gradients": Convention(2, 4, 12),
    "bf16": Convention(2, 2, 4),
    "8-bit optimizer": Convention(2, 2, 2),
}
"""fp32 is that of graft's own loop, autocast included; `mixed` is 2+2+K with K = 12: master weights, two moments."""
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256, "paged_adamw": 0.0, "paged_adamw_8bit": 0.0}
"""Bytes of the moments of a trained parameter on the device: two of 32 bits; or of 8, with a constant of 32 for each
256 (Dettmers et al. 2022, arXiv:2110.02861, section 2); paged ones give way to whatever else needs the room."""
NF4_BYTES = 4.127 / 8
"""A weight in NF4 with double quantisation: 4 bits and 0.127 for its constants (Dettmers et al. 2023, section 3)."""


@dataclass(frozen=True)
class States:
    """Bytes on one device."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """All three."""
        return self.weights + self.gradients + self.optimizer


def model_states(
    parameters: float,
    convention: Convention = CONVENTIONS["mixed"],
    *,
    trained: float | None = None,
    frozen_bytes: float = 2.0,
    stage: Literal[0, 1, 2, 3] = 0,
    devices: int = 1,
    packed: bool = False,
) -> States:
    """Weights, gradients and optimizer state of a model on each of `devices` under ZeRO `stage`.

    `trained` parameters have gradients and optimizer state (None: all); the others lie in `frozen_bytes` each: 2 in
    16 bits, NF4_BYTES in 4. Stage 1 spreads the optimizer's state, 2 the gradients too, 3 (FSDP's full sharding) all,
    but for frozen weights that are `packed`, which stay whole.
    """
    moving = parameters if trained is None else trained
    frozen = (parameters - moving if trained is not None else 0) * frozen_bytes
    parts = devices if stage >= 3 else 1
    weights = moving * convention.weights / parts + frozen / (1 if packed else parts)
    gradients = moving * convention.gradients / (devices if stage >= 2 else 1)
    return States(weights, gradients, moving * convention.optimizer / (devices if stage >= 1 else 1))


@dataclass(frozen=True)
class Dimensions:
    """What of an architecture the size of its activations depends on."""

    width: int
    layers: int
    hidden: int
    """Units of a feed-forward block."""
    values_kept: int
    """Tensors of `hidden` that backward needs: of gate, up and their product, or of one projection and its function."""
    keys: int
    """Key heads × their size."""
    root_mean_square: bool
    """Whether norms are of the kind that transformers computes in steps, each of which backward needs."""
    vocabulary: int = 0

    @property
    def block(self) -> int:
        """Weights of the matrices of one block; of a feed-forward with a gate three."""
        return (
            2 * self.width * (self.width + self.keys) + (3 if self.values_kept == 4 else 2) * self.width * self.hidden
        )

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Dimensions | None:
        """From a configuration of transformers; None where it does not say enough."""

        width, layers = _first(config, WIDTHS), _first(config, LAYERS)
        heads = _first(config, HEADS)
        if not (width and layers and heads):
            return None
        hidden = _first(config, ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim")) or 4 * width
        size = _first(config, ("head_dim",)) or width // heads
        keys = (_first(config, ("num_key_value_heads",)) or heads) * size
        norms = "rms_norm_eps" in config
        return cls(width, layers, hidden, _kept(config), keys, norms, _first(config, ("vocab_size",)) or 0)


WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers")
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads", "encoder_attention_heads")


def _first(config: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((config[name] for name in names if config.get(name)), None)


def _kept(config: Mapping[str, Any]) -> int:
    """Tensors of hidden units that backward needs: a gate, its function, what it gates and the product; or fewer."""
    function = str(_first(config, ("hidden_act", "activation_function", "dense_act_fn", "activation")) or "silu")
    if "rms_norm_eps" in config:
        return 4
    # written out in steps; one that needs its result alone; one kernel with its input
    return {"gelu_new": 5, "gelu_fast": 5, "relu": 1}.get(function, 2)


AT_ONCE, LEAST_AT_ONCE = 1 << 21, 256
"""Logits that a loss has together on the CPU: 8 MB in fp32, which are soon read again; and the fewest positions, with
which products do not wait for the weights that they read (with 64 they take a tenth longer for a vocabulary of 16k)."""
AT_ONCE_ELSEWHERE, LEAST_ELSEWHERE = 1 << 25, 1024
"""Guess: on devices where it costs more to begin a product than to read what it gives."""


def positions_at_once(vocabulary: int, device: str = "cpu") -> int:
    """Positions whose logits a loss has together, on a kind of device, where the model lets it."""
    numbers, least = (AT_ONCE, LEAST_AT_ONCE) if device == "cpu" else (AT_ONCE_ELSEWHERE, LEAST_ELSEWHERE)
    return max(least, numbers // vocabulary)


def activation_bytes(
    known: Dimensions,
    tokens: float,
    *,
    half: bool = False,
    checkpointing: bool = False,
    reads: float | None = None,
    whole: bool = False,
) -> float:
    """What backward needs of `tokens` (rows × length) read together, and what the loss has beside it.

    A layer keeps, a token: six vectors of the width (its inputs, its normalised inputs and those of its projections),
    two more where norms are computed in steps, `values_kept` of the hidden units, keys and values. In half precision
    (`half`) the residual stream and the norms stay in 32 bits, the rest is in 16. With gradient checkpointing each
    layer keeps its input; one layer at a time is whole, once the logits are gone.

    The loss has the logits and log-probabilities of `positions_at_once`, or `whole` logits and their gradient. With
    the former go the gradient of what the logits are made of, and of the weights that do it, if they are trained.

    `reads`: where weights are frozen and nothing is trained beside linear layers, what adapters keep in a layer, in
    numbers a token. Layers then keep no inputs of projections: what the norms read, queries and what attention gives,
    and one of the hidden units' tensors less.
    """
    width, steps = known.width, known.root_mean_square
    if reads is not None:
        wide, narrow = 2 * width, 2 * width + (known.values_kept - 1) * known.hidden + 2 * known.keys + reads
    elif half:
        wide = (4 if steps else 2) * width
        narrow = (8 if steps else 5) * width + known.values_kept * known.hidden + 2 * known.keys
    else:
        wide, narrow = 0, (8 if steps else 6) * width + known.values_kept * known.hidden + 2 * known.keys
    layer = 4 * wide + (2 if half else 4) * narrow
    inputs = 4 * width
    if whole:
        kept, loss = 0.0, tokens * (2 if half else 4) * known.vocabulary * 2
    else:
        kept = 0.0 if reads is not None else 4 * known.vocabulary * width
        loss = 8 * known.vocabulary * min(tokens, positions_at_once(max(1, known.vocabulary))) + tokens * inputs
    if checkpointing:
        return kept + tokens * inputs * (known.layers + 3) + max(tokens * layer, loss)
    return kept + tokens * (layer * known.layers + 3 * inputs) + loss
