"""AdamW over the policy's parameters: schedule, clipping, float32 master weights, guards, and a state without pickle.

An update is checked before it is made. A bound of the norm of what it would add to the parameters is computed from
gradient and moments, and compared with the norm of the policy's weights at the start. An update that is not finite, or
is too large by this comparison, changes nothing. Sound weights therefore stay sound, whatever the learning rate, the
gradient or the moments are.

On CUDA an update takes a few kernel launches (``balcaprl.kernels.adamw_update``); elsewhere, PyTorch's AdamW makes it.
Both work on the same state, so a run can resume with either from the same checkpoint, and an update can fall back from
the kernels to PyTorch's AdamW.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from balcaprl.config import OptimConfig
from balcaprl.kernels import adamw_update
from balcaprl.kernels.adamw.adamw import check_agreement, resolve_impl
from balcaprl.kernels.adamw.records import AdamWNorms, AdamWSettings, AdamWTensors, AdamWUpdate
from balcaprl.types import DivergedError

logger = logging.getLogger(__name__)

_MOMENTS = ("exp_avg", "exp_avg_sq")
_START_NORM = "start_weight_norm"
_CHUNK = 1 << 24
"""Number of a parameter's elements whose update the check computes at once; this bounds the memory of the check."""


class PolicyOptimizer:
    """AdamW with the run's learning rate schedule.

    Parameters that are not float32 or float64 are updated through float32 master copies, because at these learning
    rates most updates are too small to change a bfloat16 weight.

    Args:
        named_parameters: the policy's parameters; frozen ones are left out.
        config: hyperparameters.
        num_steps: number of updates in the whole run, for the schedule.

    Raises:
        ValueError: nothing is trainable, or weights are not finite.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimConfig, num_steps: int
    ) -> None:
        self.config, self.num_steps, self.num_updates = config, num_steps, 0
        self.num_refused_in_a_row = 0
        """Number of updates refused since the last update that was made."""
        every = dict(named_parameters)
        self._parameters = {name: p for name, p in every.items() if p.requires_grad}
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
        self._start_norm = float(total_norm(p for p in every.values() if p.is_floating_point())) or 1.0
        if not math.isfinite(self._start_norm):
            wrong = next((name for name, p in every.items() if not torch.isfinite(p).all()), "the policy as a whole")
            raise ValueError(f"the policy's weights cannot be trained: those of {wrong} are not finite or too large")
        self._fused = self._can_fuse()

    def step(self) -> dict[str, float]:
        """Make one update from the accumulated gradients, and clear them.

        An update that does not pass the guards changes nothing but the count of updates. The guards are
        ``optim.max_update_ratio`` and ``optim.max_weight_growth``; an update with anything that is not finite does not
        pass either.

        Returns:
            ``grad_norm`` (before clipping), ``lr``, ``update_norm``, ``weight_norm``, ``num_nonfinite_updates`` (1 if
            the gradient was not finite, otherwise 0) and ``num_refused_updates`` (1 if the update was refused,
            otherwise 0).

        Raises:
            DivergedError: ``optim.max_refused_updates`` updates in a row were refused.
        """
        lr = self.config.learning_rate(self.num_updates, self.num_steps)
        update = self._measured(lr)
        norms, objection = update.norms, self._objection(update.norms)
        if objection is None:
            update.apply()
        self.zero_grad()
        self.num_updates += 1
        self.num_refused_in_a_row = 0 if objection is None else self.num_refused_in_a_row + 1
        if objection is not None:
            logger.warning("update %d is refused: %s", self.num_updates, objection)
        if self.num_refused_in_a_row >= self.config.max_refused_updates:
            raise DivergedError(
                f"{self.num_refused_in_a_row} updates in a row were refused (optim.max_refused_updates): {objection}"
            )
        return {
            "grad_norm": norms.gradient,
            "lr": lr,
            "update_norm": norms.update,
            "weight_norm": norms.weights,
            "num_nonfinite_updates": float(not math.isfinite(norms.gradient)),
            "num_refused_updates": float(objection is not None),
        }

    def check(self) -> None:
        """Check that weights and moments may be saved as a state to resume from.

        Raises:
            DivergedError: a tensor is not finite (the message names the first), or the weights have grown too far.
        """
        for name, master in self._masters.items():
            state = self._adamw.state.get(master, {})
            for what, tensor in (("weights", master), *((m, state[m]) for m in _MOMENTS if m in state)):
                if not torch.isfinite(tensor).all():
                    raise DivergedError(f"the {what} of {name} are not finite")
        growth = self._growth(float(total_norm(self._masters.values())))
        if growth is not None:
            raise DivergedError(growth)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in (*self._parameters.values(), *self._masters.values()):
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint needs beyond the weights, as flat named tensors.

        Every trained parameter has a ``step.<name>``, which is 0 if the parameter was never updated. A missing entry is
        therefore noticed when the state is loaded.
        """
        tensors = {
            "num_updates": torch.tensor(self.num_updates),
            _START_NORM: torch.tensor(self._start_norm, dtype=torch.float64),
        }
        for name, master in self._masters.items():
            tensors[f"step.{name}"] = torch.tensor(0.0)
            for key, value in self._adamw.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = value.detach()
            if master is not self._parameters[name]:
                tensors[f"master.{name}"] = master.detach()
        return tensors

    def load_state(self, tensors: dict[str, Tensor], *, complete: bool = True) -> None:
        """Restore what ``state`` returned; if that fails, change nothing.

        Args:
            tensors: the tensors that ``state`` returned.
            complete: False for states of earlier versions, which lack ``start_weight_norm`` and leave out parameters
                that were never updated.

        Raises:
            ValueError: the tensors belong to another set of parameters, or one of them is missing, has another shape or
                is not finite; the message names the first such tensor.
        """
        kinds = ("step", "master", *_MOMENTS)
        known = {"num_updates", _START_NORM, *(f"{kind}.{name}" for kind in kinds for name in self._masters)}
        if tensors.keys() - known:
            stray = ", ".join(sorted(tensors.keys() - known)[:3])
            raise ValueError(f"the optimiser state is of another model or other frozen parts; unknown: {stray}")
        for key in ("num_updates", *((_START_NORM,) if complete else ())):
            _check_saved(key, tensors, ())
        for name, master in self._masters.items():
            for key in self._expected_keys(name, tensors, complete):
                _check_saved(key, tensors, () if key.startswith("step.") else master.shape)
        self.num_updates = int(tensors["num_updates"])
        self._start_norm = float(tensors.get(_START_NORM, self._start_norm))
        with torch.no_grad():
            for name, master in self._masters.items():
                if f"master.{name}" in tensors:
                    master.copy_(tensors[f"master.{name}"])
                if float(tensors.get(f"step.{name}", 0.0)):
                    moments = {m: tensors[f"{m}.{name}"].to(master.device).clone() for m in _MOMENTS}
                    self._adamw.state[master] = {"step": tensors[f"step.{name}"].clone(), **moments}

    def _expected_keys(self, name: str, tensors: dict[str, Tensor], complete: bool) -> list[str]:
        """Keys that a state must hold for one parameter, which depend on whether the parameter was ever updated."""
        masters = [f"master.{name}"] if self._masters[name] is not self._parameters[name] else []
        if f"step.{name}" not in tensors and not complete and not any(f"{m}.{name}" in tensors for m in _MOMENTS):
            return masters
        updated = f"step.{name}" not in tensors or bool(tensors[f"step.{name}"].ne(0).any())
        return [*masters, f"step.{name}", *(f"{moment}.{name}" for moment in _MOMENTS if updated)]

    def _measured(self, lr: float) -> AdamWUpdate:
        """The next update, with its norms; it is not made yet."""
        if self._fused:
            try:
                return self._fused_update(lr)
            except Exception as error:  # nothing has changed yet, and PyTorch's AdamW can make it
                self._fall_back(error)
        self._hand_over_gradients()
        return AdamWUpdate(self._norms(lr), lambda: self._plain_update(lr))

    def _can_fuse(self) -> bool:
        """Whether to use the fused kernels; they must first agree with the reference implementation on this device."""
        tensors = [AdamWTensors(p, self._masters[name], None, None, None, 0) for name, p in self._parameters.items()]
        if not self.config.fused or resolve_impl("auto", tensors) != "triton":
            return False
        dtypes = dict.fromkeys(each.parameter.dtype for each in tensors)
        try:
            check_agreement(tensors[0].parameter.device, dtypes, self._settings(self.config.lr), "triton")
        except Exception as error:
            self._fall_back(error)
            return False
        return True

    def _fall_back(self, error: Exception) -> None:
        self._fused = False
        logger.warning(
            "the fused optimiser cannot be used here, PyTorch's AdamW is (optim.fused): %s: %s",
            type(error).__name__,
            error,
        )

    def _settings(self, lr: float) -> AdamWSettings:
        config = self.config
        return AdamWSettings(lr, config.beta1, config.beta2, config.eps, config.weight_decay, config.max_grad_norm)

    @torch.no_grad()
    def _fused_update(self, lr: float) -> AdamWUpdate:
        """The update by the fused kernels, on gradients in their own dtype and on the state of PyTorch's AdamW."""
        states = {}
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                master = self._masters[name]
                states[name] = self._adamw.state.get(master) or {
                    "step": torch.tensor(0.0),
                    **{moment: torch.zeros_like(master) for moment in _MOMENTS},
                }
        counts = [state["step"] for state in states.values()]
        steps = dict(zip(states, torch.stack(counts).tolist() if counts else (), strict=True))
        tensors = []
        for name, parameter in self._parameters.items():
            mean, square = (states[name][moment] if name in states else None for moment in _MOMENTS)
            step = int(steps.get(name, 0))
            tensors.append(AdamWTensors(parameter, self._masters[name], parameter.grad, mean, square, step))
        update = adamw_update(tensors, self._settings(lr), impl="triton")

        def apply() -> None:
            update.apply()
            torch._foreach_add_(counts, 1.0)
            self._adamw.state.update({self._masters[name]: state for name, state in states.items()})

        return AdamWUpdate(update.norms, apply)

    def _plain_update(self, lr: float) -> None:
        """Make the update with PyTorch's AdamW, from gradients that the masters already have, clipped."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._publish()

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

    @torch.no_grad()
    def _norms(self, lr: float) -> AdamWNorms:
        """Clip the gradients, and bound the norm of the update that follows from them; wait for the device once."""
        gradient = torch.nn.utils.clip_grad_norm_(self._masters.values(), self.config.max_grad_norm)
        parts = [
            torch.linalg.vector_norm(update)
            for master in self._masters.values()
            if master.grad is not None and master.numel()
            for update in self._pieces(master, master.grad)
        ]
        weights = total_norm(self._masters.values())
        update = total_norm(parts) if parts else torch.zeros(())
        read = torch.stack([norm.to(weights.device, torch.float32) for norm in (gradient, weights, update)]).tolist()
        return AdamWNorms(read[0], lr * (read[2] + self.config.weight_decay * read[1]), read[1])

    def _pieces(self, master: Tensor, gradient: Tensor) -> Iterator[Tensor]:
        """What AdamW is about to subtract from a parameter at a learning rate of 1, without weight decay, in chunks."""
        config = self.config
        state = self._adamw.state.get(master) or {}
        step = float(state.get("step", 0.0)) + 1
        first, second = 1 - config.beta1**step, math.sqrt(1 - config.beta2**step)
        tensors = [gradient, *(state[moment] for moment in _MOMENTS if moment in state)]
        rows = max(1, _CHUNK // gradient[0].numel()) if gradient.dim() else 1
        for grad, *moments in zip(
            *(tensor.split(rows) if tensor.dim() else (tensor,) for tensor in tensors), strict=True
        ):
            mean = torch.lerp(moments[0], grad, 1 - config.beta1) if moments else grad * (1 - config.beta1)
            square = moments[1] * config.beta2 if moments else torch.zeros_like(grad)
            root = square.addcmul_(grad, grad, value=1 - config.beta2).sqrt_().add_(config.eps * second)
            yield mean.mul_(second / first).div_(root)

    def _objection(self, norms: AdamWNorms) -> str | None:
        """Reason why an update must not be made; None if there is none."""
        config = self.config
        if not math.isfinite(norms.gradient):
            return f"the norm of the gradient is {norms.gradient}"
        if not math.isfinite(norms.weights):
            return f"the norm of the weights is {norms.weights}"
        if not math.isfinite(norms.update):
            return f"its norm is {norms.update}, though the gradient is finite: the optimiser's moments are damaged"
        ratio = norms.update / self._start_norm
        if ratio > config.max_update_ratio:
            return (
                f"its norm is {ratio:.3g} times that of the policy's weights at the start (optim.max_update_ratio is "
                f"{config.max_update_ratio:g}): lower optim.lr, which is {config.lr:g}"
            )
        return self._growth(norms.weights)

    def _growth(self, weight_norm: float) -> str | None:
        """Message if the norm of the trained weights exceeds its bound; None otherwise."""
        growth, limit = weight_norm / self._start_norm, self.config.max_weight_growth
        if growth <= limit:
            return None
        return (
            f"the norm of the trained weights is {growth:.3g} times that of the policy at the start "
            f"(optim.max_weight_growth is {limit:g}): the run diverges; lower optim.lr, which is {self.config.lr:g}"
        )


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all elements of all tensors, as a float32 scalar on the first tensor's device."""
    norms = [
        torch.linalg.vector_norm(tensor.detach(), dtype=torch.promote_types(tensor.dtype, torch.float32)).float()
        for tensor in tensors
    ]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def _check_saved(key: str, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a saved tensor exists, has the given shape and is finite."""
    if key not in tensors:
        raise ValueError(f"the optimiser state lacks {key}")
    tensor = tensors[key]
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"the optimiser state's {key} has shape {tuple(tensor.shape)}, and its parameter {tuple(shape)}"
        )
    if not torch.isfinite(tensor).all():
        raise ValueError(f"the optimiser state's {key} is not finite")
