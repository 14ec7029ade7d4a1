"""Computes how much memory a sampler's KV cache needs, and checks that this much is available."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from balcaprl.policy import Policy

_BLOCK = 128
"""Tokens per block of vLLM's KV cache on a CPU; blocks on a GPU are smaller."""
_LARGEST_SHARE = 0.5
"""Largest share of the free memory that a derived budget may take on a CPU."""


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Compute how many bytes the keys and values of one token take in all layers.

    Args:
        config: a transformers model configuration.
        dtype: the data type of the cache.
    """
    text = config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * text.num_hidden_layers * num_kv_heads * head_size * dtype.itemsize


def kv_cache_budget(
    policy: Policy,
    *,
    max_model_len: int,
    num_completions: int,
    memory_gib: float | None,
    gpu_memory_utilization: float,
) -> int:
    """Compute the size of a KV cache, in bytes.

    Without ``memory_gib``, the cache is sized for ``num_completions`` completions of full length, each with its own
    prompt. This is more than enough, because a group shares its prefix. The size is limited by the free memory (on a
    CPU, to half of it) and by ``gpu_memory_utilization``; completions that do not fit at once are sampled later.

    Args:
        policy: the policy whose keys and values are kept.
        max_model_len: longest prompt with its completion, in tokens.
        num_completions: number of completions that are decoded at once.
        memory_gib: fixed size in GiB; None derives the size.
        gpu_memory_utilization: largest share of a GPU's memory that a derived size may take.

    Raises:
        ValueError: not even one completion fits.
    """
    per_token = kv_bytes_per_token(policy.model.config, policy.dtype)
    smallest = per_token * (_blocks(max_model_len) + 1) * _BLOCK
    if memory_gib is not None:
        budget = int(memory_gib * 2**30)
        if budget < smallest:
            raise ValueError(
                f"rollout.vllm_memory_gib: {memory_gib} GiB are too little for one completion, which takes "
                f"{smallest / 2**30:.3g} GiB of keys and values; leave it out to have it derived"
            )
        return budget
    wanted = per_token * _BLOCK * (num_completions + 1) * (_blocks(max_model_len) + 1)
    if policy.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(policy.device)
        available = min(free, int(gpu_memory_utilization * total))
    else:
        available = int(_LARGEST_SHARE * psutil.virtual_memory().available)
    if available < smallest:
        raise ValueError(
            f"memory: one completion takes {smallest / 2**30:.3g} GiB of keys and values, and only "
            f"{available / 2**30:.3g} GiB are to be had: lower rollout.sampling.max_completion_tokens or "
            "data.max_pixels, or free memory"
        )
    return min(wanted, available)


def _blocks(num_tokens: int) -> int:
    return -(-num_tokens // _BLOCK)
