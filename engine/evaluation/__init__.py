"""How well a policy describes held-out images."""

from balcaprl.evaluation.b_capscore import Evaluation, evaluate_captions

__all__ = ["Evaluation", "evaluate_captions"]
