"""The records that travel through a training step, in the order in which they are made.

    Sample -> Prompt -> Completion -> RewardBreakdown -> Rollout -> RolloutGroup

Nothing heavy is imported here, so that every other module can import this one.

Worked example, one image, ``group_size = 2``::

    sample = Sample("scene-7", image=..., reference="A red circle is at the top.", instruction="Describe the image.")
    prompt = policy.prepare(sample)                        # prompt_ids (27,), image_inputs of one image
    group, = sampler.generate([prompt], group_size=2, sampling=SamplingConfig(), seed=0)
    group.rollouts[0].completion.text                      # "A red circle is at the left."
    group.rollouts[0].breakdown.precision                  # 0.667 once judged: the place is not true, the rest is
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image

REWARD_NAMES = ("precision", "recall", "linguistic")


class RunStoppedError(RuntimeError):
    """A run cannot or should not go on; the message says why, and what to do."""


class DivergedError(RunStoppedError):
    """The weights, the optimiser or the policy's samples are no longer good to learn from."""


class JudgeStoppedError(RunStoppedError):
    """The judge cannot go on, and neither can the run: no server answers, or the budget is spent."""


class PromptError(ValueError):
    """A sample cannot be made into a prompt; the message says why, and does not name the sample."""


@dataclass(frozen=True)
class Sample:
    """One image with its reference caption, as a dataset yields it."""

    sample_id: str
    """Identifier that is unique in the dataset; it names the sample in logs and errors."""
    load_image: Callable[[], Image.Image]
    """Function that returns the image, decoded, in RGB, within the pixel budget. It may raise ``ImageError``."""
    reference: str
    """The reference caption; never empty."""
    instruction: str
    """What the policy is asked, without the image placeholder."""
    facts: Any = None
    """What is known about the image beyond the reference: for drawn scenes, the scene graph."""
    image_id: str | None = None
    """Identifier of the image, if several samples may show the same one."""

    @property
    def image_identity(self) -> str:
        """Identifier that is the same for all samples of one image."""
        return self.sample_id if self.image_id is None else self.image_id


@dataclass(frozen=True)
class Prompt:
    """A sample made ready for the policy: tokenised once, its image preprocessed once."""

    sample: Sample
    prompt_ids: torch.Tensor
    """LongTensor (P,): the chat-templated prompt, image placeholders expanded."""
    image_inputs: dict[str, torch.Tensor]
    """The processor's image tensors (``pixel_values``, ``image_grid_thw``, ...), for this one prompt."""
    image: Image.Image
    """The decoded image, for samplers that preprocess by themselves."""
    text: str
    """The chat-templated prompt before expansion: one placeholder per image."""


@dataclass(frozen=True)
class Completion:
    """What the sampler returned for one rollout."""

    token_ids: list[int]
    """Sampled ids, the end-of-sequence id included where it was sampled."""
    text: str
    sampling_logprobs: list[float]
    """Log-probability of each id in ``token_ids`` under the distribution that it was sampled from."""
    finished: bool
    """True if the caption ended at an end-of-sequence id or a stop text; False if ``max_completion_tokens`` cut it."""


@dataclass(frozen=True)
class Assertion:
    """One atomic claim of a completion."""

    text: str
    """The claim in a normal form, such as ``red circle: size = large``."""
    spans: tuple[tuple[int, int], ...]
    """Where the completion makes the claim, as half-open character ranges; repetitions are included."""
    verified: bool
    """Whether the claim is true of the image."""
    pointable: bool
    """Whether the claim refers to something visible that can be located."""
    reason: str = ""
    """Reason for the verdict in a few words, if the judge gives one."""

    @property
    def counted(self) -> bool:
        """Whether the precision reward counts the claim."""
        return self.verified and self.pointable


@dataclass(frozen=True)
class ReferenceUnit:
    """One atomic content unit of the reference caption."""

    text: str
    covered: bool


@dataclass(frozen=True)
class RewardBreakdown:
    """A judge's answer for one completion. NaN means that the judge gave no score."""

    precision: float = math.nan
    recall: float = math.nan
    linguistic: float = math.nan
    """Linguistic reward before any length rule."""
    clarity: float = math.nan
    """Grade from 1 to 5, as are ``fluency`` and ``coherence``. With s the mean of the three grades, ``linguistic`` is
    (s - 1) / 4."""
    fluency: float = math.nan
    coherence: float = math.nan
    assertions: tuple[Assertion, ...] = ()
    reference_units: tuple[ReferenceUnit, ...] = ()
    error: str | None = None
    """Why a score is missing, if one is."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Custom rewards by name; NaN where there is no score."""

    @property
    def rewards(self) -> tuple[float, float, float]:
        """The three rewards in the order of ``REWARD_NAMES``."""
        return (self.precision, self.recall, self.linguistic)

    @property
    def b_capscore(self) -> float:
        """Harmonic mean of the three rewards: 0 if one of them is 0, NaN if one is missing."""
        if any(math.isnan(r) for r in self.rewards):
            return math.nan
        if min(self.rewards) <= 0.0:
            return 0.0
        return len(self.rewards) / sum(1.0 / r for r in self.rewards)


@dataclass
class Rollout:
    """A completion and, once it is judged, its scores."""

    completion: Completion
    breakdown: RewardBreakdown | None = None
    length: float = math.nan
    """Length of the completion, in the unit of ``reward.length_unit``."""
    reference_length: float = math.nan
    advantage: float = math.nan

    @property
    def length_ratio(self) -> float:
        """Completion length over reference length."""
        return self.length / self.reference_length if self.reference_length else math.nan


@dataclass
class RolloutGroup:
    """All rollouts of one prompt, in the order in which they were asked for."""

    prompt: Prompt
    rollouts: list[Rollout] = field(default_factory=list)
    policy_version: int | None = None
    """Version of the weights that the group was sampled from; None if the sampler does not know it."""


@dataclass(frozen=True)
class SyncReport:
    """What one weight synchronisation did."""

    strategy: str
    num_tensors: int
    bytes_copied: int
    seconds: float
    policy_version: int
