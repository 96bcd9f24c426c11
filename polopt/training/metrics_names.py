"""Names of logged metrics. Where TRL logs the same quantity, the name is TRL's, so dashboards carry over."""

from __future__ import annotations

from typing import Final

REWARD: Final = "reward"
REWARD_STD: Final = "reward_std"
FRAC_REWARD_ZERO_STD: Final = "frac_reward_zero_std"
KL: Final = "kl"
ENTROPY: Final = "entropy"
MEAN_LENGTH: Final = "completions/mean_length"
MIN_LENGTH: Final = "completions/min_length"
MAX_LENGTH: Final = "completions/max_length"
CLIPPED_RATIO: Final = "completions/clipped_ratio"
MEAN_TERMINATED_LENGTH: Final = "completions/mean_terminated_length"
MIN_TERMINATED_LENGTH: Final = "completions/min_terminated_length"
MAX_TERMINATED_LENGTH: Final = "completions/max_terminated_length"
CLIP_LOW: Final = "clip_ratio/low_mean"
CLIP_LOW_MIN: Final = "clip_ratio/low_min"
CLIP_HIGH: Final = "clip_ratio/high_mean"
CLIP_HIGH_MAX: Final = "clip_ratio/high_max"
CLIP_REGION: Final = "clip_ratio/region_mean"
SAMPLING_LOGP_GAP_MEAN: Final = "sampling/sampling_logp_difference/mean"
SAMPLING_LOGP_GAP_MAX: Final = "sampling/sampling_logp_difference/max"
NUM_TOKENS: Final = "num_tokens"
GRAD_NORM: Final = "grad_norm"
LEARNING_RATE: Final = "learning_rate"
LOSS: Final = "loss"
STEP_TIME: Final = "step_time"

# Ours: what TRL does not log.
NUM_ROLLOUTS: Final = "num_rollouts"
SECONDS: Final = "seconds"
TOKENS_PER_SECOND: Final = "tokens_per_second"
EVAL: Final = "eval/"
REWARD_ACCURACY: Final = "rewards/accuracies"
ACCURACY: Final = "accuracy"
ACCURACY_LOW: Final = "accuracy/low"
ACCURACY_HIGH: Final = "accuracy/high"


def reward_mean(name: str) -> str:
    """Mean over trajectories of the reward called `name`."""
    return f"rewards/{name}/mean"


def reward_std(name: str) -> str:
    """Standard deviation over trajectories of the reward called `name`."""
    return f"rewards/{name}/std"


def pass_at(k: int) -> str:
    """Share of prompts solved by at least one of k samples."""
    return f"pass@{k}"
