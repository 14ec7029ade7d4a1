"""The code that our ops are compared with: that of other trainers and kernel libraries, called as they call it.

=====================  ===============================================================================================
TRL 1.16               ``ChunkedLogProbFunction`` is its head. Its advantages and its losses are inside two methods of
                       ``GRPOTrainer``. This module takes those statements from the installed source and runs them
                       unchanged, so no model, accelerator or data set is needed, and no code is copied
NVlabs/GDPO            the trainer published with GDPO (a fork of TRL 0.18) is not on any registry. Its formula is
                       rewritten here from ``trl-GDPO/trl-0.18.0-gdpo/trl/trainer/grpo_trainer.py`` (commit 41f74c5)
Liger 0.8.5            ``LigerFusedLinearGRPOLoss`` from hidden states; ``triton_grpo_loss`` from logits, on a GPU
=====================  ===============================================================================================

TRL and Liger hold completions as padded (R, L) tensors, and we hold one ragged (T,) tensor: ``pad_ragged`` makes the
former from the latter. Packages are imported where they are used. A missing one raises an ImportError, which callers
report as the reason for leaving out a provider.
"""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from balcaprl.extras import install_extra
from balcaprl.torchvision_compat import ensure_importable

TRL_VOCABULARY_CHUNK = 32_768  # the chunk size that TRL's trainer passes to its head


def completion_mask(cu_seqlens: Tensor) -> Tensor:
    """Mask (R, L) float32 that is 1 where a completion has a token; L is the length of the longest completion."""
    lengths_R = cu_seqlens.diff()
    positions_L = torch.arange(int(lengths_R.max()), device=cu_seqlens.device)
    return (positions_L < lengths_R[:, None]).float()


def pad_ragged(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Pads ragged values (T, ...) to (R, L, ...) with zeros where there is no token; differentiable."""
    mask = completion_mask(cu_seqlens).bool()
    padded = values.new_zeros(*mask.shape, *values.shape[1:])
    return padded.index_put(mask.nonzero(as_tuple=True), values)


@dataclass(frozen=True)
class LossSettings:
    """The settings of a loss by TRL's names, and the tensors that not every loss has."""

    loss_type: str
    """``grpo``, ``dapo``, ``bnpo`` or ``dr_grpo``."""
    old_logprobs: Tensor | None = None
    """(R, L) log-probabilities of the old policy; None means on-policy."""
    reference_logprobs: Tensor | None = None
    """(R, L) log-probabilities of the reference, needed if ``kl_coef`` is above 0."""
    sampling_ratio: Tensor | None = None
    """(R, L), the truncated importance ratio, as TRL keeps it beside a batch sampled by vLLM."""
    clip: tuple[float, float] = (0.2, 0.2)
    """Lower and upper clip range."""
    kl_coef: float = 0.0
    """TRL's ``beta``."""
    max_length: int | None = None
    """The denominator of ``dr_grpo``."""


# TRL.


def trl_grouped_advantages(
    rewards: Tensor, group_size: int, weights: Sequence[float] | None = None, aggregation: str = "normalize_then_sum"
) -> Tensor:
    """TRL's advantages, (R,), from rewards (R, K) with NaN for a missing score.

    Args:
        rewards: (R, K) floating; groups are contiguous.
        group_size: number of rollouts per group.
        weights: K numbers, the weight of each reward; None means that all are 1.
        aggregation: ``normalize_then_sum`` (our ``gdpo``) or ``sum_then_normalize`` (our ``grpo``).
    """
    num_rewards = rewards.shape[1]
    trainer = SimpleNamespace(
        multi_objective_aggregation=aggregation,
        reward_funcs=[None] * num_rewards,
        reward_weights=rewards.new_ones(num_rewards) if weights is None else rewards.new_tensor(weights),
        scale_rewards="group",
    )
    return _trl_advantage_statements()(trainer, rewards, group_size, rewards.device)


def trl_policy_loss(logprobs: Tensor, mask: Tensor, advantages: Tensor, settings: LossSettings) -> Tensor:
    """The loss of TRL's own ``_compute_loss`` on log-probabilities that are already computed.

    Args:
        logprobs: (R, L) log-probabilities, differentiable.
        mask: (R, L), 1 for tokens of a completion.
        advantages: (R,) advantages.
        settings: of the loss.
    """
    trainer = _trl_trainer(settings)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, torch.zeros_like(mask), None)
    ids = mask.long()
    inputs = {
        "prompt_ids": ids[:, :0],
        "prompt_mask": ids[:, :0],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": settings.old_logprobs,
        "ref_per_token_logps": settings.reference_logprobs,
        "importance_sampling_ratio": settings.sampling_ratio,
        "num_items_in_batch": mask.sum(),
    }
    return _trl_method("_compute_loss")(trainer, None, inputs)


def trl_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, outputs: tuple[str, ...] = ("entropy",)
) -> tuple[Tensor, Tensor | None]:
    """The outputs of TRL's head: log-probabilities and, if ``outputs`` names it, entropy; both (T,)."""
    function = _trl_head()
    return function.apply(hidden, weight, None, targets, temperature, TRL_VOCABULARY_CHUNK, None, 1.0, outputs)[:2]


def trl_logprobs_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """TRL's log-probabilities (T,) of given logits (T, V): its Triton kernel on a GPU, torch elsewhere."""
    ensure_importable()
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, targets)


@functools.cache
def _trl_head() -> type[torch.autograd.Function]:
    ensure_importable()
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import maybe_gather_lm_head_ctx  # noqa: F401 (imported early, outside of its timed backward)

    return ChunkedLogProbFunction


