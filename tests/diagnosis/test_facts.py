"""What docs/diagnose.md says of known estimators, each against a sum over all sequences written out here."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from polopt.advantages.group import GroupZScore, LeaveOneOut
from polopt.aggregations import FixedLength, SequenceMean, SequenceSum
from polopt.core.method import Method
from polopt.core.override import override
from polopt.diagnosis import draws as drawing
from polopt.diagnosis.curve import weight_by_pass_rate
from polopt.diagnosis.diagnose import diagnose, measure_bias
from polopt.diagnosis.estimator import Estimate, estimate
from polopt.diagnosis.follow import follow
from polopt.diagnosis.world import World
from polopt.methods import get_method
from polopt.methods.base.reinforce import BatchBaseline
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.policies.exact import ExactPolicy, SequenceSpace, expected_reward, kl, table_of
from polopt.regularizers.kl import KL, Estimator
from polopt.rewards.shaping import KLPenalty
from polopt.tasks.problems import Problem, problem
from tests.support import same

ENDING = SequenceSpace(3, 2, end=True)
reinforce = get_method("reinforce") | {"advantage": BatchBaseline(baseline="none")}


def measured(method: Method, made: Problem, **options: int) -> Estimate:
    world = World(method, made)
    return estimate(world, world.policy(), world.behaviour(), **options)


def true_gradient(made: Problem) -> Tensor:
    """grad J by central differences of a sum over sequences, one logit at a time; mean over problems, flat."""
    space = made.space

    def objective(table: NDArray[np.float64]) -> float:
        total = 0.0
        for b, s in itertools.product(range(made.batch), range(space.n_sequences)):
            chance = 1.0
            for t in range(int(space.lengths[s])):
                row = np.exp(table[b, int(space.nodes[s, t])])
                chance *= row[int(space.sequences[s, t])] / row.sum()
            total += chance * float(made.reward[b, s])
        return total / made.batch

    table = made.initial.numpy().copy()
    slopes = np.zeros_like(table)
    for place in np.ndindex(*table.shape):
        up, down = table.copy(), table.copy()
        up[place] += 1e-5
        down[place] -= 1e-5
        slopes[place] = (objective(up) - objective(down)) / 2e-5
    return torch.from_numpy(slopes).flatten()


def binary(*rates: float, space: SequenceSpace = ENDING, seed: int = 0) -> Problem:
    return problem("binary-verifier", space=space, batch=len(rates), seed=seed, pass_rate=list(rates))


def grouped(made: Problem, size: int) -> Problem:
    return dataclasses.replace(made, group_sizes=(size,) * made.batch)


# --- baselines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", [None, -2.0, 0.7])
def test_reinforce_is_unbiased_without_and_with_a_constant_baseline(baseline: float | None) -> None:
    made = binary(0.1, 0.5, 0.9)
    method = reinforce
    if baseline is not None:
        method = reinforce | {"advantage": BatchBaseline(baseline="moving-average", start=baseline)}
    found = measured(method, made)
    assert found.kind == "exact"
    same(found.mean, true_gradient(made), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_leave_one_out_is_unbiased(size: int) -> None:
    made = grouped(binary(0.2, 0.8), size)
    found = measured(reinforce | {"advantage": LeaveOneOut()}, made)
    same(found.mean, true_gradient(made), rtol=1e-6, atol=1e-9)


def test_leave_one_out_lowers_the_variance_where_there_is_something_to_subtract() -> None:
    def ratio(rate: float) -> float:
        with_baseline = measured(reinforce | {"advantage": LeaveOneOut()}, binary(rate))
        return with_baseline.noise / measured(reinforce, binary(rate)).noise

    found = {rate: ratio(rate) for rate in (0.02, 0.25, 0.5, 0.75, 0.9, 0.98)}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert found[0.25] < 1
    assert found[0.9] < 0.45
    assert found[0.98] < 0.1
    # Next to nothing to subtract: the mean of three others is mostly noise.
    assert 1 < found[0.02] < 1.1


def test_dr_grpo_is_the_true_gradient_times_g_minus_one_over_g_and_the_budget() -> None:
    for size in (2, 3, 4):
        made = grouped(binary(0.1, 0.6, space=SequenceSpace(3, 2, end=True)), size)
        found = measured(get_method("dr-grpo"), made)
        same(found.mean, (size - 1) / size * true_gradient(made) / made.space.length, rtol=1e-6, atol=1e-9)
        bias = measure_bias(found, true_gradient(made))
        assert bias.angle == pytest.approx(0, abs=1e-5)
        assert bias.scale == pytest.approx((size - 1) / size / made.space.length, rel=1e-6)


# --- the group z-score ------------------------------------------------------------------------------------------------


def test_the_group_z_score_is_biased_over_prompts_of_unequal_difficulty() -> None:
    method = reinforce | {"advantage": GroupZScore()}
    made = grouped(binary(0.05, 0.5), 8)
    assert measure_bias(measured(method, made), true_gradient(made)).angle > 3
    alone = grouped(binary(0.05), 8)
    assert measure_bias(measured(method, alone), true_gradient(alone)).angle < 1e-3


def z_score_weight(p: float, n: int, eps: float = 1e-4) -> float:
    """c(p) = E_k[k (n - k) / (n sd_k)] / (n p (1 - p)), k right of n, sd_k the sample standard deviation."""
    total = 0.0
    for k in range(1, n):
        sd = math.sqrt(k * (n - k) / (n * (n - 1))) + eps
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k) * k * (n - k) / (n * sd)
    return total / (n * p * (1 - p))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_weight_of_a_prompt_under_the_z_score(size: int) -> None:
    rates = (0.05, 0.3, 0.5, 0.9)
    curve = weight_by_pass_rate(reinforce | {"advantage": GroupZScore()}, size, rates=rates)
    assert curve.kind == "exact"
    same(curve.weight, [z_score_weight(p, size) for p in rates])
    if size > 2:
        assert curve.relative[0] > curve.relative[1] > 1
    else:
        # Two responses differ by the same amount whatever they are.
        assert max(curve.relative) == pytest.approx(min(curve.relative))


def test_in_a_large_group_the_weight_is_one_over_the_standard_deviation() -> None:
    rates = (0.1, 0.2, 0.5, 0.8, 0.9)
    curve = weight_by_pass_rate(reinforce | {"advantage": GroupZScore()}, 512, rates=rates, space=SequenceSpace(2, 1))
    for p, weight in zip(rates, curve.weight, strict=True):
        assert weight == pytest.approx(1 / math.sqrt(p * (1 - p)), rel=0.01)


@pytest.mark.parametrize("slug", ["rloo", "dr-grpo"])
def test_without_the_division_every_prompt_weighs_the_same(slug: str) -> None:
    curve = weight_by_pass_rate(get_method(slug), 4)
    assert max(curve.relative) == pytest.approx(1)
    assert min(curve.relative) == pytest.approx(1)


# --- lengths ----------------------------------------------------------------------------------------------------------

LONG = SequenceSpace(3, 3, end=True)
SHORT_RIGHT, LONG_RIGHT = LONG.index([0, 2]), LONG.index([0, 0, 0])
SHORT_WRONG, LONG_WRONG = LONG.index([1, 2]), LONG.index([1, 1, 1])


def of_two_lengths() -> Problem:
    """Right and wrong answers of two and of three tokens, all equally likely."""
    named = [SHORT_RIGHT, LONG_RIGHT, SHORT_WRONG, LONG_WRONG]
    chance = torch.full((1, LONG.n_sequences), 0.2 / (LONG.n_sequences - 4), dtype=torch.float64)
    chance[0, named] = 0.2
    reward = torch.zeros_like(chance)
    reward[0, [SHORT_RIGHT, LONG_RIGHT]] = 1.0
    table = table_of(LONG, chance.log())
    return Problem("lengths", LONG, MappingProxyType({"correct": reward}), table, table, {}, (4,))


def rates_of_change(method: Method) -> Tensor:
    """d log pi(y) / dt along the method's expected direction, of length one."""
    made = of_two_lengths()
    direction = measured(method, made).mean
    policy = made.policy()
    moved = policy.logits + 1e-6 * (direction / direction.norm()).view_as(policy.logits)
    after = ExactPolicy(made.space, 1, moved).log_probabilities()
    return ((after - policy.log_probabilities()) / 1e-6)[0].detach()


