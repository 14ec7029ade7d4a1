"""From scored rollouts to gradients: select, split into parts, pack, run and accumulate.

If prompts are shared, a prompt and its images go through the model once per group and part; otherwise, a prompt goes
through once per completion. The loss takes the hidden states at the positions that predict a completion token, not
their logits. It divides by a global denominator, so the result depends neither on the split nor on which rollouts
without a gradient are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from balcaprl.config import TrainConfig
from balcaprl.kernels import PolicyLoss, linear_policy_loss, policy_loss
from balcaprl.kernels.support.deferred import raise_pending
from balcaprl.kernels.support.upload import upload
from balcaprl.policy import Group, PackedBatch, Policy
from balcaprl.policy.parts import GroupLengths, Plan, plan_repeated, plan_shared
from balcaprl.policy.policy import Sharing
from balcaprl.training.optim import PolicyOptimizer
from balcaprl.training.reference import Reference
from balcaprl.training.telemetry import PeakMemory
from balcaprl.types import Prompt, Rollout, RolloutGroup, RunStoppedError

_MEANS = ("clip_fraction", "ratio_mean", "kl", "sampling_kl")
LOSS_METRICS = ("loss", *_MEANS, "ratio_max")
_MAX_FIRST_KL, _MAX_FIRST_KL_ROUNDED = 1e-6, 1e-2
"""Largest divergence of a policy from itself that is accepted before the first update, in float32 and in bfloat16. One
side comes from a forward with gradients, the other from one without, and the two may round differently."""
_REFUSALS = ("num_nonfinite_updates", "num_refused_updates")


Members = list[tuple[int, list[int]]]
"""Members of a part, as in ``Plan``: for each group its index, and the indices of its rollouts."""


@dataclass
class UpdatePart:
    """One part of a batch, packed, with its slice of the loss's inputs."""

    members: Members
    packed: PackedBatch
    sampling_logprobs: Tensor
    num_tokens: int
    hidden: Tensor | None = None
    """Hidden states of a forward that was run in advance, until the loss uses them."""
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None


