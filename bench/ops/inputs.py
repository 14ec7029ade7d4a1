"""Seeded inputs of the benchmarks: rewards, ragged log-probabilities, logits, hidden states; float32 or bfloat16.

All completions of a batch are equally long, so that the peers, which pad, do no work for padding. Two variants of the
head's inputs matter more than random ones:

- ``peaked`` has a captioner's distribution, as sharp as that of the demo's warm start. On the warm start's own captions
  (of 32 validation pictures, 4 each, sampled at temperature 1 with at most 128 tokens) the mean entropy was 0.73 nats,
  and 10.7 vocabulary entries per token had a probability of at least 2^-12; training lowers both. A hidden state is a
  random mix of 16 rows of the head, drawn by Zipf's law and scattered over the vocabulary, and scaled until the mean
  entropy is 0.73 nats. Targets are sampled from the resulting distribution. At (512, 256, 8192) a token then has 10.5
  such entries, and 32 consecutive tokens have them in 287 columns together, compared with 109 for the warm start.
- ``zero_fraction`` is the share of completions that have advantage 0, and so no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
POLICY_ENTROPY = 0.73
"""Mean entropy in nats of the demo's warm start on its own captions."""
_CANDIDATES = 16


@dataclass(frozen=True)
class Case:
    """One set of inputs of an op, and how to run the op on it."""

    sizes: Mapping[str, int]
    dtype: torch.dtype = torch.float32
    what: str = ""
    """The reason for these sizes, shown in the tables."""
    peaked: bool = False
    filter_eps: float | None = None
    """Filter threshold passed to our op; the peers and the reference compute the exact gradient."""
    zero_fraction: float = 0.0
    small: bool = False
    """Whether ``pytest bench/`` also runs this case."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    memory_only: bool = False
    """Whether to measure only the peak memory of one call of our own implementations, because the case is too large for
    anything else."""

    @property
    def name(self) -> str:
        """The case's name, unique within its op."""
        parts = ["x".join(str(n) for n in self.sizes.values()), str(self.dtype).removeprefix("torch.")]
        parts += ["peaked"] if self.peaked else []
        parts += [f"eps{self.filter_eps:.3g}"] if self.filter_eps is not None else []
        parts += [f"zero{self.zero_fraction:g}"] if self.zero_fraction else []
        return " ".join(parts)


def rewards(case: Case, generator: torch.Generator) -> Inputs:
    """Makes rewards (R, K) in [0, 1]."""
    shape = (case.sizes["groups"] * case.sizes["size"], case.sizes["rewards"])
    return {"rewards": torch.rand(shape, generator=generator)}


def loss_batch(case: Case, generator: torch.Generator, num_tokens: int) -> Inputs:
    """Makes advantages (R,), cu_seqlens (R + 1,), and noise (T,), a difference of log-probabilities of two policies."""
    num_rollouts = case.sizes["rollouts"]
    length = num_tokens // num_rollouts
    if length * num_rollouts != num_tokens:
        raise ValueError(f"rollouts: {num_rollouts} does not divide the {num_tokens} tokens of case {case.name}")
    advantages = torch.randn(num_rollouts, generator=generator)
    advantages[: round(case.zero_fraction * num_rollouts)] = 0.0
    return {
        "advantages": advantages[torch.randperm(num_rollouts, generator=generator)],
        "cu_seqlens": torch.arange(0, num_tokens + 1, length, dtype=torch.int32),
        "noise": 0.1 * torch.randn(num_tokens, generator=generator),
    }


def logprobs(case: Case, generator: torch.Generator) -> Inputs:
    """Makes logprobs and old_logprobs (T,), and advantages and cu_seqlens as ``loss_batch`` does."""
    num_tokens = case.sizes["rollouts"] * case.sizes["length"]
    batch = loss_batch(case, generator, num_tokens)
    current = -3.0 * torch.rand(num_tokens, generator=generator)
    return {"logprobs": current, "old_logprobs": current + batch.pop("noise"), **batch}


def head(case: Case, generator: torch.Generator) -> Inputs:
    """Makes hidden (T, D), weight (V, D), targets (T,), and the upstream gradient (T,)."""
    num_tokens, width, vocabulary = (case.sizes[k] for k in ("tokens", "hidden", "vocabulary"))
    weight = torch.randn(vocabulary, width, generator=generator).div_(math.sqrt(width))
    if case.peaked:
        hidden, targets = _peaked(num_tokens, weight, generator)
    else:
        hidden = torch.randn(num_tokens, width, generator=generator)
        targets = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    upstream = torch.randn(num_tokens, generator=generator) / num_tokens
    return {"hidden": hidden.to(case.dtype), "weight": weight.to(case.dtype), "targets": targets, "upstream": upstream}


def head_loss(case: Case, generator: torch.Generator) -> Inputs:
    """Makes hidden, weight and targets as ``head`` does, advantages and cu_seqlens as ``loss_batch`` does, and
    old_logprobs (T,) near the policy's own (in a case that measures only memory, near those of a uniform policy)."""
    made = head(case, generator)
    batch = loss_batch(case, generator, case.sizes["tokens"])
    made.pop("upstream")
    current = torch.full((case.sizes["tokens"],), -math.log(case.sizes["vocabulary"]))
    for begin in range(0, 0 if case.memory_only else current.shape[0], 128):
        rows = slice(begin, begin + 128)
        logits = (made["hidden"][rows] @ made["weight"].T).float()
        current[rows] = logits.log_softmax(dim=-1).gather(1, made["targets"][rows, None])[:, 0]
    return {**made, "old_logprobs": current + batch.pop("noise"), **batch}


def logits_loss(case: Case, generator: torch.Generator) -> Inputs:
    """Makes logits (T, V), targets (T,), advantages and cu_seqlens as ``loss_batch`` does, and old_logprobs (T,) near
    the policy's own."""
    num_tokens, vocabulary = case.sizes["tokens"], case.sizes["vocabulary"]
    logits = 2.0 * torch.randn(num_tokens, vocabulary, generator=generator)
    targets = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    batch = loss_batch(case, generator, num_tokens)
    logits = logits.to(case.dtype)
    current = logits.float().log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
    return {"logits": logits, "targets": targets, "old_logprobs": current + batch.pop("noise"), **batch}


def _peaked(num_tokens: int, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hidden states whose distributions have a mean entropy of ``POLICY_ENTROPY``, and targets sampled from them."""
    vocabulary = weight.shape[0]
    by_rank = torch.arange(1, vocabulary + 1, dtype=torch.float64).reciprocal().cumsum(0)
    drawn = torch.rand(num_tokens, _CANDIDATES, generator=generator, dtype=torch.float64) * by_rank[-1]
    ranks = torch.searchsorted(by_rank, drawn).clamp(max=vocabulary - 1)
    candidates = torch.randperm(vocabulary, generator=generator)[ranks]
    shares = torch.rand(num_tokens, _CANDIDATES, generator=generator).square()
    mix = torch.einsum("tk,tkd->td", shares, weight[candidates])
    logits = mix @ weight.T
    low, high = 0.0, 300.0
    for _ in range(20):
        scale = (low + high) / 2
        log_softmax = (scale * logits).log_softmax(dim=-1)
        entropy = -float((log_softmax.exp() * log_softmax).sum(dim=-1).mean())
        low, high = (scale, high) if entropy > POLICY_ENTROPY else (low, scale)
    targets = torch.multinomial((scale * logits).softmax(dim=-1), 1, generator=generator)[:, 0]
    return scale * mix, targets