def test_the_mean_over_a_response_favours_short_right_and_long_wrong_answers() -> None:
    base = get_method("dr-grpo")
    mean, fixed = (rates_of_change(base | {"aggregation": a}) for a in (SequenceMean(), FixedLength()))
    assert mean[SHORT_RIGHT] - mean[LONG_RIGHT] > fixed[SHORT_RIGHT] - fixed[LONG_RIGHT] + 0.05
    assert mean[LONG_WRONG] - mean[SHORT_WRONG] > fixed[LONG_WRONG] - fixed[SHORT_WRONG] + 0.05
    truth = true_gradient(of_two_lengths())
    for aggregation, low, high in ((SequenceMean(), 1.0, 90.0), (FixedLength(), 0.0, 1e-5), (SequenceSum(), 0.0, 1e-5)):
        angle = measure_bias(measured(base | {"aggregation": aggregation}, of_two_lengths()), truth).angle
        assert low <= angle <= high


def test_the_mean_over_a_response_divides_what_a_step_learns_by_its_length() -> None:
    made = of_two_lengths()
    world = World(get_method("grpo"), made)
    policy = world.policy()
    rollout = world.filtered(world.rollout(policy, policy, drawing.enumerated(policy, made.group_sizes)))
    slope = world.slopes(policy, rollout)["logp"]
    advantage = world.method.credit(rollout).advantage
    lengths = rollout.lengths[rollout.trajectory]
    same(slope * lengths * rollout.n_trajectories, -advantage)


