"""Kernels of group-relative policy optimisation. Each op takes ``impl="auto"`` or the name of one implementation.

Each op has one file with its mathematics, its public function, its plain-PyTorch reference and its registration with
``torch.library`` as ``balcaprl::<op>``. ``balcaprl.kernels.support.native.is_available()`` tells whether the compiled CPU
library can be used. This package imports only torch, triton, numpy and the standard library.
"""

# The ops are imported eagerly because an op and its file share a name: ``balcaprl.kernels.<op>`` must be the function.
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
