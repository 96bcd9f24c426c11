"""GDPO: each reward normalised by itself, the batch's scale, conditioned rewards (Liu et al. 2026, arXiv:2601.05242).

Design, fixed before the first run. Exact world: 5 tokens, length 4, 8 prompts, groups of 8, one update per rollout.
Success of a reward: its exact expectation over its scale.

- Several rewards: independent binary rewards on a random 10%, 25% and 50% of the sequences, worth 1, 0.3 and 0.1, so
  that the hardest has the largest scale and all three are met together by about 1%. Adam at rate 0.1, 40 iterations.
  Arms: GRPO on the sum, GRPO without the division by the deviation, GDPO. Success of the worst reward, mean success,
  and, for "on all rewards", the smallest of the three differences in success.
- Batch normalisation: the same problem; GDPO with and without it, SGD at rate 20 (Adam would undo a common scale), 60
  iterations. Stability: the largest fall of the mean success below a value that it had before.
- Priority: two binary rewards on a random 4% (hard) and 50% (easy) of the sequences, both worth 1. Adam at rate 0.1, 40
  iterations. Arms: GDPO with weight 0.25 (the paper's smallest) on the easy reward, GDPO with the easy reward
  conditioned on the hard one, and both weights 1. Success of the hard reward.
"""

from __future__ import annotations

from collections.abc import Mapping

from polopt.advantages.group import GroupCenter
from polopt.claims.claim import Claim
from polopt.claims.exact import Run, curve, largest_fall, start
from polopt.methods.base.grpo import grpo
from polopt.methods.credit.gdpo_multireward import ConditionedReward, DecoupledZScore, gdpo_multireward
from polopt.policies.exact import SequenceSpace
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(5, 4)
GROUP = 8
SCALES = (1.0, 0.3, 0.1)
CONDITION = ConditionedReward(easy="reward-2", hard="reward-1")


def _three(seed: int) -> Problem:
    return problem("multi-reward", space=SPACE, batch=8, rates=(0.1, 0.25, 0.5), scales=SCALES, seed=seed)


def _success(run: Run) -> list[float]:
    return [value / scale for value, scale in zip(run.rewards.values(), SCALES, strict=True)]


def several(seed: int, quick: bool) -> Mapping[str, float]:
    """Worst and mean success by method; the smallest gain of GDPO over GRPO on the sum."""
    found: dict[str, float] = {}
    ends = {}
    arms = {"grpo": grpo, "no-std": grpo | {"advantage": GroupCenter()}, "gdpo": gdpo_multireward}
    for name, method in arms.items():
        run = start(_three(seed), method, seed=seed, group=GROUP)
        curve(run, 2 if quick else 40)
        ends[name] = _success(run)
        found |= {f"{name}/worst": min(ends[name]), f"{name}/mean": sum(ends[name]) / len(SCALES)}
    gains = [ours - theirs for ours, theirs in zip(ends["gdpo"], ends["grpo"], strict=True)]
    return found | {"smallest gain": min(gains)}


def stability(seed: int, quick: bool) -> Mapping[str, float]:
    """Largest fall of the mean success with and without batch normalisation."""
    found = {}
    for name, part in {"with": DecoupledZScore(), "without": DecoupledZScore(batch="off")}.items():
        run = start(_three(seed), gdpo_multireward | {"advantage": part}, seed=seed, group=GROUP, optimizer="sgd")
        found[name] = largest_fall(curve(run, 2 if quick else 60, lambda run: sum(_success(run)) / len(SCALES)))
    return found


def priority(seed: int, quick: bool) -> Mapping[str, float]:
    """Success of the hard reward."""
    made = problem("multi-reward", space=SPACE, batch=8, rates=(0.04, 0.5), scales=(1.0, 1.0), seed=seed)
    arms = {
        "equal": gdpo_multireward,
        "down-weighted": gdpo_multireward | {"advantage": DecoupledZScore(weights={"reward-2": 0.25})},
        "conditioned": gdpo_multireward | {"reward": CONDITION},
    }
    found = {}
    for name, method in arms.items():
        run = start(made, method, seed=seed, group=GROUP)
        curve(run, 2 if quick else 40)
        found[name] = run.rewards["reward-1"]
    return found


CLAIMS = (
    Claim(
        "gdpo-multireward",
        "worst-reward",
        "GDPO brings the worst of three rewards further than GRPO on their sum.",
        "exact",
        "grpo",
        "success of the worst reward after 40 iterations",
        "higher",
        "gdpo/worst",
        "grpo/worst",
        measure=several,
    ),
    Claim(
        "gdpo-multireward",
        "worst-reward-no-std",
        "GDPO brings the worst of three rewards further than GRPO without the deviation.",
        "exact",
        "grpo, centred returns",
        "success of the worst reward after 40 iterations",
        "higher",
        "gdpo/worst",
        "no-std/worst",
        measure=several,
    ),
    Claim(
        "gdpo-multireward",
        "mean-success",
        "GDPO reaches a higher mean success of the rewards than GRPO on their sum.",
        "exact",
        "grpo",
        "mean success of the three rewards after 40 iterations",
        "higher",
        "gdpo/mean",
        "grpo/mean",
        measure=several,
    ),
    Claim(
        "gdpo-multireward",
        "all-rewards",
        "GDPO is ahead of GRPO on every one of the rewards.",
        "exact",
        "grpo",
        "smallest of the three differences in success after 40 iterations",
        "higher",
        "smallest gain",
        None,
        measure=several,
    ),
    Claim(
        "gdpo-multireward",
        "batch-normalisation",
        "Batch normalisation makes training more stable.",
        "exact",
        "gdpo without batch normalisation",
        "largest fall of the mean success in 60 iterations",
        "lower",
        "with",
        "without",
        measure=stability,
    ),
    Claim(
        "gdpo-multireward",
        "conditioned",
        "Conditioning an easy reward on a hard one serves the hard one better than a weight of a quarter does.",
        "exact",
        "gdpo with weight 0.25 on the easy reward",
        "success of the hard reward after 40 iterations",
        "higher",
        "conditioned",
        "down-weighted",
        measure=priority,
    ),
)