# --- ratios -----------------------------------------------------------------------------------------------------------


def on_stale_data(method: Method) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slope, advantage and log-ratio of every step of every group of a stale behaviour, and trajectory of each step."""
    made = grouped(problem("stale-behaviour", space=ENDING, seed=1, age=6, lr=2.0), 3)
    world = World(method, made)
    policy, behaviour = world.policy(), world.behaviour()
    rollout = world.rollout(policy, behaviour, drawing.enumerated(behaviour, made.group_sizes))
    slope = world.slopes(policy, rollout)["logp"] * rollout.n_trajectories
    gap = policy.evaluate(rollout, frozenset({"logp"})).logp.detach() - rollout.logp
    return slope, method.credit(rollout).advantage, gap, rollout.trajectory


def test_ppo_s_clip_binds_one_side_only() -> None:
    method = get_method("grpo") | {"objective": ClippedSurrogate(0.2, 0.28), "aggregation": SequenceSum()}
    slope, advantage, gap, _ = on_stale_data(method)
    ratio = gap.exp()
    cases = {
        "risen and good": (ratio > 1.28) & (advantage > 0),
        "fallen and bad": (ratio < 0.8) & (advantage < 0),
        "risen and bad": (ratio > 1.28) & (advantage < 0),
        "fallen and good": (ratio < 0.8) & (advantage > 0),
    }
    assert all(bool(case.any()) for case in cases.values())
    for name in ("risen and good", "fallen and bad"):
        assert (slope[cases[name]] == 0).all()
    free = ~(cases["risen and good"] | cases["fallen and bad"])
    same(slope[free], (-ratio * advantage)[free])
    assert (slope[cases["risen and bad"]].abs() > 1.28 * advantage[cases["risen and bad"]].abs()).all()


def test_gspo_s_ratio_is_the_geometric_mean_over_the_response() -> None:
    # Bounds that never bind, so that the ratio itself is seen.
    free = override(get_method("gspo"), {"objective.low": 0.999, "objective.high": 1e6})
    slope, advantage, gap, trajectory = on_stale_data(free)
    contrast = advantage != 0
    for i in range(0, int(trajectory[-1]) + 1, 7):
        mine = trajectory == i
        if not bool((contrast & mine).any()):
            continue
        lengths = int(mine.sum())
        mean = math.exp(sum(gap[mine].tolist()) / lengths)
        same(slope[mine] * lengths, -mean * advantage[mine])
    # One step: the ratio of the token, which is that of PPO without its clip.
    open_clip = get_method("grpo") | {"objective": ClippedSurrogate(0.999, 1e6)}
    other = on_stale_data(open_clip)[0]
    single = torch.bincount(trajectory)[trajectory] == 1
    same(slope[single], other[single])
    assert (slope[~single & contrast] - other[~single & contrast]).abs().max() > 0.01


def test_gspo_does_not_see_where_in_the_response_the_ratio_moved() -> None:
    method = get_method("gspo")
    made = problem("stale-behaviour", space=SequenceSpace(3, 2), seed=1)
    world = World(method, made)
    policy, behaviour = world.policy(), world.behaviour()
    rollout = world.rollout(policy, behaviour, drawing.enumerated(behaviour, (2,)))
    gap = policy.evaluate(rollout, frozenset({"logp"})).logp.detach() - rollout.logp
    now = policy.evaluate(rollout, frozenset({"logp"})).logp.detach()
    turned = rollout.with_columns(step={"logp": now - gap.view(-1, 2).flip(1).flatten()})
    same(world.slopes(policy, turned)["logp"], world.slopes(policy, rollout)["logp"])
    by_step = World(get_method("grpo"), made)
    difference = by_step.slopes(policy, turned)["logp"] - by_step.slopes(policy, rollout)["logp"]
    assert difference.abs().max() > 1e-3


# --- KL estimators ----------------------------------------------------------------------------------------------------


def with_reference(space: SequenceSpace) -> Problem:
    """No reward, and a policy away from its reference."""
    made = problem("random-rewards", space=space, seed=3)
    reference = made.initial + 0.7 * problem("random-rewards", space=space, seed=4).initial
    nothing = MappingProxyType({"reward": torch.zeros_like(made.reward)})
    return dataclasses.replace(made, rewards=nothing, reference=reference, group_sizes=(1,))


def node_divergences(made: Problem, *, forward: bool) -> Tensor:
    """grad of sum_k d(k) KL(pi_k || ref_k), or KL(ref_k || pi_k), d(k) the chance of prefix k held fixed; flat."""
    policy = made.policy()
    logits = policy.logits.detach().clone().requires_grad_()
    chance, reference = logits[0].softmax(-1), made.reference[0].softmax(-1)
    p, q = (reference, chance) if forward else (chance, reference)
    reach = torch.zeros(made.space.n_nodes, dtype=torch.float64)
    whole = policy.probabilities()[0].detach()
    for s in range(made.space.n_sequences):
        for t in range(int(made.space.lengths[s])):
            reach[made.space.nodes[s, t]] += whole[s]
    value = (reach * (p * (p / q).log()).sum(-1)).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    return gradient.flatten()


def value_of(made: Problem, estimator: Estimator) -> float:
    """E under the policy of the estimate of a whole response."""
    policy, space = made.policy(), made.space
    own, ref = made.initial[0].log_softmax(-1), made.reference[0].log_softmax(-1)
    total = 0.0
    for s, chance in enumerate(policy.probabilities()[0].tolist()):
        for t in range(int(space.lengths[s])):
            at = int(space.nodes[s, t]), int(space.sequences[s, t])
            u = float(ref[at] - own[at])
            total += chance * {"k1": -u, "k2": u * u / 2, "k3": math.exp(u) - u - 1}[estimator]
    return total


@pytest.mark.parametrize("space", [SequenceSpace(4, 1), ENDING], ids=["one step", "several steps"])
def test_kl_estimators_in_value(space: SequenceSpace) -> None:
    made = with_reference(space)
    reference = ExactPolicy(space, 1, made.reference).probabilities()
    true = float(kl(made.policy().probabilities(), reference).detach())
    assert value_of(made, "k1") == pytest.approx(true)
    assert value_of(made, "k3") == pytest.approx(true)
    assert abs(value_of(made, "k2") / true - 1) > 0.02


def in_the_loss(estimator: Estimator) -> Method:
    return reinforce | {"regularizer": KL(beta=1.0, estimator=estimator)}


@pytest.mark.parametrize("space", [SequenceSpace(4, 1), ENDING], ids=["one step", "several steps"])
def test_kl_estimators_in_gradient(space: SequenceSpace) -> None:
    """Through the log-prob: k1 teaches nothing, k2 the reverse KL of each step, k3 the forward KL of each step."""
    made = with_reference(space)
    nothing = measured(in_the_loss("k1"), made)
    same(nothing.mean, torch.zeros(made.initial.numel()))
    assert nothing.length == 0
    same(measured(in_the_loss("k2"), made).mean, -node_divergences(made, forward=False))
    same(measured(in_the_loss("k3"), made).mean, -node_divergences(made, forward=True))


def sequence_kl_gradient(made: Problem) -> Tensor:
    policy = made.policy()
    reference = ExactPolicy(made.space, 1, made.reference).probabilities().detach()
    (gradient,) = torch.autograd.grad(kl(policy.probabilities(), reference).sum(), policy.logits)
    return gradient.flatten()


def test_of_a_single_step_k2_has_the_gradient_of_the_reverse_kl() -> None:
    made = with_reference(SequenceSpace(4, 1))
    same(measured(in_the_loss("k2"), made).mean, -sequence_kl_gradient(made))


def test_of_several_steps_only_the_kl_in_the_reward_has_it() -> None:
    """In the loss a step does not answer for the divergence of the steps that it leads to."""
    made = with_reference(ENDING)
    assert measure_bias(measured(in_the_loss("k2"), made), -sequence_kl_gradient(made)).angle > 0.5
    same(measured(reinforce | {"reward": KLPenalty(beta=1.0)}, made).mean, -sequence_kl_gradient(made))


# --- groups without contrast, and where it leads ----------------------------------------------------------------------


def test_groups_without_contrast_teach_nothing_relative_to_their_group() -> None:
    made = binary(0.25)
    found = diagnose(get_method("grpo"), made, curve=False, fixed_point=False)
    assert found.all_right.probability == pytest.approx(0.25**4)
    assert found.all_wrong.probability == pytest.approx(0.75**4)
    assert found.all_right.share == found.all_wrong.share == 0
    plain = diagnose(reinforce, made, curve=False, fixed_point=False)
    assert plain.all_right.share > 0
    assert plain.all_wrong.share == 0


def test_dropping_them_rescales_the_gradient_and_nothing_else() -> None:
    made = binary(0.25)
    dynamic = get_method("grpo") | {"filter": get_method("dapo").filter}
    kept, every = measured(dynamic, made), measured(get_method("grpo"), made)
    share = 1 - 0.25**4 - 0.75**4
    assert kept.kept == pytest.approx(share)
    same(kept.mean * share, every.mean)


def test_rloo_ends_at_the_reward_tilted_reference() -> None:
    made = problem("random-rewards", space=ENDING, seed=2)
    point = follow(World(override(get_method("rloo"), {"reward.beta": 0.5}), made), local=True)
    weights = made.policy().probabilities().detach()[0] * (made.reward[0] / 0.5).exp()
    same(point.policy.probabilities().detach()[0], weights / weights.sum(), rtol=1e-2, atol=1e-4)
    assert point.converged and point.exact
    assert point.target_tv is not None and point.target_tv < 1e-3


def test_without_a_kl_one_of_several_right_answers_wins() -> None:
    made = binary(0.25, space=SequenceSpace(3, 2))
    right = made.reward[0] > 0
    assert int(right.sum()) > 1
    point = follow(World(get_method("dr-grpo"), made), local=True)
    assert point.reward > 0.999
    assert float(point.policy.probabilities()[0, right].max().detach()) > 0.99
    assert point.rewards[0] == pytest.approx(0.25)
    assert float(expected_reward(point.policy, made.reward).detach()) == pytest.approx(point.reward)


# --- the page ---------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "diagnose.md").read_text(encoding="utf-8")


def row(start: str) -> list[float]:
    """Numbers of the page's table row that starts so."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {start}")]
    return [float(cell) for cell in line.strip("| ").split("|")[1:]]


