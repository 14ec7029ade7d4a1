"""A run's configuration, each section in a file. Imports pydantic and the standard library only."""

from balcaprl.config.endpoint import EndpointConfig, RequestOptions, ServerConfig
from balcaprl.config.model import DataConfig, ModelConfig
from balcaprl.config.optimisation import AdvantageConfig, LossConfig, OptimConfig
from balcaprl.config.output import CHANGEABLE_FIELDS, STATE_FILE, CheckpointConfig, EvaluationConfig, LoggingConfig
from balcaprl.config.reward import CustomReward, ProtocolConfig, RewardCondition, RewardConfig
from balcaprl.config.rollout import RolloutConfig, SamplingConfig
from balcaprl.config.run import TrainConfig

__all__ = [
    "CHANGEABLE_FIELDS",
    "STATE_FILE",
    "AdvantageConfig",
    "CheckpointConfig",
    "CustomReward",
    "DataConfig",
    "EndpointConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "ProtocolConfig",
    "RequestOptions",
    "RewardCondition",
    "RewardConfig",
    "RolloutConfig",
    "SamplingConfig",
    "ServerConfig",
    "TrainConfig",
]
