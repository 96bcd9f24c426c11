"""T-PPO: learning from windows instead of waiting for the longest response (Fan et al. 2025, arXiv:2506.15050).

Design, fixed before the first run. Exact world; 16 prompts, each to be answered with a random sequence of its own
over 2 symbols, ended by the end token: reward 1 for exactly that, else 0. Answers take 1 to 12 tokens, heavy-tailed
(`LENGTHS`: nine of them at most 3, the mean 4.25). The initial policy chooses the right token with about 0.8 wherever
it stands (normal noise of 0.3 on all logits), the end token with 0.05 before it is due and with 0.5 after. 8 slots per
prompt, tabular critic from zeros, Adam, one update per iteration.

The clock counts sequential decode steps: an iteration costs the most new steps that any of its responses takes. All
arms get 720. T-PPO has a window of 4. Synchronous PPO is the same with a window of 12, the whole budget: EGAE is then
GAE. "Discard" samples at most 4 steps and leaves out what is unfinished then. "Zero" is T-PPO with the value 0 at the
cut. A run that does not reach the target reward of 0.75 counts 720.

- Speed: decode steps until the exact expected reward is 0.75. Utilisation: new steps over slots times clock.
- Quality: expected reward at the end; not lower by more than 0.02.
- Discarding: expected reward on the prompts whose answers are longer than a window, and expected length, at the end.
- Zero bootstrap: expected reward averaged over the clock, and on prompts with long answers at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from polopt.claims.claim import Claim
from polopt.claims.exact import Run, start
from polopt.core.method import Method, Schedule
from polopt.core.override import override
from polopt.methods.base.dapo import OverlongFilter
from polopt.methods.trust_region.t_ppo import t_ppo
from polopt.policies.exact import SequenceSpace
from polopt.rollouts.windows import Windows
from polopt.tasks.problems import Problem

LENGTHS: Final = (1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4, 5, 6, 8, 10, 12)
SPACE: Final = SequenceSpace(3, 12, end=True)
WINDOW, GROUP, CLOCK, TARGET = 4, 8, 720, 0.75

PLAIN = t_ppo | {"rollout": Windows(window=WINDOW), "schedule": Schedule()}
ARMS: Final[Mapping[str, Method]] = {
    "t-ppo": PLAIN,
    "synchronous": PLAIN | {"rollout": Windows(window=SPACE.length)},
    "discard": PLAIN | {"rollout": Windows(window=WINDOW, max_new_tokens=WINDOW), "filter": OverlongFilter()},
    "zero": override(PLAIN, {"advantage.cut": 0.0}),
}


def problem(seed: int) -> Problem:
    """Prompts whose answers are of `LENGTHS`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS)
    right = torch.randint(0, SPACE.branching, (len(LENGTHS), SPACE.length), generator=generator)
    time = torch.arange(SPACE.length)
    # Probabilities by position: 0.05 for the end before it is due, 0.8 when it is, 0.5 after.
    end = torch.where(time < lengths[:, None] - 1, 0.05, torch.where(time == lengths[:, None] - 1, 0.8, 0.5))
    hit = torch.where(time < lengths[:, None] - 1, 0.8, (1 - end) / 2)
    chance = torch.stack([hit, 1 - end - hit], dim=-1)
    chance = torch.where((right == 0)[..., None], chance, chance.flip(-1))
    table = torch.cat([chance, end[..., None]], dim=-1).log()[:, SPACE.depths]
    initial = table.double() + 0.3 * torch.randn(table.shape, generator=generator, dtype=torch.float64)
    reward = torch.zeros(len(LENGTHS), SPACE.n_sequences, dtype=torch.float64)
    for number, length in enumerate(LENGTHS):
        reward[number, SPACE.index([*right[number, : length - 1].tolist(), SPACE.vocabulary - 1])] = 1.0
    return Problem("copy", SPACE, {"reward": reward}, initial, initial, {}, (GROUP,) * len(LENGTHS))