class PolicyUpdate:
    """Updates a policy from batches of scored rollouts.

    Args:
        policy: The policy that is trained.
        optimizer: Optimiser of the policy's parameters.
        config: The run's configuration; ``loss``, ``optim`` and the sampling temperature are used.
        reference: The policy that the divergence is measured from; None if there is no divergence term.
        on_first_logprobs: Function that gets the log-probabilities (T,) of each part's first forward, and the sampler's
            (T,).
        starts_at_reference: Whether training starts from the reference, so that the divergence must be 0 before the
            first update.
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
        """Run the forward of the first part while the batch is still being judged; ``run`` continues from there.

        It is not known yet which rollouts will have an advantage of 0, so this part includes such rollouts.
        """
        plan, sharing = self._plan(groups, [_places_with_tokens(group) for group in groups])
        if plan.parts:
            part = self._pack(groups, plan.parts[0], sharing)
            self._add_reference(part)
            part.hidden = self.policy.hidden_states(part.packed)
            self._begun = groups, part

    def run(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Make ``epochs_per_batch`` updates from one batch; return the metrics of the last update and of the batch.

        Raises:
            RuntimeError: ``begin`` was given another batch.
            DivergedError: too many updates in a row were refused.
            RunStoppedError: the policy does not start at its reference, although it should.
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
        """Pack the batch in parts, and return the parts with metrics.

        The metrics include the number of parts and the number of tokens that go through the model. Rollouts that carry
        no gradient are left out: empty ones and, unless there is a divergence term, those whose advantage is exactly 0.
        Their tokens still count in the global denominator. ``begun`` is the first part, if ``begin`` has made one.
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
        """Indices of the group's rollouts that have a gradient, once their advantages are known."""
        every = _places_with_tokens(group)
        return [j for j in every if self.reference is not None or group.rollouts[j].advantage != 0.0]

    def _plan(
        self, groups: Sequence[RolloutGroup], places: Sequence[Sequence[int]], *, num_begun: int = 0
    ) -> tuple[Plan, Sharing]:
        """Split the given rollouts of each group into parts, and choose the layout in which they are packed.

        ``num_begun`` is the number of parts that exist already.
        """
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
        """Pack the given rollouts into one part, in order."""
        by_group = [(groups[i].prompt, [groups[i].rollouts[j] for j in places]) for i, places in members]
        rollouts = [rollout for _, each in by_group for rollout in each]
        sampling = [value for rollout in rollouts for value in rollout.completion.sampling_logprobs]
        return UpdatePart(
            members=members,
            packed=self.policy.pack([to_policy_group(prompt, each) for prompt, each in by_group], sharing),
            sampling_logprobs=self._uploaded(sampling),
            num_tokens=len(sampling),
        )

    def _add_reference(self, part: UpdatePart) -> None:
        """Compute the reference's log-probabilities, if there is a reference and the part has none yet."""
        if self.reference is not None and part.reference_logprobs is None:
            with torch.no_grad():
                temperature = self.config.rollout.sampling.temperature
                part.reference_logprobs = self.reference.logprobs(part.packed, temperature, exclude_padding=True)

    def _accumulate(
        self, groups: Sequence[RolloutGroup], parts: list[UpdatePart], normalizer: float
    ) -> dict[str, float]:
        """Accumulate the gradients of all parts; return the loss and the token-weighted means of its metrics.

        Raises:
            ValueError: a value that went into the loss is invalid; on a GPU, this is raised after all parts.
        """
        num_tokens = sum(part.num_tokens for part in parts)
        shares = [part.num_tokens / num_tokens for part in parts]
        rows = []
        for part in parts:
            result = self._loss(part, self._advantages(groups, part), normalizer)
            result.loss.backward()
            rows.append(torch.stack([getattr(result, name).detach() for name in LOSS_METRICS]))
        # Read the metrics of all parts at once: on a GPU, each read waits for all work that is queued.
        columns = dict(zip(LOSS_METRICS, torch.stack(rows).double().T.tolist(), strict=True))
        raise_pending()
        means = {name: sum(s * v for s, v in zip(shares, columns[name], strict=True)) for name in _MEANS}
        return {"loss": sum(columns["loss"]), **means, "ratio_max": max(columns["ratio_max"])}

    def _advantages(self, groups: Sequence[RolloutGroup], part: UpdatePart) -> Tensor:
        """Advantages (R,) of the part's rollouts."""
        values = [groups[i].rollouts[j].advantage for i, places in part.members for j in places]
        return self._uploaded(values)

    def _uploaded(self, values: Sequence[float]) -> Tensor:
        return upload([torch.tensor(values, dtype=torch.float32)], self.policy.device)[0]

    def _loss(self, part: UpdatePart, advantages: Tensor, normalizer: float) -> PolicyLoss:
        """Loss of one part; the first forward also keeps the log-probabilities that later epochs need."""
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
        """Global denominator of the loss; it is the same however the batch is split."""
        lengths = [len(r.completion.token_ids) for g in groups for r in g.rollouts]
        if self.config.loss.reduction == "token-mean":
            return float(max(1, sum(lengths)))
        if self.config.loss.reduction == "sequence-mean":
            return float(len(lengths))
        return float(len(lengths) * self.config.rollout.sampling.max_completion_tokens)


def _places_with_tokens(group: RolloutGroup) -> list[int]:
    return [place for place, rollout in enumerate(group.rollouts) if rollout.completion.token_ids]


def to_policy_group(prompt: Prompt, rollouts: Sequence[Rollout]) -> Group:
    """The given rollouts of one prompt, in the form that the policy takes."""
    completions = [torch.tensor(r.completion.token_ids, dtype=torch.long) for r in rollouts]
    return Group(prompt.prompt_ids, completions, prompt.image_inputs, prompt.sample.sample_id)
