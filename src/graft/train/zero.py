"""Weights, gradients and optimizer state spread by DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from graft.errors import RequestError
from graft.train.parallel import TOGETHER, Parallel
from graft.train.settings import TrainSettings
from graft.train.zero_parts import hand_over, make_leaves

MOMENTS = ("exp_avg", "exp_avg_sq")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
SWAPPED = ("_parameters", *HOOKS)
"""What of a module DeepSpeed puts things into."""


def configuration(parallel: Parallel, settings: TrainSettings) -> dict[str, Any]:
    """What DeepSpeed is told. Weights and moments stay in fp32, as in graft's own loop."""
    zero: dict[str, Any] = {
        "stage": parallel.spread, "reduce_bucket_size": TOGETHER, "allgather_bucket_size": TOGETHER,
    }  # fmt: skip
    if parallel.spread == 3:
        zero |= {f"stage3_{name}": TOGETHER for name in ("prefetch_bucket_size", "max_live_parameters")}
        zero["stage3_max_reuse_distance"] = 0
    if parallel.offload:
        zero["offload_optimizer"] = {"device": parallel.offload}
        if parallel.spread == 3:
            zero["offload_param"] = {"device": parallel.offload}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": settings.accumulate,
        "gradient_clipping": settings.clip or 0.0,
        "torch_autocast": {"enabled": settings.precision == "bf16", "dtype": "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


class Zero:
    """A model under DeepSpeed, which also averages gradients, clips and steps."""

    def __init__(self, model: nn.Module, parallel: Parallel, settings: TrainSettings, moves: bool = False):
        self.model, self.pieces = model, settings.accumulate
        self.by_hand = moves and parallel.spread == 3
        """Whether this process is given its parts of gradients, rather than DeepSpeed whole ones."""
        self.config = configuration(parallel, settings)
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if single := [name for name, p in model.named_parameters() if p.ndim == 0]:
            raise RequestError(
                f"expected parameters of one dimension or more, found the single number {single[0]} (a learned gate or "
                "scale), which DeepSpeed cannot spread: use `parallel: fsdp`"
            )
        self.numbered: list[nn.Parameter] = []
        self.engine: Any = None

    def begin(self, optimizer: torch.optim.Optimizer, moments: Mapping[str, torch.Tensor]) -> nn.Module:
        """Spread the model, which has its weights, and `optimizer`; what is to be called in the model's place.

        `moments` (by `NUMBER.NAME`): the optimizer's state, if any.
        """
        import deepspeed

        deepspeed.init_distributed(auto_mpi_discovery=False)
        self.numbered = [p for group in optimizer.param_groups for p in group["params"]]
        self.engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=self.config, dist_init_required=False
        )
        self._put(moments)
        if self.by_hand:
            make_leaves(self.numbered)
        return self.engine

    def _put(self, moments: Mapping[str, torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if not moments:
            return
        self._make_states(moments["0.step"])
        self._link()
        for number, parameter in enumerate(self.numbered):
            for name in MOMENTS:
                safe_set_full_optimizer_state(parameter, moments[f"{number}.{name}"].to(self.engine.device), name)

    def _make_states(self, step: torch.Tensor) -> None:
        """The optimizer's state as it is behind `step`, with moments of zero: DeepSpeed makes it in the first step."""
        zero = self.engine.optimizer
        stage_3 = getattr(zero, "fp32_partitioned_groups_flat", None)
        for flat in zero.single_partition_of_fp32_groups if stage_3 is None else stage_3:
            zero.optimizer.state[flat] = {"step": step.clone(), **{name: torch.zeros_like(flat) for name in MOMENTS}}

    def _link(self) -> None:
        """Let parameters of stages 1 and 2 know their moments: DeepSpeed does so for the first group only."""
        zero = self.engine.optimizer
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _states(self) -> list[dict[str, Any]]:
        return list(self.engine.optimizer.optimizer.state.values())

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The groups of parameters, each with its learning rate."""
        return list(self.engine.optimizer.param_groups)

    def backward(self, loss: torch.Tensor) -> None:
        """The gradients of `loss`, of which a mean over the processes is taken; behind the last piece, the step."""
        # DeepSpeed takes the mean over the pieces of a step, the loop their sum
        self.engine.backward(loss * self.pieces)
        if self.by_hand and self.engine.is_gradient_accumulation_boundary():
            hand_over(self.numbered)
        self.engine.step()

    def norm(self) -> torch.Tensor:
        """The norm of the gradient of the last step, before clipping."""
        return torch.as_tensor(float(self.engine.get_global_grad_norm() or 0.0))

    def weights(self) -> dict[str, torch.Tensor]:
        """Trained weights by name, whole, in every process, all of which must ask."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).cpu() for name, p in self.named}

    def moments(self) -> dict[str, torch.Tensor]:
        """The optimizer's state by `NUMBER.NAME`, whole, in every process, all of which must ask."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        found = {}
        steps = [float(state["step"]) for state in self._states() if "step" in state]
        for number, parameter in enumerate(self.numbered) if steps else ():
            found[f"{number}.step"] = torch.tensor(steps[0])
            for name in MOMENTS:
                found[f"{number}.{name}"] = safe_get_full_optimizer_state(parameter, name).cpu()
        return found

    @contextmanager
    def plain(self, here: bool) -> Iterator[None]:
        """Inside, the model has all its weights in the processes that say `here`. All must enter."""
        import deepspeed

        places = [
            (module, name, parameter)
            for module in self.model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        whole: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in dict.fromkeys(parameter for _, _, parameter in places):
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                if here:
                    whole[parameter] = nn.Parameter(parameter.detach().cpu().clone(), parameter.requires_grad)
        held = (
            {module: {name: vars(module)[name] for name in SWAPPED} for module in self.model.modules()} if here else {}
        )
        for module, before in held.items():
            module._parameters = {n: p if p is None else whole[p] for n, p in before["_parameters"].items()}
            for name in HOOKS:
                vars(module)[name] = {key: hook for key, hook in before[name].items() if not _of_deepspeed(hook)}
        try:
            yield
        finally:
            for module, before in held.items():
                vars(module).update(before)

    def release(self) -> None:
        """Leave the model as it came, on the CPU with all its weights, in every process."""
        with self.plain(True):
            whole = {module: dict(module._parameters) for module in self.model.modules()}
        self.engine.destroy()
        for module, parameters in whole.items():
            module._parameters = parameters


def _of_deepspeed(hook: object) -> bool:
    """Whether DeepSpeed hung this hook up."""
    return str(getattr(hook, "__module__", "")).startswith("deepspeed")
