"""From captions to rewards: judges, the length rules, and the account of what could not be scored."""

from balcaprl.rewards.judge import Judge, ScoreStats, make_judge, score_groups
from balcaprl.rewards.length import advantage_inputs, reward_matrix
from balcaprl.rewards.lexical_judge import LexicalJudge

__all__ = [
    "Judge",
    "LexicalJudge",
    "ScoreStats",
    "advantage_inputs",
    "make_judge",
    "reward_matrix",
    "score_groups",
]