def test_the_tables_of_the_page_are_what_is_measured() -> None:
    for start, p in (("p = 0.1 or 0.9", 0.1), ("p = 0.02 or 0.98", 0.02)):
        *finite, limit = row(start)
        expected = [z_score_weight(p, n) / z_score_weight(0.5, n) for n in (2, 4, 8, 16, 64, 256)]
        assert finite == [round(x, 2) for x in expected]
        assert limit == round(0.5 / math.sqrt(p * (1 - p)), 2)
    for start, aggregation in (("constant divisor", FixedLength()), ("mean over the response", SequenceMean())):
        rates = rates_of_change(get_method("dr-grpo") | {"aggregation": aggregation})
        expected = [float(rates[i]) for i in (SHORT_RIGHT, LONG_RIGHT, SHORT_WRONG, LONG_WRONG)]
        assert row(start) == [round(x, 2) for x in expected]


def test_the_angles_of_the_page_are_what_is_measured() -> None:
    def angle(slug: str, made: Problem) -> int:
        return round(diagnose(get_method(slug), made, curve=False, fixed_point=False).bias.angle)

    lengths = problem("length-correlated-rewards", space=LONG)
    assert f"{angle('grpo', lengths)}° against {angle('dr-grpo', lengths)}°" in PAGE
    stale = problem("stale-behaviour", space=ENDING, batch=3)
    softer = [angle(slug, stale) for slug in ("sapo", "cispo")]
    said = f"{angle('grpo', stale)}° from the true one, the soft bounds of SAPO and CISPO {softer[0]}° and {softer[1]}°"
    assert said in PAGE