def _trl_trainer(settings: LossSettings) -> Any:
    """The trainer's attributes that ``_compute_loss`` reads: one process, one accumulation step, TRL's defaults."""
    corrects = settings.sampling_ratio is not None
    return SimpleNamespace(
        loss_type=settings.loss_type,
        epsilon_low=settings.clip[0],
        epsilon_high=settings.clip[1],
        beta=settings.kl_coef,
        max_completion_length=settings.max_length,
        use_vllm=corrects,
        vllm_importance_sampling_correction=corrects,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"train": defaultdict(list)},
    )


@functools.cache
def _trl_source(module: str) -> ast.Module:
    """The parsed source of ``trl.trainer.<module>``, without importing the trainer (which would import vLLM).

    Raises:
        ImportError: TRL is not installed.
    """
    spec = find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"trl is not installed: {install_extra('trl')}")
    return ast.parse((Path(spec.submodule_search_locations[0]) / "trainer" / f"{module}.py").read_text("utf-8"))


def _trl_definition(module: str, name: str) -> ast.FunctionDef:
    for node in ast.walk(_trl_source(module)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise ImportError(f"this version of trl has no {name} in trl.trainer.{module}; the comparison is written for 1.16")


@functools.cache
def _trl_method(name: str) -> Callable[..., Any]:
    """A method of TRL's ``GRPOTrainer``, compiled as a function."""
    return _compiled([_trl_definition("grpo_trainer", name)], name)


@functools.cache
def _trl_advantage_statements() -> Callable[..., Tensor]:
    """The statements of ``_generate_and_score_completions`` that compute advantages from rewards, as a function."""
    body = _trl_definition("grpo_trainer", "_generate_and_score_completions").body
    targets = [ast.unparse(n.targets[0]) if isinstance(n, ast.Assign) else "" for n in body]
    begin = targets.index("unscorable_mask")
    end = targets.index("advantages", begin) + 1
    header = "def advantages_of(self, rewards_per_func, num_generations, device):\n    return advantages"
    function = ast.parse(header).body[0]
    assert isinstance(function, ast.FunctionDef)
    function.body = [*body[begin:end], *function.body]
    return _compiled([function], "advantages_of")


def _compiled(definitions: list[ast.FunctionDef], name: str) -> Callable[..., Any]:
    """Compiles functions of TRL's trainer with the three helpers that they call; returns the one called ``name``."""
    helpers = [_trl_definition("utils", helper) for helper in ("nanstd", "nanmin", "nanmax")]
    module = ast.fix_missing_locations(ast.Module(body=[*helpers, *definitions], type_ignores=[]))
    namespace: dict[str, Any] = {"torch": torch}
    exec(compile(module, f"<trl {name}>", "exec"), namespace)
    return namespace[name]


# NVlabs' trainer of GDPO.


def nvlabs_grouped_advantages(rewards: Tensor, group_size: int, weights: Sequence[float] | None = None) -> Tensor:
    """The advantages (R,) of NVlabs' trainer with ``apply_gdpo``, from at least two rewards (R, K).

    Each reward is normalised within its group by mean and std (ddof 1, 1e-4 added). Their weighted sum is then
    normalised over the whole batch in the same way. A missing score counts as 0 and is part of the statistics. (With
    one reward, NVlabs' trainer falls back to plain GRPO.)
    """
    groups = rewards.nan_to_num().view(-1, group_size, rewards.shape[1])
    std, mean = torch.std_mean(groups, dim=1, keepdim=True)
    normalised = ((groups - mean) / (std + 1e-4)).view_as(rewards)
    total = (normalised if weights is None else normalised * rewards.new_tensor(weights)).sum(dim=1)
    return (total - total.mean()) / (total.std() + 1e-4)


# Liger.


def liger_linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor,
    advantages: Tensor,
    settings: LossSettings,
    *,
    temperature: float = 1.0,
    chunk_size: int = 1,
    compiled: bool = False,
) -> Tensor:
    """Liger's fused linear GRPO loss of hidden (R, L, D), with targets and mask (R, L).

    ``chunk_size`` is the number of completions per chunk (Liger's default is 1); each chunk adds its gradient to that of
    the weight.
    """
    ensure_importable()
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=settings.kl_coef,
        compiled=compiled,
        use_ref_model=settings.reference_logprobs is not None,
        chunk_size=chunk_size,
        epsilon_low=settings.clip[0],
        epsilon_high=settings.clip[1],
        loss_type=settings.loss_type,
        max_completion_length=settings.max_length,
        temperature=temperature,
    )
    return loss(
        hidden,
        weight,
        targets,
        mask,
        advantages,
        ref_per_token_logps=settings.reference_logprobs,
        old_per_token_logps=settings.old_logprobs,
        vllm_is_ratio=settings.sampling_ratio,
    )[0]


def liger_logits_policy_loss(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    advantages: Tensor,
    settings: LossSettings,
    *,
    temperature: float = 1.0,
    inplace: bool = False,
) -> Tensor:
    """Liger's Triton GRPO loss of logits (R, L + 1, V), of which it ignores the last position. CUDA only.

    Of the settings it reads type, clip range and old log-probabilities.
    """
    ensure_importable()
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    return triton_grpo_loss(
        logits,
        settings.old_logprobs,
        None,
        targets,
        advantages,
        mask,
        temperature=temperature,
        beta=0.0,
        eps_low=settings.clip[0],
        eps_high=settings.clip[1],
        inplace=inplace,
        loss_type=settings.loss_type,
        reduce=True,
    )[0]
