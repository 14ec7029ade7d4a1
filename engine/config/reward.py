"""The section ``reward``: judges, weights, the length rule, custom rewards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from balcaprl.config.base import Section
from balcaprl.types import REWARD_NAMES


class ProtocolConfig(Section):
    """What a judge model is asked, and in what form. This is fixed for a run, and part of every cache key."""

    model: str = ""
    """Name of the judge model. A server that uses another name for it sets ``model`` in ``endpoint.servers``."""
    calls: Literal["separate", "combined"] = "separate"
    """``separate``: three calls, for precision with the image, for recall without it, and for language; if one fails,
    the others still count. ``combined``: one call for all three (ours)."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature of the judge."""
    max_reply_tokens: int = Field(4096, ge=16)
    """Longest reply of the judge, in tokens."""
    response_format: Literal["json_schema", "json_object"] = "json_schema"
    """How replies are constrained; ``json_object`` is for servers that do not support schemas. Replies are validated in
    any case."""
    integer_scores: bool = True
    """Grade language in whole numbers; if false, fractions such as 3.5 are accepted too."""
    max_items: int = Field(96, ge=1, le=512)
    """Most assertions or units that a reply may list."""
    max_text_chars: int = Field(400, ge=8, le=4000)
    """Longest text of one assertion, quotation, reason or unit, in characters."""
    max_caption_chars: int = Field(20_000, ge=100)
    """Most characters of a caption that the judge sees; the rest of a longer caption is left out."""
    image_max_pixels: int = Field(1_003_520, ge=784)
    """Images with more pixels are shrunk before they are sent."""
    image_format: Literal["jpeg", "png"] = "jpeg"
    """Format in which images are sent; JPEG has quality 90. Every image is encoded again, which removes its
    metadata."""
    disable_thinking: bool = False
    """Ask the chat template for a reply without a chain of thought (``enable_thinking: false``)."""


class CustomReward(Section):
    """A further reward beside precision, recall and linguistic."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Name of the reward in logs and in ``reward.conditions``."""
    source: str
    """``questions`` (CapRL) or ``rubric`` (RubiCap): the judge model scores the caption by the sample's ``facts``. Any
    other value names a Python function: ``package.module:function``, ``path/file.py:function``, or an entry point of
    the group ``balcaprl.rewards``."""
    weight: float = Field(1.0, ge=0)
    """Weight of this reward's normalised score."""
    mask: bool = False
    """Apply the length mask to this reward, as to the linguistic reward."""
    timeout_s: float = Field(300.0, gt=0)
    """Seconds after which a call of a Python function counts as failed. Until that call returns, no other call is made
    (ours)."""


class RewardCondition(Section):
    """A reward that counts only where another reward is good enough [GDPO's conditioned reward]."""

    reward: str
    """The reward that becomes 0 where the condition fails, and missing where the condition cannot be decided."""
    on: str
    """The reward that the condition looks at, as the judge gave it, before any length rule."""
    at_least: float
    """Lowest value of the reward ``on`` at which the condition holds."""


class RewardConfig(Section):
    """The judge, the weights of the rewards and the length rule."""

    judge: Literal["auto", "scene", "lexical", "endpoint", "none"] = "auto"
    """``scene``: exact judge of drawn scenes. ``lexical``: word overlap with the reference, a proxy, for English only.
    ``endpoint``: a judge model behind ``endpoint.servers``. ``none``: only ``custom`` rewards. ``auto``: chosen by the
    kind of data."""
    protocol: ProtocolConfig = ProtocolConfig()
    """What the endpoint judge is asked."""
    custom: list[CustomReward] = Field([])
    """Further rewards beside precision, recall and linguistic."""
    conditions: list[RewardCondition] = Field([])
    """Rewards that count only where another reward is good enough."""
    precision_weight: float = Field(1.0, ge=0)
    """Weight of the precision reward's normalised score."""
    recall_weight: float = Field(1.0, ge=0)
    """Weight of the recall reward's normalised score."""
    linguistic_weight: float = Field(1.0, ge=0)
    """Weight of the linguistic reward's normalised score."""
    length_rule: Literal["mask", "linear", "none"] = "mask"
    """What the length ratio does to the linguistic reward. ``mask``: the reward is 0 outside [tau_low, tau_high].
    ``linear`` (ours): the reward is multiplied by max(0, 1 - |1 - ratio|). ``none``: nothing."""
    tau_low: float = Field(0.5, ge=0)
    """Lowest length ratio at which the linguistic reward counts."""
    tau_high: float = Field(2.0, gt=0)
    """Highest length ratio at which the linguistic reward counts."""
    length_unit: Literal["words", "tokens"] = "words"
    """Unit of completion and reference lengths (ours). ``words``: words as Unicode counts them, in any language.
    ``tokens``: tokens of the policy."""
    required_share: float = Field(0.5, ge=0, le=1)
    """Share of a step's captions for which each reward with a weight must give a score. After three steps in a row
    below this share, the run ends (ours). Lower it for a reward that is meant for only some of the images."""
    max_flat_steps: int = Field(10, ge=0)
    """Number of steps in a row after which the run ends, if in each of them all completions of an image have the same
    reward, for every image (ours); 0: the run never ends for this reason. Raise it for small steps with rare
    rewards."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> RewardConfig:
        if self.tau_low > self.tau_high:
            raise ValueError(f"reward.tau_low ({self.tau_low}) exceeds reward.tau_high ({self.tau_high})")
        return self

    @model_validator(mode="after")
    def _names_are_known(self) -> RewardConfig:
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"reward.custom: names must differ from each other and from {', '.join(REWARD_NAMES)}")
        for condition in self.conditions:
            for name in (condition.reward, condition.on):
                if name not in self.names:
                    raise ValueError(
                        f"reward.conditions: no reward is called {name!r}; there are {', '.join(self.names)}"
                    )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The K rewards of this run: the three of ``REWARD_NAMES``, then those of ``custom``."""
        return (*REWARD_NAMES, *(custom.name for custom in self.custom))

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the rewards, in the order of ``names``."""
        return (
            self.precision_weight,
            self.recall_weight,
            self.linguistic_weight,
            *(custom.weight for custom in self.custom),
        )
