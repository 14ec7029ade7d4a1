"""balcaprl: balanced reinforcement learning for image captioners.

Importing this package is cheap: ``TrainConfig`` and ``Trainer`` are loaded when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from balcaprl.config import TrainConfig
    from balcaprl.training.trainer import Trainer

__all__ = ["TrainConfig", "Trainer"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "TrainConfig":
        from balcaprl.config import TrainConfig

        return TrainConfig
    if name == "Trainer":
        from balcaprl.training.trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
