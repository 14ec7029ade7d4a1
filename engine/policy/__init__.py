"""The policy: a stock transformers vision-language model, its prompts and its log-probabilities."""

from balcaprl.policy.agreement import PolicyMismatchError
from balcaprl.policy.families import UnsupportedFamilyError
from balcaprl.policy.packing import Group, PackedBatch
from balcaprl.policy.policy import Policy

__all__ = ["Group", "PackedBatch", "Policy", "PolicyMismatchError", "UnsupportedFamilyError"]
