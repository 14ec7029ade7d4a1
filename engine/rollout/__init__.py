"""Samplers (vLLM in this process, a vLLM server, transformers' own model), and the prompts that they take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from balcaprl.rollout.hf import HFRollout
from balcaprl.rollout.registry import make_sampler
from balcaprl.rollout.sampler import Sampler

if TYPE_CHECKING:
    from balcaprl.rollout.vllm.rollout import VLLMRollout

__all__ = ["HFRollout", "Sampler", "VLLMRollout", "make_sampler"]


def __getattr__(name: str) -> Any:
    if name == "VLLMRollout":
        from balcaprl.rollout.vllm.rollout import VLLMRollout

        return VLLMRollout
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
