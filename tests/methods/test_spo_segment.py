"""The card of SPO (segment): cuts, values at cuts, credit of segments and of a tree's edges, the masked loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.advantages.group import GroupCenter, GroupZScore
from polopt.claims.exact import start
from polopt.core.method import Schedule
from polopt.core.rollout import Rollout, Source
from polopt.methods.credit.spo_segment import SegmentDifference, UnsureSteps, spo_segment
from polopt.policies.exact import ExactPolicy, SequenceSpace, tree
from polopt.rewards.segment_values import SegmentValues, state_values
from polopt.rollouts.chain import Chain, cuts, segments_between
from polopt.rollouts.tree import Tree
from polopt.tasks.problems import problem
from polopt.training.collect import Collected
from tests.support import close, f64, now, same, value_and_gradient

P = [0.99, 0.95, 0.5, 0.97, 0.8, 0.99, 0.3, 0.98, 0.6, 0.99]
RATIOS = torch.linspace(-0.3, 0.3, 10, dtype=torch.float64)
plain = spo_segment | {"advantage": SegmentDifference(whiten=False)}


def chain(
    probabilities: Sequence[Sequence[float]],
    rewards: Sequence[float],
    probes: Sequence[Sequence[Sequence[float]]],
    every: int,
    mask: Sequence[bool] | None = None,
) -> Rollout:
    """Answers with these step probabilities and rewards; ``probes[i][j]`` are the rewards at the j-th cut of answer i.

    A probe has one step. Distinct answers share no prefix.
    """
    owner = [i for i, steps in enumerate(probabilities) for _ in steps]
    p = f64([value for steps in probabilities for value in steps])
    columns = {"logp": p.log()} | ({} if mask is None else {"mask": torch.tensor(mask)})
    main = Rollout.from_arrays(owner, range(len(rewards)), step=columns)
    cut = cuts(main, every=every)
    count = len(rewards)
    state = count + torch.arange(int(cut.sum()))
    start, end = segments_between(main, cut, state)
    values = [at for answer in probes for at in answer]
    assert len(values) == len(state)
    samples = [(count + j, reward) for j, at in enumerate(values) for reward in at]
    nowhere = torch.full((len(samples),), -1)
    return Rollout.from_arrays(
        [*owner, *range(count, count + len(samples))],
        [*range(count), *[count + s for s, _ in samples]],
        step={
            "logp": torch.cat([p.log(), f64([0.5] * len(samples)).log()]),
            "mask": torch.cat([main.mask, torch.zeros(len(samples), dtype=torch.bool)]),
            "segment/start": torch.cat([start, nowhere]),
            "segment/end": torch.cat([end, nowhere]),
        },
        trajectories={
            "reward": f64([*rewards, *[reward for _, reward in samples]]),
            "state": torch.tensor([*range(count), *[s for s, _ in samples]]),
            "source": torch.tensor([int(Source.POLICY)] * count + [int(Source.PROBE)] * len(samples)),
        },
    )


def grown(paths: Sequence[Sequence[tuple[int, int]]], leaves: Sequence[int], rewards: Sequence[float]) -> Rollout:
    """A tree: each trajectory is a leaf, and its one-step edges are (node, node below)."""
    edges = [edge for path in paths for edge in path]
    return Rollout.from_arrays(
        [i for i, path in enumerate(paths) for _ in path],
        [0] * len(paths),
        step={
            "logp": torch.full((len(edges),), math.log(0.5), dtype=torch.float64),
            "segment/start": torch.tensor([a for a, _ in edges]),
            "segment/end": torch.tensor([b for _, b in edges]),
            "edge": torch.tensor([b for _, b in edges]),
        },
        trajectories={
            "reward": f64(rewards),
            "state": torch.tensor(leaves),
            "source": torch.zeros(len(paths), dtype=torch.int64),
        },
    )


def credited(rollout: Rollout, whiten: bool = False, normalize: bool = False) -> Rollout:
    """Through values, filter and advantage."""
    method = spo_segment | {"advantage": SegmentDifference(normalize=normalize, whiten=whiten)}
    return method.credit(method.filter(method.shape_reward(rollout)))


def worked() -> Rollout:
    return chain([P], [0.0], [[[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]], every=2)


# {{1, 1, 0}, {0, 0, 0}, leaf 1}: nodes 1, 2 below the root, leaf 3; leaves 4 .. 9.
WORKED_TREE = grown(
    [[(0, 1), (1, 4)], [(1, 5)], [(1, 6)], [(0, 2), (2, 7)], [(2, 8)], [(2, 9)], [(0, 3)]],
    [4, 5, 6, 7, 8, 9, 3],
    [1, 1, 0, 0, 0, 0, 1],
)


# --- worked examples --------------------------------------------------------------------------------------------------


def test_worked_chain() -> None:
    rollout = worked()
    main = rollout.select(torch.tensor([0]))
    # The cards' prefixes end at steps 1 and 5: the cuts are in front of 2 and 6.
    assert cuts(main, every=2).nonzero().flatten().tolist() == [2, 6]
    made = credited(rollout)
    close(made.advantage, [0, 0, 0.4, 0.4, 0.4, 0.4, -0.8, -0.8, -0.8, -0.8])
    assert made.mask.nonzero().flatten().tolist() == [2, 4, 6, 8]
    assert made.n_trajectories == 1


def test_worked_loss() -> None:
    made = credited(worked())
    loss, gradient = value_and_gradient(spo_segment, now(made.logp + RATIOS), made)
    close(loss, 0.292225)
    expected = torch.zeros(10, dtype=torch.float64)
    expected[[2, 4, 6, 8]] = f64([-0.084648, -0.096722, 0.221034, 0.252560])
    close(gradient, expected)


def test_worked_loss_with_whitening() -> None:
    made = credited(worked(), whiten=True)
    loss, _ = value_and_gradient(spo_segment, now(made.logp + RATIOS), made)
    close(loss, 0.120004)


def test_worked_tree() -> None:
    values = SegmentValues()(WORKED_TREE)
    close(values["value/start"][0], 0.555556)
    expected = [0.111111, 0.333333, 0.333333, -0.666667, -0.555556, 0, 0, 0, 0.444444]
    # Trajectories are in depth-first order, and an edge that leaves share belongs to the first.
    close(plain.credit(values).advantage, expected)
    normal = spo_segment | {"advantage": SegmentDifference(normalize=True, whiten=False)}
    expected = [0.267261, 0.707107, 0.707107, -1.414214, -1.336306, 0, 0, 0, 1.069045]
    close(normal.credit(values).advantage, expected)


# --- cuts and values against loops ------------------------------------------------------------------------------------


def looped(p: Sequence[float], values: Sequence[float], reward: float, every: int) -> tuple[list[int], list[float]]:
    """Prefix ends of the cuts and advantages of one answer, token by token."""
    unsure = [t for t, value in enumerate(p) if value < 0.9]
    ends = [t - 1 for t in unsure][::every]
    known = dict(zip(ends, values, strict=True))
    base = known.get(-1, math.nan)
    advantage = [math.nan] * len(p)
    for t in range(len(p)):
        if t in known or t == len(p) - 1:
            value = reward if t == len(p) - 1 else known[t]
            advantage[t] = 0.0 if math.isnan(base) else value - base
            base = value
    for t in reversed(range(len(p) - 1)):
        if math.isnan(advantage[t]):
            advantage[t] = advantage[t + 1]
    return ends, advantage if ends else [0.0] * len(p)


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("seed", range(6))
def test_chains_equal_a_loop(seed: int, every: int) -> None:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 14, size=7)
    p = [np.where(draw.random(n) < 0.5, draw.uniform(0.1, 0.89, n), draw.uniform(0.91, 1, n)).tolist() for n in lengths]
    rewards = draw.random(7).tolist()
    counts = [len([v for v in steps if v < 0.9][::every]) for steps in p]
    probes = [[draw.random(3).tolist() for _ in range(count)] for count in counts]
    made = plain.credit(plain.shape_reward(chain(p, rewards, probes, every)))
    place = 0
    for steps, reward, at in zip(p, rewards, probes, strict=True):
        _, expected = looped(steps, [float(np.mean(v)) for v in at], reward, every)
        same(made.advantage[place : place + len(steps)], expected)
        place += len(steps)


def test_one_advantage_per_segment_telescopes() -> None:
    made = plain.credit(plain.shape_reward(chain([P], [0.3], [[[0.9, 0.2], [0.5], [0.1], [0.6, 0.8]]], every=1)))
    per_segment = made.advantage[[2, 4, 6, 8]]
    same(per_segment.sum(), 0.3 - 0.55)


def test_one_cut_at_the_prompt_is_reinforce_with_a_sampled_baseline() -> None:
    made = plain.credit(plain.shape_reward(chain([[0.5, 0.2, 0.95], [0.1]], [1.0, 0.0], [[[1, 0]], [[1, 1]]], every=9)))
    same(made.advantage[:4], [0.5, 0.5, 0.5, -1.0])


def test_masked_steps_are_no_cuts() -> None:
    mask = [True, True, False, True, True, True, True, True, True, True]
    rollout = chain([P], [0.0], [[[1, 1, 0, 0, 0], [0.0]]], every=2, mask=mask)
    main = rollout.select(torch.tensor([0]))
    assert cuts(main, every=2).nonzero().flatten().tolist() == [4, 8]


@pytest.mark.parametrize("tokens", [2, 3])
def test_exact_values_at_every_token_give_exact_advantages(tokens: int) -> None:
    """Under a uniform policy every completion once has the mean of the exact value."""
    space = SequenceSpace(tokens, 3)
    policy = ExactPolicy(space)
    reward = torch.rand(1, space.n_sequences, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))
    q, v = tree.action_values(space, policy.table(), reward)
    rows = space.sequences.tolist()

    def completions(prefix: list[int]) -> list[float]:
        return [float(reward[0, s]) for s, row in enumerate(rows) if row[: len(prefix)] == prefix]

    made = chain(
        [[1 / tokens] * 3 for _ in rows],
        reward[0].tolist(),
        [[completions(row[:t]) for t in range(3)] for row in rows],
        every=1,
    )
    advantage = plain.credit(plain.shape_reward(made)).advantage[: 3 * len(rows)].view(-1, 3)
    expected = (q[0] - v[0][:, None])[space.nodes, space.sequences]
    same(advantage, expected)


@pytest.mark.parametrize("seed", range(4))
def test_values_of_a_tree_equal_a_recursion(seed: int) -> None:
    draw = np.random.default_rng(seed)
    parents = [-1, *[int(draw.integers(0, max(1, n // 2))) for n in range(1, 30)]]
    below: dict[int, list[int]] = {n: [] for n in range(30)}
    for n, parent in enumerate(parents[1:], 1):
        below[parent].append(n)
    leaves = [n for n in range(30) if not below[n]]
    rewards = dict(zip(leaves, draw.random(len(leaves)), strict=True))
    rewards[leaves[0]] = math.nan

    def value(n: int) -> float:
        if not below[n]:
            return float(rewards[n])
        known = [v for v in map(value, below[n]) if not math.isnan(v)]
        return float(np.mean(known)) if known else math.nan

    found = state_values(
        f64([rewards[n] for n in leaves]), torch.tensor(leaves), torch.tensor(parents[1:]), torch.arange(1, 30), 30
    )
    torch.testing.assert_close(found, f64([value(n) for n in range(30)]), equal_nan=True)


def test_a_node_is_the_mean_of_its_children_and_not_of_its_leaves() -> None:
    values = SegmentValues()(grown([[(0, 1), (1, 3)], [(1, 4)], [(1, 5)], [(0, 2)]], [3, 4, 5, 2], [1, 1, 1, 0]))
    same(values["value/start"][0], 0.5)


# --- trees ------------------------------------------------------------------------------------------------------------


def star(rewards: Sequence[float]) -> Rollout:
    """A tree of depth 1."""
    return grown([[(0, i + 1)] for i in range(len(rewards))], [i + 1 for i in range(len(rewards))], rewards)


REWARDS = [1.0, 0.0, 0.25, 0.0]


def test_a_tree_of_depth_one_is_reinforce_with_the_mean() -> None:
    made = plain.credit(plain.shape_reward(star(REWARDS)))
    same(made.advantage, GroupCenter()(star(REWARDS)))


def test_a_normalised_tree_of_depth_one_is_grpo_with_the_population_deviation() -> None:
    normal = spo_segment | {"advantage": SegmentDifference(normalize=True, whiten=False)}
    made = normal.credit(normal.shape_reward(star(REWARDS)))
    same(made.advantage, GroupZScore(eps=1e-8, unbiased=False)(star(REWARDS)))


def test_siblings_sum_to_zero_also_where_a_leaf_is_invalid() -> None:
    paths = [[(0, 1), (1, 4)], [(1, 5)], [(1, 6)], [(0, 2), (2, 7)], [(2, 8)], [(0, 3)]]
    rewards = [0.3, 0.9, 0.2, 0.6, 0.1, 0.7]
    advantage = plain.credit(plain.shape_reward(grown(paths, [4, 5, 6, 7, 8, 3], rewards))).advantage
    for siblings in ([0, 4, 7], [1, 2, 3], [5, 6]):
        same(advantage[siblings].sum(), 0.0, atol=1e-15)
    rewards[1] = math.nan
    made = plain.credit(plain.shape_reward(grown(paths, [4, 5, 6, 7, 8, 3], rewards)))
    same(made.advantage[[1, 3]], [0.05, -0.05])
    assert made.advantage[2] == 0


def test_edges_without_change_of_value_get_no_gradient() -> None:
    made = credited(WORKED_TREE, whiten=True)
    # The three edges below a node whose leaves are all 0.
    assert made.mask.tolist() == [True, True, True, True, True, False, False, False, True]
    kept = made.advantage[made.mask]
    same(kept.mean(), 0.0, atol=1e-12)
    same(kept.var(), 1.0, rtol=1e-6)
    _, gradient = value_and_gradient(spo_segment, now(made.logp), made)
    assert (gradient[5:8] == 0).all() and (gradient[made.mask] != 0).all()


# --- mask, whitening, invalid -----------------------------------------------------------------------------------------


def token_mean(gap: Tensor, advantage: Tensor, keep: list[int]) -> float:
    """The clipped surrogate as the mean over these steps."""
    ratio = gap.exp().numpy()
    a = advantage.numpy()
    return -float(np.mean([min(ratio[t] * a[t], min(max(ratio[t], 0.8), 1.2) * a[t]) for t in keep]))


def test_a_threshold_above_one_is_the_mean_over_all_tokens() -> None:
    values = SegmentValues()(worked())
    made = plain.credit(UnsureSteps(threshold=2.0)(values))
    loss, gradient = value_and_gradient(plain, now(made.logp + RATIOS), made)
    same(loss, token_mean(RATIOS, made.advantage, list(range(10))))
    assert (gradient[2:9] != 0).any() and made.mask.all()
    masked = plain.credit(UnsureSteps()(values))
    loss, gradient = value_and_gradient(plain, now(masked.logp + RATIOS), masked)
    same(loss, token_mean(RATIOS, made.advantage, [2, 4, 6, 8]))
    assert (gradient[[0, 1, 3, 5, 7, 9]] == 0).all()


def test_the_same_value_at_both_ends_is_no_credit() -> None:
    made = plain.credit(plain.shape_reward(chain([P], [0.5], [[[1, 0], [0.5]]], every=2)))
    assert (made.advantage == 0).all()


def test_whitening_takes_the_unsure_steps_of_the_batch() -> None:
    rollout = chain([P, [0.4, 0.95, 0.2]], [0.0, 1.0], [[[0.4], [0.8]], [[0.25]]], every=2)
    made = credited(rollout, whiten=True)
    raw = np.array([0.4, 0.4, -0.8, -0.8, 0.75, 0.75])
    expected = (raw - raw.mean()) / math.sqrt(raw.var(ddof=1) + 1e-8)
    same(made.advantage[made.mask], expected)


def test_an_invalid_probe_leaves_the_mean_over_the_others() -> None:
    nan = math.nan
    made = plain.credit(plain.shape_reward(chain([P], [0.0], [[[1, nan, 0], [nan, 0.8]]], every=2)))
    same(made.advantage[2:10], [0.3] * 4 + [-0.8] * 4)


def test_a_cut_without_a_valid_probe_gives_no_credit_on_either_side() -> None:
    nan = math.nan
    rollout = chain([P], [0.0], [[[0.4], [nan, nan], [0.2], [0.6]]], every=1)
    same(plain.credit(plain.shape_reward(rollout)).advantage[:10], [0, 0, 0, 0, 0, 0, 0.4, 0.4, -0.6, -0.6])
    made = credited(rollout, whiten=True)
    # What has no value takes no part in the statistics either.
    raw = np.array([0.4, -0.6])
    same(made.advantage[[6, 8]], (raw - raw.mean()) / math.sqrt(raw.var(ddof=1) + 1e-8))
    assert (made.advantage[[2, 4]] == 0).all()


def test_an_invalid_answer_gets_no_credit_at_all() -> None:
    rollout = chain([P, P], [math.nan, 0.0], [[[0.4], [0.8]], [[0.4], [0.8]]], every=2)
    made = plain.credit(plain.shape_reward(rollout))
    assert (made.advantage[:10] == 0).all()
    close(made.advantage[12:20], [0.4] * 4 + [-0.8] * 4)


def test_without_an_unsure_step_nothing_is_credited() -> None:
    sure = chain([[0.95, 0.99], [0.91]], [1.0, 0.0], [[], []], every=5)
    made = credited(sure, whiten=True)
    assert (made.advantage == 0).all() and not made.mask.any()
    loss, gradient = value_and_gradient(spo_segment, now(made.logp + 0.1), made)
    assert loss == 0 and (gradient == 0).all()


def test_a_group_of_one_is_credited() -> None:
    made = plain.credit(plain.shape_reward(chain([[0.5, 0.5]], [1.0], [[[0, 1, 0, 0]]], every=5)))
    same(made.advantage[:2], [0.75, 0.75])


def test_far_ratios_have_no_gradient() -> None:
    made = credited(worked())
    gaps = torch.zeros(10, dtype=torch.float64)
    gaps[6], gaps[8] = 11.0, 9.0
    loss, gradient = value_and_gradient(spo_segment, now(made.logp + gaps), made)
    assert gradient[6] == 0 and gradient[8] > 0
    same(loss, (-0.4 - 0.4 + 0.8 * math.exp(10) + 0.8 * math.exp(9)) / 4)


@pytest.mark.parametrize("rollout", [Chain(every=2, continuations=3), Tree(branching=(3, 2), segment=2)])
def test_an_iteration_samples_credits_and_drops_the_probes(rollout: Chain | Tree) -> None:
    made = problem("binary-verifier", space=SequenceSpace(3, 4), batch=3, pass_rate=0.4, seed=0)
    run = start(made, spo_segment | {"rollout": rollout, "schedule": Schedule()}, seed=0, group=4)
    before = run.policy.logits.detach().clone()
    seen: list[Collected] = []
    collect: Any = run.trainer.collect

    def watched(*arguments: Any) -> Collected:
        seen.append(collect(*arguments))
        return seen[-1]

    run.trainer.collect = watched  # type: ignore[assignment]
    run.step()
    drawn, kept = seen[0].drawn, seen[0].kept
    assert kept is not None and not drawn.reward.isnan().any()
    assert (kept["source"] == Source.POLICY).all() and kept.n_groups == drawn.n_groups == 3
    assert kept.n_trajectories == int((drawn["source"] == Source.POLICY).sum())
    # The meter counts what was sampled: every step is in the rollout once.
    assert run.trainer.meter.spent.tokens == drawn.n_steps
    assert not torch.equal(before, run.policy.logits)
