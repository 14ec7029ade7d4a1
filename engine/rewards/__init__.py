"""Turns captions into rewards: judges, custom rewards, length rules, and an account of what could not be scored."""

from balcaprl.rewards.columns import advantage_inputs, reward_matrix, write_advantages
from balcaprl.rewards.judge import Judge, ScoreStats
from balcaprl.rewards.lexical.judge import LexicalJudge
from balcaprl.rewards.registry import close_judge, make_judge
from balcaprl.rewards.scoring import GroupScorer, score_groups
from balcaprl.types import JudgeStoppedError

__all__ = [
    "GroupScorer",
    "Judge",
    "JudgeStoppedError",
    "LexicalJudge",
    "ScoreStats",
    "advantage_inputs",
    "close_judge",
    "make_judge",
    "reward_matrix",
    "score_groups",
    "write_advantages",
]
