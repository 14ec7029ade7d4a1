"""From scored rollouts to gradients: choose, cut into parts, pack, run, add up.

A prompt goes through the model once per group and part, its images once; hidden states are taken where a completion token
is predicted, and go to the loss without logits. The loss divides by a global denominator: neither the cut nor what is left
out changes the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from balcaprl.config import TrainConfig
from balcaprl.kernels import PolicyLoss, linear_policy_loss, policy_loss
from balcaprl.optim import PolicyOptimizer
from balcaprl.policy import Group, PackedBatch, Policy
from balcaprl.policy.parts import GroupLengths, Plan, plan_repeated, plan_shared
from balcaprl.policy.policy import Sharing
from balcaprl.reference import Reference
from balcaprl.types import Prompt, Rollout, RolloutGroup, RunStoppedError

_MEANS = ("clip_fraction", "ratio_mean", "kl", "sampling_kl")
LOSS_METRICS = ("loss", *_MEANS, "ratio_max")
_MAX_FIRST_KL, _MAX_FIRST_KL_ROUNDED = 1e-6, 1e-2
"""Divergence of a policy from itself, by its forwards with and without gradients: in float32, and rounded to bfloat16."""
_REFUSALS = ("num_nonfinite_updates", "num_refused_updates")


Members = list[tuple[int, list[int]]]
"""(group, its rollouts) of a part, as ``Plan`` has them."""


@dataclass
class UpdatePart:
    """One part of a batch, packed, with its slice of what the loss needs."""

    members: Members
    packed: PackedBatch
    sampling_logprobs: Tensor
    num_tokens: int
    hidden: Tensor | None = None
    """Of a forward that is made and waits for its loss."""
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None


class PolicyUpdate:
    """Updates a policy from batches of scored rollouts.

    Args:
        policy: What is trained.
        optimizer: Of its parameters.
        config: The run's; ``loss``, ``optim`` and the sampling temperature count.
        reference: What the divergence is measured from, if it is.
        on_first_logprobs: Called with the log-probabilities (T,) of each part's first forward, and the sampler's (T,).
        starts_at_reference: The reference is what training starts from: there must be no divergence before the first update.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: PolicyOptimizer,
        config: TrainConfig,
        reference: Reference | None = None,
        on_first_logprobs: Callable[[Tensor, Tensor], None] | None = None,
        *,
        starts_at_reference: bool = False,
    ) -> None:
        self._starts_at_reference = starts_at_reference
        self.policy, self.optimizer, self.config = policy, optimizer, config
        self.reference, self._on_first_logprobs = reference, on_first_logprobs
        self._begun: tuple[Sequence[RolloutGroup], UpdatePart] | None = None

    def begin(self, groups: Sequence[RolloutGroup]) -> None:
        """Make the first part's forward while the batch is still being judged; ``run`` goes on from there.

        Which of its rollouts will have an advantage of 0 is not known yet: those of this part take part.
        """
        plan, sharing = self._plan(groups, [_places_with_tokens(group) for group in groups])
        if plan.parts:
            part = self._pack(groups, plan.parts[0], sharing)
            self._add_reference(part)
            part.hidden = self.policy.hidden_states(part.packed)
            self._begun = groups, part

    def run(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """``epochs_per_batch`` updates from one batch; the metrics of the last, and of the batch.

        Raises:
            RuntimeError: ``begin`` was given another batch.
            DivergedError: too many updates in a row were refused.
            RunStoppedError: the policy does not start at its reference, and should.
        """
        peak = PeakMemory(self.policy.device)
        begun_of, begun = self._begun or (groups, None)
        self._begun = None
        if begun_of is not groups:
            raise RuntimeError(
                "groups: the forward that was begun is of another batch; begin and run take the same list"
            )
        epochs = self.config.optim.epochs_per_batch
        if not any(self._places(group) for group in groups):
            # Nothing to learn from: an update would only follow old momentum.
            unknown = dict.fromkeys((*LOSS_METRICS, "grad_norm", "lr", "update_norm", "weight_norm"), math.nan)
            return {**unknown, "num_skipped_updates": float(epochs), **dict.fromkeys(_REFUSALS, 0.0)}
        parts, batch_metrics = self.pack_parts(groups, begun)
        normalizer = self._normalizer(groups)
        updates = [self._one_update(groups, parts, normalizer) for _ in range(epochs)]
        counts = {"num_skipped_updates": 0.0, **{name: sum(update[name] for update in updates) for name in _REFUSALS}}
        return {**updates[-1], **counts, **batch_metrics, "memory/update_peak_gib": peak.gib()}

    def _one_update(
        self, groups: Sequence[RolloutGroup], parts: list[UpdatePart], normalizer: float
    ) -> dict[str, float]:
        losses = self._accumulate(groups, parts, normalizer)
        if self._starts_at_reference and not self.optimizer.num_updates:
            self._refuse_divergence(losses["kl"])
        return losses | self.optimizer.step()

    def _refuse_divergence(self, kl: float) -> None:
        exact = self.policy.dtype in (torch.float32, torch.float64) and self.policy.autocast_dtype is None
        if self.reference is not None and kl > (_MAX_FIRST_KL if exact else _MAX_FIRST_KL_ROUNDED):
            raise RunStoppedError(
                f"loss.kl_coef: before the first update the divergence of the policy from its reference is {kl:.3g}, where the "
                "two should be the same model: the reference is not what training starts from"
            )

    def pack_parts(
        self, groups: Sequence[RolloutGroup], begun: UpdatePart | None = None
    ) -> tuple[list[UpdatePart], dict[str, float]]:
        """The batch in parts, and what they say of it: how many, and the tokens that go through the model.

        Rollouts that carry no gradient are left out: empty ones, and, unless the divergence term is on, those whose advantage
        is exactly 0. Their tokens still count in the global denominator. ``begun`` is the first part if there is one.
        """
        taken = {index: set(places) for index, places in begun.members} if begun else {}
        left = [
            [place for place in self._places(group) if place not in taken.get(index, ())]
            for index, group in enumerate(groups)
        ]
        plan, sharing = self._plan(groups, left, num_begun=int(begun is not None))
        first = [] if begun is None else [begun]
        parts = first + [self._pack(groups, members, sharing) for members in plan.parts]
        metrics = {
            "num_parts": float(len(parts)),
            "num_split_groups": float(Plan([part.members for part in parts]).num_split_groups),
            "shared_prompts": float(all(part.packed.prefix_layout is not None for part in parts)),
            "forward_tokens": float(sum(part.packed.num_forward_tokens for part in parts)),
        }
        return parts, metrics

    def _places(self, group: RolloutGroup) -> list[int]:
        """The rollouts of a group that have a gradient, once their advantages are known."""
        every = _places_with_tokens(group)
        return [j for j in every if self.reference is not None or group.rollouts[j].advantage != 0.0]

    def _plan(
        self, groups: Sequence[RolloutGroup], places: Sequence[Sequence[int]], *, num_begun: int = 0
    ) -> tuple[Plan, Sharing]:
        """How the given rollouts of each group are cut, beside parts that have begun, and in which layout they are packed."""
        settings = self.config.optim
        lengths = [
            GroupLengths(
                prompt=len(group.prompt.prompt_ids),
                completions={place: len(group.rollouts[place].completion.token_ids) for place in of_group},
                name=group.prompt.sample.sample_id,
            )
            for group, of_group in zip(groups, places, strict=True)
        ]
        shares = self.policy.shares_prompts(
            [each.prompt for each in lengths],
            [list(each.completions.values()) for each in lengths],
            settings.prompt_sharing,
        )
        cut = plan_shared if shares else plan_repeated
        count = max(1, settings.accumulation_steps - num_begun)
        return cut(lengths, count, settings.token_budget), "shared" if shares else "repeated"

    def _pack(self, groups: Sequence[RolloutGroup], members: Members, sharing: Sharing) -> UpdatePart:
        """One part: the given rollouts, in order."""
        by_group = [(groups[i].prompt, [groups[i].rollouts[j] for j in places]) for i, places in members]
        rollouts = [rollout for _, each in by_group for rollout in each]
        sampling = [value for rollout in rollouts for value in rollout.completion.sampling_logprobs]
        return UpdatePart(
            members=members,
            packed=self.policy.pack([to_policy_group(prompt, each) for prompt, each in by_group], sharing),
            sampling_logprobs=torch.tensor(sampling, dtype=torch.float32, device=self.policy.device),
            num_tokens=len(sampling),
        )

    def _add_reference(self, part: UpdatePart) -> None:
        """The reference's log-probabilities, if the part has none yet."""
        if self.reference is not None and part.reference_logprobs is None:
            with torch.no_grad():
                temperature = self.config.rollout.sampling.temperature
                part.reference_logprobs = self.reference.logprobs(part.packed, temperature, exclude_padding=True)

    def _accumulate(
        self, groups: Sequence[RolloutGroup], parts: list[UpdatePart], normalizer: float
    ) -> dict[str, float]:
        """Gradients of all parts; returns the loss and the token-weighted means of its metrics."""
        num_tokens = sum(part.num_tokens for part in parts)
        shares = [part.num_tokens / num_tokens for part in parts]
        rows = []
        for part in parts:
            result = self._loss(part, self._advantages(groups, part), normalizer)
            result.loss.backward()
            rows.append(torch.stack([getattr(result, name).detach() for name in LOSS_METRICS]))
        # One read for all parts: on a GPU each would wait for what is queued.
        columns = dict(zip(LOSS_METRICS, torch.stack(rows).double().T.tolist(), strict=True))
        means = {name: sum(s * v for s, v in zip(shares, columns[name], strict=True)) for name in _MEANS}
        return {"loss": sum(columns["loss"]), **means, "ratio_max": max(columns["ratio_max"])}

    def _advantages(self, groups: Sequence[RolloutGroup], part: UpdatePart) -> Tensor:
        """(R,) of the part's rollouts."""
        values = [groups[i].rollouts[j].advantage for i, places in part.members for j in places]
        return torch.tensor(values, dtype=torch.float32, device=self.policy.device)

    def _loss(self, part: UpdatePart, advantages: Tensor, normalizer: float) -> PolicyLoss:
        """The loss of one part; its first forward leaves behind what later epochs need."""
        settings = self.config.loss
        self._add_reference(part)
        is_first = part.old_logprobs is None
        logprobs = torch.empty_like(part.sampling_logprobs)
        hidden, part.hidden = part.hidden, None
        if hidden is None:
            hidden = self.policy.hidden_states(part.packed)
        temperature, head = self.config.rollout.sampling.temperature, self.policy.sampled_head
        options: dict[str, Any] = {
            "clip_low": settings.clip_low,
            "clip_high": settings.clip_high,
            "sampling_logprobs": part.sampling_logprobs,
            "sampling_ratio_cap": settings.sampling_ratio_cap,
            "reference_logprobs": part.reference_logprobs,
            "kl_coef": settings.kl_coef,
            "reduction": settings.reduction,
            "normalizer": normalizer,
        }
        batch = (part.old_logprobs, advantages, part.packed.cu_seqlens)
        with self.policy.autocast():
            if head.is_linear:
                rows = (*head.folded(hidden), part.packed.targets)
                result = linear_policy_loss(*rows, *batch, temperature=temperature, logprobs_out=logprobs, **options)
            else:
                current = head.logprobs(hidden, part.packed.targets, temperature)
                logprobs.copy_(current.detach())
                result = policy_loss(current, *batch, **options)
        if is_first and self._on_first_logprobs is not None:
            self._on_first_logprobs(logprobs, part.sampling_logprobs)
        if is_first and self.config.optim.epochs_per_batch > 1:
            part.old_logprobs = logprobs
        return result

    def _normalizer(self, groups: Sequence[RolloutGroup]) -> float:
        """The global denominator of the loss, the same however the batch is split."""
        lengths = [len(r.completion.token_ids) for g in groups for r in g.rollouts]
        if self.config.loss.reduction == "token-mean":
            return float(max(1, sum(lengths)))
        if self.config.loss.reduction == "sequence-mean":
            return float(len(lengths))
        return float(len(lengths) * self.config.rollout.sampling.max_completion_tokens)


def _places_with_tokens(group: RolloutGroup) -> list[int]:
    return [place for place, rollout in enumerate(group.rollouts) if rollout.completion.token_ids]


def to_policy_group(prompt: Prompt, rollouts: Sequence[Rollout]) -> Group:
    """What the policy needs of some rollouts of one prompt."""
    completions = [torch.tensor(r.completion.token_ids, dtype=torch.long) for r in rollouts]
    return Group(prompt.prompt_ids, completions, prompt.image_inputs, prompt.sample.sample_id)


class PeakMemory:
    """The most memory in use since it was made: of PyTorch's allocator on CUDA, else of this process.

    Linux keeps the peak of a process, and forgets it when asked; elsewhere the present memory stands for it.
    """

    _CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):
                self._CLEAR.write_text("5")

    def gib(self) -> float:
        """In GiB."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        with suppress(OSError, StopIteration):
            line = next(x for x in self._STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
            return int(line.split()[1]) / 2**20
        return psutil.Process().memory_info().rss / 2**30
