"""A run's configuration: typed, documented, and complete.

A recipe (YAML) and dotted command-line overrides fill these models; unknown keys are refused. The configuration, with
its seed, determines the run. *(ours)* marks fields and options for which the paper (arXiv 2605.07394) gives no value.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from balcaprl.config.base import Section
from balcaprl.config.endpoint import EndpointConfig
from balcaprl.config.model import DataConfig, ModelConfig
from balcaprl.config.optimisation import AdvantageConfig, LossConfig, OptimConfig
from balcaprl.config.output import CheckpointConfig, EvaluationConfig, LoggingConfig
from balcaprl.config.reward import RewardConfig
from balcaprl.config.rollout import RolloutConfig


class TrainConfig(Section):
    """A whole run."""

    output_dir: Path = Path("run")
    """Folder of everything the run writes."""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    """Seed of data order, sampling and initialisation."""
    steps: int = Field(200, ge=0)
    """Number of training steps. 0: the run only evaluates."""
    threads: int = Field(0, ge=0, le=10_000)
    """CPU threads of torch; 0: torch's own default."""
    model: ModelConfig = ModelConfig()
    """The policy."""
    data: DataConfig = DataConfig()
    """Images and references."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling."""
    reward: RewardConfig = RewardConfig()
    """Judging."""
    endpoint: EndpointConfig = EndpointConfig()
    """How a judge model is reached."""
    advantage: AdvantageConfig = AdvantageConfig()
    """How rewards become advantages."""
    loss: LossConfig = LossConfig()
    """Policy loss."""
    optim: OptimConfig = OptimConfig()
    """Optimiser."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out evaluation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    logging: LoggingConfig = LoggingConfig()
    """Metrics and completions."""

    @model_validator(mode="after")
    def _allowed_changes_exist(self) -> TrainConfig:
        for name in self.checkpoint.allow_changes:
            section: object = self
            for part in name.split("."):
                if part not in getattr(type(section), "model_fields", {}):
                    raise ValueError(f"checkpoint.allow_changes: there is no field {name}")
                section = getattr(section, part)
        return self

    @model_validator(mode="after")
    def _staleness_is_corrected(self) -> TrainConfig:
        if self.rollout.max_staleness and self.loss.sampling_ratio_cap is None:
            raise ValueError("rollout.max_staleness = 1 needs loss.sampling_ratio_cap, such as 2.0")
        if self.rollout.max_staleness and self.rollout.sampler == "hf":
            raise ValueError("rollout.max_staleness = 1 needs a sampler with weights of its own: vllm or server")
        return self
