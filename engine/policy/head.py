"""From last hidden states to log-probabilities: the model's own head, including adapters and changes to its logits.

A head with a plain weight matrix is one matrix product, even with a LoRA adapter, a bias or scaled logits.
``Head.folded`` returns the product's two operands, and the kernels that never store the (T, V) logits run on them. Any
other head (capped logits, DoRA, quantised rows) runs as the model runs it, in chunks whose logits the backward
recomputes. This is slower and gives the same numbers.

Ids from ``num_tokens`` on belong to rows that only pad the head, and no text contains them. They are left out of the
distribution here, as they are in samplers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from balcaprl.kernels import linear_logprobs

_COLUMN_MULTIPLE = 16
"""A bias adds one column to the weight. Zero columns then pad the width to a multiple of this, for fast products."""
_MAX_CHUNK_LOGITS = 1 << 24
"""Largest number of logits held at once when a head that is not a plain matrix product runs in chunks."""


def adapter_delta(module: Any) -> Tensor | None:
    """Sum what the active adapters of a peft layer add to its weight, differentiable; None if they add nothing."""
    if module.disable_adapters or module.merged:
        return None
    held = (module.lora_A, getattr(module, "lora_embedding_A", ()))
    deltas = [module.get_delta_weight(name) for name in module.active_adapters if any(name in each for each in held)]
    return sum(deltas[1:], deltas[0]) if deltas else None


def is_more_than_a_matrix(module: Any) -> bool:
    """Whether a peft layer's adapter does more than add a matrix to the weight, as DoRA and biases do."""
    return bool(len(getattr(module, "lora_magnitude_vector", ())) or any(getattr(module, "lora_bias", {}).values()))


@dataclass(frozen=True)
class LogitRule:
    """How a model changes the product of hidden states and head.

    The result is ``softcap * tanh(scale * logits / softcap)``, or ``scale * logits`` without a cap.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply the scale and the cap to logits (..., V)."""
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap


@dataclass(frozen=True)
class Head:
    """The head of a model in its present state, with adapters on or off as they are now."""

    module: Any
    """The layer that the model calls, from D to V."""
    rule: LogitRule
    num_tokens: int
    """Number of ids that the distribution covers, at most V; later rows of the head are left out."""

    @property
    def is_linear(self) -> bool:
        """Whether the head is one matrix product, which ``folded`` can express."""
        return self.rule.softcap is None and self._matrix() is not None

    def folded(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``hidden`` (T, D') and ``weight`` (num_tokens, D') whose product is the logits; both differentiable.

        D' is D, or larger where the head has a bias.
        """
        matrix, module = self._matrix(), self.module
        assert matrix is not None  # callers check is_linear first
        delta = None if matrix is module else adapter_delta(module)
        weight = matrix.weight if delta is None else matrix.weight + delta.to(matrix.weight.dtype)
        weight = weight if weight.shape[0] == self.num_tokens else weight[: self.num_tokens]
        bias = matrix.bias
        if bias is not None:
            width = -(-(weight.shape[1] + 1) // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE - weight.shape[1] - 1
            column = bias[: self.num_tokens, None].to(weight.dtype)
            weight = F.pad(torch.cat([weight, column], 1), (0, width))
            hidden = F.pad(torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1), (0, width))
        return hidden if self.rule.scale == 1.0 else hidden * self.rule.scale, weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits (T, num_tokens) from hidden states (T, D), as the model does."""
        logits = hidden @ self.module.weight.T if _is_plain(self.module) else self.module(hidden)
        return self.rule(logits[..., : self.num_tokens])

    def logprobs(self, hidden: Tensor, targets: Tensor, temperature: float, banned: Sequence[int] = ()) -> Tensor:
        """Differentiable log-probabilities (T,) of ``targets`` (T,), in the distribution without the ``banned`` ids."""
        if not self.is_linear:
            return self._logprobs_in_chunks(hidden, targets, temperature, banned)
        hidden, weight = self.folded(hidden)
        logprobs = linear_logprobs(hidden, weight, targets, temperature=temperature).logprobs
        banned = [token for token in banned if token < self.num_tokens]
        if not banned:
            return logprobs
        # A target that is no id fails the check of ``linear_logprobs``, on a GPU only later. Until then it must not
        # crash the process as an index out of range, so it is clamped.
        rows = weight[targets.clamp(0, self.num_tokens - 1)]
        # ``mass`` is the probability of all banned ids together. The log-sum-exp that it needs follows from the
        # targets' logits and log-probabilities.
        log_normalizer = (hidden * rows).sum(-1) / temperature - logprobs
        mass = (hidden @ weight[banned].T / temperature - log_normalizer[:, None]).exp().sum(-1)
        return logprobs - torch.log1p(-mass)

    def _matrix(self) -> nn.Linear | None:
        """Return the head's plain linear layer, beneath adapters that only add a matrix; None for any other head."""
        module: Any = self.module
        adapted = hasattr(module, "base_layer") and hasattr(module, "get_delta_weight")
        base = module.base_layer if adapted else module
        weight: Any = getattr(base, "weight", None)
        plain = isinstance(base, nn.Linear) and type(base).forward is nn.Linear.forward
        if not plain or not weight.is_floating_point() or weight.shape != (base.out_features, base.in_features):
            return None
        return None if adapted and is_more_than_a_matrix(module) else base

    def _logprobs_in_chunks(self, hidden: Tensor, targets: Tensor, temperature: float, banned: Sequence[int]) -> Tensor:
        def of_chunk(hidden: Tensor, targets: Tensor) -> Tensor:
            logits = self.logits(hidden)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
            ids = torch.tensor([token for token in banned if token < self.num_tokens], device=logits.device)
            logits = logits.index_fill(-1, ids.long(), -torch.inf)
            return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]

        size = max(1, _MAX_CHUNK_LOGITS // self.num_tokens)
        pairs = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([checkpoint(of_chunk, *pair, use_reentrant=False) for pair in pairs])


def known_ids(tokenizer: Any) -> tuple[int, tuple[int, ...]]:
    """Return a tokenizer's highest id plus 1, and the smaller ids that have no token; no limit without a vocabulary."""
    if not hasattr(tokenizer, "get_vocab"):
        return sys.maxsize, ()
    known = set(tokenizer.get_vocab().values())
    return max(known) + 1, tuple(sorted(set(range(max(known) + 1)) - known))


def head_module(model: Any) -> nn.Module | None:
    """Return the layer that computes a model's logits; if peft keeps an original and a copy, the one that is active."""
    module = model.get_output_embeddings()
    while hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
        active = [name for name in module.active_adapters if name in module.modules_to_save]
        stays = module.disable_adapters or not active
        module = module.original_module if stays else module.modules_to_save[active[0]]
    return module


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.bias is None
