"""The choice of a sampler by configuration."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from balcaprl.config import TrainConfig
from balcaprl.policy import Policy
from balcaprl.rollout.hf import HFRollout
from balcaprl.rollout.sampler import Sampler


def make_sampler(config: TrainConfig, policy: Policy, folder: Path | None = None) -> Sampler:
    """Make the sampler that ``config.rollout.sampler`` asks for; ``auto`` takes vLLM if it is installed.

    Args:
        config: the configuration, of which only the rollout section is used.
        policy: the policy to sample from.
        folder: the caller's own folder, to which nobody else writes, for files that a sampler has to write; None for a
            temporary folder.

    Raises:
        RuntimeError: ``vllm`` is asked for and not installed; the message says how to install it.
        ValueError: ``rollout.max_staleness`` is set, and the sampler is ``hf``, which has no weights of its own.
    """
    name = config.rollout.sampler
    if name == "auto":
        name = "vllm" if find_spec("vllm") is not None else "hf"
    if name == "hf" and config.rollout.max_staleness:
        missing = "" if config.rollout.sampler == "hf" else ", and vLLM is not installed"
        raise ValueError(
            f"rollout.max_staleness = 1 needs a sampler with weights of its own, vllm or server; hf has none{missing}"
        )
    if name == "vllm":
        from balcaprl.rollout.vllm.rollout import VLLMRollout

        return VLLMRollout(
            policy,
            max_completion_tokens=config.rollout.sampling.max_completion_tokens,
            memory_gib=config.rollout.vllm_memory_gib,
            gpu_memory_utilization=config.rollout.vllm_gpu_memory_utilization,
            sync=config.rollout.sync,
            probe=config.rollout.sync_probe,
            independent=config.rollout.max_staleness > 0,
            sleep=config.rollout.vllm_sleep,
        )
    if name == "server":
        from balcaprl.rollout.server import ServerRollout

        return ServerRollout(
            policy,
            url=config.rollout.server_url,
            weights_dir=config.rollout.server_weights_dir or (None if folder is None else folder / "server-weights"),
            api_key_env=config.rollout.server_api_key_env,
        )
    return HFRollout(policy)
