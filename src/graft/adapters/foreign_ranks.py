"""AdaLoRA (Zhang et al. 2023): peft takes ranks away while graft trains, and only those that are left are saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graft.adapters.companion import Companion
from graft.errors import RequestError

NAME = "graft_ranks"
"""The module of a model under which `Ranks` stands."""


def with_steps(settings: Mapping[str, Any]) -> dict[str, Any]:
    """AdaLoRA's settings with a `total_step`, which is a stand-in till the training tells, where none is given.

    Raises RequestError where no phase is left in which ranks go, or none could go.
    """
    tinit, tfinal = settings.get("tinit", 0), settings.get("tfinal", 0)
    total = settings.get("total_step")
    if total is not None:
        _check_phases(tinit, tfinal, total, "found")
    start, target = settings.get("init_r", 12), settings.get("target_r", 8)
    if target >= start:
        raise RequestError(f"peft: ADALORA expected a `target_r` below `init_r`, found {target} and {start}")
    return {**settings, "total_step": tinit + tfinal + 2 if total is None else total}


def _check_phases(tinit: int, tfinal: int, total: int, found: str) -> None:
    if tinit >= total - tfinal or total - tfinal < 2:
        raise RequestError(
            f"peft: ADALORA expected tinit + tfinal < total_step, and two steps before the last tfinal, {found} tinit "
            f"{tinit}, tfinal {tfinal} and {total} steps: lower `tinit` and `tfinal`, or train longer"
        )


class Ranks(Companion):
    """peft's rank allocator over a training, and the term that keeps both factors orthogonal.

    Its running statistics, and what is left once ranks are settled, are buffers.
    """

    settled: torch.Tensor
    wrapper: Any
    settings: dict[str, Any]
    config: Any

    def __init__(self, wrapper: Any, settings: dict[str, Any]):
        """`settings`: those that are saved with the adapter, which get their `total_step` from the training."""
        super().__init__()
        self.__dict__["wrapper"] = wrapper  # it holds the model, which is no part of its part
        self.settings = settings
        self.config = wrapper.peft_config[wrapper.active_adapter]
        named = dict(wrapper.base_model.model.named_parameters())
        self.names = [name for name in named if "lora_" in name and wrapper.active_adapter in name]
        for number, name in enumerate(self.names):
            zeros = torch.zeros_like(named[name], dtype=torch.float32, requires_grad=False)
            self.register_buffer(f"importance{number}", zeros, persistent=False)
            self.register_buffer(f"uncertainty{number}", zeros.clone(), persistent=False)
            if ".lora_E." in name:
                left = torch.ones_like(named[name], dtype=torch.bool, requires_grad=False)
                self.register_buffer(f"left{number}", left, persistent=False)
        self.register_buffer("settled", torch.zeros((), dtype=torch.bool), persistent=False)
        self.over: bool | None = None

    def begin(self, steps: int) -> None:
        """Take the training's number of steps where the user gave none. Raises RequestError where it is too low."""
        if self.settings.get("total_step") is None:
            _check_phases(self.config.tinit, self.config.tfinal, steps, "found a training with")
            self.config.total_step = self.settings["total_step"] = steps

    def penalty(self) -> torch.Tensor | None:
        """`orth_reg_weight` times the mean of ‖AAᵀ − 1‖ and ‖BᵀB − 1‖ (Frobenius) over all matrices, in fp32."""
        if self.config.orth_reg_weight == 0:
            return None
        weights = self._parameters_by_name()
        factors = [weights[n].float() if ".lora_A." in n else weights[n].float().T
                   for n in self.names if ".lora_E." not in n]  # fmt: skip
        products = torch.stack([factor @ factor.T for factor in factors])
        away = products - torch.eye(products.shape[-1], device=products.device)
        return self.config.orth_reg_weight * torch.linalg.vector_norm(away, dim=(1, 2)).mean()

    @torch.no_grad()
    def stepped(self, step: int) -> None:
        """Let peft weigh the ranks and take away those beyond the step's budget; what is settled stays away."""
        if self.over is None:
            self.over = bool(self.settled)
        weights = self._parameters_by_name()
        if self.over:
            for name, left in self._left(weights):
                weights[name].masked_fill_(~left, 0.0)
            return
        for name in self.names:  # not reached by the loss, or beyond the range of fp16
            p = weights[name]
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.nan_to_num_(0.0, 0.0, 0.0)
        last = self.config.total_step - self.config.tfinal
        allocator = self.wrapper.base_model.rankallocator
        held = {name: (getattr(self, f"importance{n}"), getattr(self, f"uncertainty{n}"))
                for n, name in enumerate(self.names)}  # fmt: skip
        allocator.exp_avg_ipt = {name: pair[0] for name, pair in held.items()}
        allocator.exp_avg_unc = {name: pair[1] for name, pair in held.items()}
        allocator.ipt = dict(allocator.exp_avg_ipt)
        # a step without labels may have been passed over: the last one before the end is made up for
        self.wrapper.base_model.update_and_allocate(min(step, last))
        if step < last:
            for name, (importance, uncertainty) in held.items():
                importance.copy_(allocator.exp_avg_ipt[name])
                uncertainty.copy_(allocator.exp_avg_unc[name])
        else:
            self._settle(weights)

    def _settle(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, left in self._left(weights):
            left.copy_(torch.tensor(self.config.rank_pattern[name]).view_as(left))
        self.settled.fill_(True)
        self.over = True

    def _left(self, weights: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        return [(name, getattr(self, f"left{n}")) for n, name in enumerate(self.names) if ".lora_E." in name]

    def _parameters_by_name(self) -> dict[str, torch.nn.Parameter]:
        found = dict(self.wrapper.base_model.model.named_parameters())
        return {name: found[name] for name in self.names}


def note_ranks(wrapper: Any) -> None:
    """Tell peft, which saves only what is left, which singular values are not zero."""
    config, adapter = wrapper.peft_config[wrapper.active_adapter], wrapper.active_adapter
    pattern = {}
    for name, values in wrapper.base_model.model.named_parameters():
        if f".lora_E.{adapter}" in name:
            # what was loaded has none but those that were left
            there = values.flatten() != 0 if len(values) == config.init_r else torch.ones(len(values), dtype=torch.bool)
            pattern[name.replace(f".{adapter}", "")] = there.tolist() + [False] * (config.init_r - len(values))
    config.rank_pattern = pattern


def expect_ranks(wrapper: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Tell peft how many ranks the saved `weights` have in each place."""
    config = wrapper.peft_config[wrapper.active_adapter]
    config.rank_pattern = {
        name.removeprefix("base_model.model."): [number < len(value) for number in range(config.init_r)]
        for name, value in weights.items()
        if name.endswith(".lora_E")
    }