def _long_reward(run: Run) -> float:
    """Expected reward on the prompts whose answers do not fit into a window."""
    long = torch.tensor(LENGTHS) > WINDOW
    return float((run.policy.probabilities().detach() * run.problem.reward).sum(-1)[long].mean())


def _length(run: Run) -> float:
    """Expected length of an answer, mean over the prompts."""
    return float((run.policy.probabilities().detach() * SPACE.lengths).sum(-1).mean())


def trained(made: Problem, method: Method, *, seed: int, clock: int) -> dict[str, float]:
    """What came of an arm after ``clock`` decode steps."""
    run = start(made, method, seed=seed, group=GROUP)
    collect: Any = run.trainer.collect
    spent = new = 0

    def timed(*arguments: Any) -> Any:
        nonlocal spent, new
        batch = collect(*arguments)
        steps = batch.drawn.lengths - batch.drawn["before"]
        spent, new = spent + int(steps.max()), new + int(steps.sum())
        return batch

    run.trainer.collect = timed  # type: ignore[assignment]
    reached, area, at = float(clock), 0.0, 0
    while spent < clock:
        before = run.reward
        if before >= TARGET:
            reached = min(reached, float(spent))
        run.step()
        area, at = area + before * (min(spent, clock) - at), min(spent, clock)
    return {
        "steps": reached,
        "reward": run.reward,
        "mean": area / clock,
        "long": _long_reward(run),
        "length": _length(run),
        "utilisation": new / (spent * GROUP * len(LENGTHS)),
    }


def arms(seed: int, quick: bool) -> Mapping[str, float]:
    """All arms on one problem."""
    made = problem(seed)
    return {
        f"{name}/{key}": value
        for name, method in ARMS.items()
        for key, value in trained(made, method, seed=seed, clock=24 if quick else CLOCK).items()
    }


def _claim(name: str, statement: str, metric: str, direction: Any, arm: str, key: str, margin: float = 0.0) -> Claim:
    return Claim(
        "t-ppo",
        name,
        statement,
        "exact",
        {"synchronous": "synchronous PPO", "discard": "PPO without unfinished responses", "zero": "value 0 at the cut"}[
            arm
        ],
        metric,
        direction,
        f"t-ppo/{key}",
        f"{arm}/{key}",
        margin,
        measure=arms,
    )


CLAIMS = (
    _claim(
        "speed",
        "T-PPO reaches the target reward in fewer sequential decode steps than synchronous PPO.",
        "decode steps until the expected reward is 0.75",
        "lower",
        "synchronous",
        "steps",
    ),
    _claim(
        "quality",
        "After the same number of decode steps T-PPO's reward is not lower than synchronous PPO's.",
        "expected reward after 720 decode steps",
        "higher",
        "synchronous",
        "reward",
        0.02,
    ),
    _claim(
        "utilisation",
        "More of the generation slots are busy than in synchronous PPO.",
        "new steps over slots times decode steps",
        "higher",
        "synchronous",
        "utilisation",
    ),
    _claim(
        "discarding-long-answers",
        "Discarding unfinished responses leaves what takes long unlearnt.",
        "expected reward on prompts with answers longer than a window, at the end",
        "higher",
        "discard",
        "long",
    ),
    _claim(
        "discarding-length",
        "Discarding unfinished responses makes answers shorter than T-PPO's.",
        "expected length at the end",
        "higher",
        "discard",
        "length",
    ),
    _claim(
        "bootstrap",
        "The last value at the cut learns faster than the value 0.",
        "expected reward, mean over the clock",
        "higher",
        "zero",
        "mean",
    ),
    _claim(
        "bootstrap-long-answers",
        "With the value 0 at the cut, what takes long is learnt less well.",
        "expected reward on prompts with answers longer than a window, at the end",
        "higher",
        "zero",
        "long",
    ),
)
