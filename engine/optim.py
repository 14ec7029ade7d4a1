"""AdamW over the policy's parameters: schedule, clipping, float32 master weights, and a state without pickle."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from balcaprl.config import OptimConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Learning rate of the update after ``step`` updates, of ``num_steps`` in all."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    falling = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * falling)


class PolicyOptimizer:
    """AdamW with the run's schedule.

    Parameters that are not float32 or float64 are updated through float32 master copies: at these learning rates most
    updates are smaller than bfloat16 can add.

    Args:
        named_parameters: the policy's parameters; frozen ones are left out.
        config: hyperparameters.
        num_steps: updates of the whole run, for the schedule.

    Raises:
        ValueError: if nothing is trainable.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimConfig, num_steps: int
    ) -> None:
        self.config, self.num_steps, self.num_updates = config, num_steps, 0
        self._parameters = {name: p for name, p in named_parameters if p.requires_grad}
        if not self._parameters:
            raise ValueError("the policy has no trainable parameter")
        self._masters = {
            name: p if p.dtype in (torch.float32, torch.float64) else p.detach().float().requires_grad_()
            for name, p in self._parameters.items()
        }
        self._adamw = torch.optim.AdamW(
            self._masters.values(),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )

    def step(self) -> dict[str, float]:
        """One update from the accumulated gradients, which are then cleared.

        A gradient that is not finite changes nothing but the count of updates.

        Returns:
            ``grad_norm`` (before clipping), ``lr``, and ``num_nonfinite_updates``: 1 if the update was refused.
        """
        lr = learning_rate(self.config, self.num_updates, self.num_steps)
        self._hand_over_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self._masters.values(), self.config.max_grad_norm)
        finite = bool(torch.isfinite(norm))
        if finite:
            for group in self._adamw.param_groups:
                group["lr"] = lr
            self._adamw.step()
            self._publish()
        self.zero_grad()
        self.num_updates += 1
        return {"grad_norm": norm.item(), "lr": lr, "num_nonfinite_updates": float(not finite)}

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in (*self._parameters.values(), *self._masters.values()):
            parameter.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that a checkpoint needs beyond the weights, as flat named tensors."""
        tensors = {"num_updates": torch.tensor(self.num_updates)}
        for name, master in self._masters.items():
            for key, value in self._adamw.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = value.detach()
            if master is not self._parameters[name]:
                tensors[f"master.{name}"] = master.detach()
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what ``state`` returned.

        Raises:
            ValueError: if the tensors belong to another set of parameters.
        """
        known = {key.split(".", 1)[1] for key in tensors if "." in key}
        if not known <= self._masters.keys():
            stray = sorted(known - self._masters.keys())[:3]
            raise ValueError(f"the optimiser state is of another model or other frozen parts; unknown: {stray}")
        self.num_updates = int(tensors["num_updates"])
        with torch.no_grad():
            for name, master in self._masters.items():
                if f"master.{name}" in tensors:
                    master.copy_(tensors[f"master.{name}"])
                if f"step.{name}" in tensors:
                    moments = {m: tensors[f"{m}.{name}"].to(master.device).clone() for m in _MOMENTS}
                    self._adamw.state[master] = {"step": tensors[f"step.{name}"].clone(), **moments}

    def _hand_over_gradients(self) -> None:
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float()

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self._parameters.items():
            if self._masters[name] is not parameter:
                parameter.copy_(self._masters[name])
