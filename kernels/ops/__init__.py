"""Kernels of group-relative policy optimisation. Each op takes ``impl="auto"`` or the name of one implementation.

The file of an op has its mathematics, its public function, its plain-PyTorch reference (for shared_prefix_attention in
``reference.py``) and, except for adamw_update, its registration with ``torch.library`` as ``balcaprl::<op>``.
``balcaprl.kernels.support.native.is_available()`` tells whether the compiled CPU library can be used. This package may
import only torch, triton, numpy and the standard library.
"""

# Importing the ops here also registers them with ``torch.library``.
from balcaprl.kernels.adamw.adamw import adamw_update
from balcaprl.kernels.advantages.grouped_advantages import grouped_advantages
from balcaprl.kernels.head.linear_logprobs import LogProbs, linear_logprobs
from balcaprl.kernels.head.linear_policy_loss import linear_policy_loss
from balcaprl.kernels.loss.logits_policy_loss import logits_policy_loss
from balcaprl.kernels.loss.policy_loss import policy_loss
from balcaprl.kernels.loss.records import PolicyLoss
from balcaprl.kernels.shared_prefix.attention import shared_prefix_attention
from balcaprl.kernels.shared_prefix.layout import SharedPrefixLayout

__all__ = [
    "LogProbs",
    "PolicyLoss",
    "SharedPrefixLayout",
    "adamw_update",
    "grouped_advantages",
    "linear_logprobs",
    "linear_policy_loss",
    "logits_policy_loss",
    "policy_loss",
    "shared_prefix_attention",
]
