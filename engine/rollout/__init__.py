"""Samplers: in-process vLLM, and transformers as the fallback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from balcaprl.rollout.hf import HFRollout
from balcaprl.rollout.sampler import Sampler, make_sampler

if TYPE_CHECKING:
    from balcaprl.rollout.vllm.rollout import VLLMRollout

__all__ = ["HFRollout", "Sampler", "VLLMRollout", "make_sampler"]


def __getattr__(name: str) -> Any:
    if name == "VLLMRollout":
        from balcaprl.rollout.vllm.rollout import VLLMRollout

        return VLLMRollout
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
