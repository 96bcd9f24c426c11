"""Reward functions: how a trajectory's text becomes numbers, and what happens when it cannot."""

from polopt.rewards.reward import InvalidReward, NamedReward, RewardError, RewardFunction, Scores, score
from polopt.rewards.specification import REWARDS, parse_reward
from polopt.rewards.transcript import Transcript

__all__ = [
    "REWARDS",
    "InvalidReward",
    "NamedReward",
    "RewardError",
    "RewardFunction",
    "Scores",
    "Transcript",
    "parse_reward",
    "score",
]
