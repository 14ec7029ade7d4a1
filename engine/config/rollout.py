"""The section ``rollout``: the sampler and the size of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from balcaprl.config.base import Section


class SamplingConfig(Section):
    """How completions are sampled."""

    temperature: float = Field(1.0, gt=0)
    """Divides the logits, both in sampling and in the loss."""
    max_completion_tokens: int = Field(128, ge=1, le=1_000_000)
    """Longest completion, in tokens; a completion is cut there."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion where one of them appears. The completion's text is cut before it; the tokens are
    kept."""

    @field_validator("stop")
    @classmethod
    def _stops_are_texts(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty text would end every completion before it begins")
        return stop


class RolloutConfig(Section):
    """The sampler and the size of a step."""

    sampler: Literal["auto", "vllm", "hf", "server"] = "auto"
    """``vllm``: vLLM in this process. ``hf``: transformers' generate. ``server``: a vLLM server at ``server_url``.
    ``auto``: vLLM if it is installed, otherwise transformers."""
    server_url: str = ""
    """Address of the sampling server, such as ``http://10.0.0.2:8000``; ``balcaprl/rollout/server.py`` says how to
    start it."""
    server_weights_dir: Path | None = None
    """Folder that this machine writes and the server reads under the same path. Default: a folder inside that of the
    run or evaluation, or the system's temporary folder if an evaluation has none."""
    server_api_key_env: str = ""
    """Name of the environment variable that holds the server's key."""
    prompts_per_step: int = Field(8, ge=1, le=100_000)
    """Number of images per step; each image gives one group of completions."""
    group_size: int = Field(8, ge=1, le=10_000)
    """Completions of each image [G in the paper]. Training compares them with each other, so it needs at least two."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling parameters."""
    sync: Literal["auto", "shared", "inplace", "reload"] = "auto"
    """How vLLM gets new weights. ``shared``: the policy's parameters live in vLLM's tensors, and nothing is copied.
    ``inplace``: one batched copy. ``reload``: vLLM loads the weights again. ``auto``: the first of these that works
    here."""
    sync_probe: Literal["first", "always"] = "first"
    """When a sync also compares a few sampled tokens with the policy, in addition to checking storage and caches.
    ``first``: at the first sync of each engine. ``always``: at every sync. With ``sync: reload``, it is done at every
    sync."""
    vllm_memory_gib: float | None = Field(None, gt=0)
    """Size of vLLM's KV cache, in GiB. Default: derived from the model and the size of a step."""
    vllm_gpu_memory_utilization: float = Field(0.4, gt=0, le=1)
    """Share of a GPU's memory that vLLM may take (ours)."""
    max_staleness: Literal[0, 1] = 0
    """0: sample each step with the newest weights. 1: sample the next step while this one is scored and learnt from,
    with weights that are one update old (ours). 1 needs ``loss.sampling_ratio_cap``, which corrects for the old
    weights, and copies the weights. Such a run does not resume bit for bit."""
    sampling_kl_limit: float = Field(0.2, gt=0)
    """An error is logged when ``sampling_kl`` leaves [-limit, limit], because sampler and trainer then disagree
    (ours)."""
    vllm_sleep: bool = False
    """Release vLLM's KV cache while the policy is updated (GPU only; the weights stay)."""
