"""Draws and estimates against loops over everything that can be drawn."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from polopt.advantages.group import LeaveOneOut
from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation, Loss, per_step
from polopt.core.method import Method
from polopt.core.part import Part, declared
from polopt.core.policy import MASKED
from polopt.core.rollout import Counts, Rollout
from polopt.diagnosis import draws as drawing
from polopt.diagnosis import estimator
from polopt.diagnosis.diagnose import diagnose, measure_bias
from polopt.diagnosis.estimator import estimate, expected_direction
from polopt.diagnosis.follow import follow
from polopt.diagnosis.world import Catalogue, World
from polopt.methods import get_method, methods
from polopt.methods.base.ppo import GAE
from polopt.methods.base.reinforce import BatchBaseline
from polopt.policies.exact import SequenceSpace, policy_gradient
from polopt.tasks.problems import Problem, problem
from polopt.training.build import composed
from tests.support import same

SMALL = SequenceSpace(2, 2, end=True)


def verifier(*rates: float, size: int = 3, space: SequenceSpace = SMALL) -> Problem:
    made = problem("binary-verifier", space=space, batch=len(rates), pass_rate=list(rates))
    return dataclasses.replace(made, group_sizes=(size,) * len(rates))


def brute_force(method: Method, made: Problem) -> Tensor:
    """The ascent direction, over every ordered group of a single problem, each by autograd through the policy."""
    (size,) = made.group_sizes
    policy, behaviour = made.policy(), made.sampler()
    chance = behaviour.probabilities()[0].tolist()
    lengths = made.space.lengths.tolist()
    counts = Counts(size * sum(p * n for p, n in zip(chance, lengths, strict=True)), size, 1)
    total = torch.zeros_like(policy.logits)
    for members in itertools.product(range(made.space.n_sequences), repeat=size):
        index, none = torch.tensor(members), torch.zeros(size, dtype=torch.int64)
        rollout = behaviour.rollout(none, index, none)
        columns = {"reward": made.reward[0, index], "limit": torch.full((size,), made.space.length)}
        reference = policy.evaluate(rollout, frozenset({"logp/ref"}))["logp/ref"].detach()
        rollout = rollout.with_columns(trajectory=columns, step={"logp/ref": reference})
        credited = method.credit(method.shape_reward(rollout))
        credited = dataclasses.replace(credited, batch_counts=counts)
        loss, _ = method.loss(policy.evaluate(credited, method.evaluates), credited)
        (gradient,) = torch.autograd.grad(loss, policy.logits)
        total -= math.prod(chance[s] for s in members) * gradient
    return total.flatten()


GROUPWISE = ["grpo", "dr-grpo", "rloo", "cispo", "gspo", "sapo"]


@pytest.mark.parametrize("slug", GROUPWISE)
@pytest.mark.parametrize("kind", ["binary-verifier", "stale-behaviour"])
def test_the_mean_is_that_of_every_ordered_group(slug: str, kind: str) -> None:
    made = dataclasses.replace(problem(kind, space=SMALL, seed=1), group_sizes=(3,))
    world = World(get_method(slug), made)
    found = estimate(world, world.policy(), world.behaviour())
    assert found.kind == "exact"
    assert found.draws == math.comb(made.space.n_sequences + 2, 3)
    same(found.mean, brute_force(world.method, made))
    if kind == "binary-verifier":
        chosen = drawing.enumerated(world.policy(), made.group_sizes)
        same(expected_direction(world, world.policy(), chosen, Catalogue.of(world.policy())), found.mean)


def test_multisets_are_those_of_itertools_with_their_probabilities() -> None:
    made = verifier(0.3, 0.6)
    policy = made.policy()
    found = drawing.enumerated(policy, (3, 2))
    p = policy.probabilities().tolist()
    expected: dict[tuple[int, ...], float] = {}
    for b, size in enumerate((3, 2)):
        for members in itertools.product(range(len(p[b])), repeat=size):
            key = (b, *sorted(members))
            expected[key] = expected.get(key, 0.0) + math.prod(p[b][s] for s in members) / 2
    actual = {}
    for g in range(len(found.chance)):
        mine = found.group == g
        (b,) = set(found.problem[mine].tolist())
        actual[(b, *sorted(found.sequence[mine].tolist()))] = float(found.chance[g].detach())
    assert actual.keys() == expected.keys()
    for key, chance in expected.items():
        assert actual[key] == pytest.approx(chance)
    assert drawing.count_groups(len(p[0]), (3, 2)) == len(expected)


def test_enumeration_agrees_with_a_million_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimator, "GROUPS", 250_000)
    world = World(get_method("grpo"), verifier(0.25, size=4))
    policy = world.policy()
    exact = estimate(world, policy, policy)
    sampled = estimate(world, policy, policy, limit=0)
    assert (exact.kind, sampled.kind, sampled.draws) == ("exact", "sampled groups", 250_000)
    assert exact.error == 0
    # The squared distance has expectation `error`; ten times that is far beyond any chance.
    assert float((sampled.mean - exact.mean).square().sum()) < 10 * sampled.error
    assert sampled.error == pytest.approx(exact.noise / 4 / 250_000, rel=0.02)
    assert sampled.right_before == pytest.approx(exact.right_before, rel=0.1)


def test_what_depends_on_the_batch_is_found_out() -> None:
    made = verifier(0.25)
    # Right and wrong are mirror images: the batch's mean is that of many of its groups.
    symmetric = verifier(0.1, 0.5, 0.9, space=SequenceSpace(2, 1))

    def kind(method: Method) -> str:
        worlds = [World(method, made), World(method, symmetric)]
        (found,) = {estimate(world, world.policy(), world.policy(), batches=2).kind for world in worlds}
        return found

    reinforce = get_method("reinforce")
    assert kind(get_method("grpo")) == "exact"
    assert kind(reinforce | {"advantage": BatchBaseline(baseline="none")}) == "exact"
    assert kind(reinforce | {"advantage": BatchBaseline(baseline="mean")}) == "sampled batches"
    assert kind(reinforce | {"advantage": LeaveOneOut(normalize=True)}) == "sampled batches"
    assert kind(get_method("ppo")) == "sampled batches"
    assert kind(get_method("ppo") | {"advantage": GAE(whiten=False)}) == "exact"


def test_a_batch_baseline_shrinks_the_gradient_by_the_size_of_the_batch() -> None:
    made = verifier(0.3, size=2)
    world = World(get_method("reinforce"), made)
    policy = world.policy()
    found = estimate(world, policy, policy, prompts=2, batches=400)
    truth = policy_gradient(policy, made.reward).flatten().detach()
    gap = found.mean - 3 / 4 * truth
    assert float(gap.square().sum()) < 10 * found.error
    bias = measure_bias(found, truth)
    assert bias.norm_ratio == pytest.approx(0.75, abs=4 * bias.norm_error)
    assert 0 < bias.norm_error < 0.1
    assert bias.angle < 4 * bias.angle_floor


def test_the_noise_is_that_of_independent_batches() -> None:
    """n tr Cov of a group, by hand: the variance of a batch of one group, per trajectory."""
    made = verifier(0.3, size=2)
    world = World(get_method("rloo"), made)
    policy = world.policy()
    found = estimate(world, policy, policy)
    p = policy.probabilities()[0].detach()
    score = torch.stack(
        [torch.autograd.grad(policy.log_probabilities()[0, s], policy.logits)[0].flatten() for s in range(len(p))]
    )
    r = made.reward[0]
    first = second = torch.zeros(())
    for i, j in itertools.product(range(len(p)), repeat=2):
        g = (r[i] - r[j]) * (score[i] - score[j]) / 2
        first, second = first + p[i] * p[j] * g, second + p[i] * p[j] * g.square().sum()
    same(found.noise, 2 * (second - first.square().sum()))


def test_values_are_exact_whatever_the_reward_parts_add() -> None:
    made = problem("random-rewards", space=SequenceSpace(3, 2, end=True), seed=1)
    made = dataclasses.replace(made, reference=made.initial.flip(1))
    world = World(get_method("ppo"), made)
    policy = world.policy()
    values = world.exact_values(policy)[0]
    own, ref = made.initial[0].log_softmax(-1), made.reference[0].log_softmax(-1)
    space, p = made.space, policy.probabilities()[0].detach()
    for node in range(space.n_nodes):
        mass = total = 0.0
        for s in range(space.n_sequences):
            for t in range(int(space.lengths[s])):
                if int(space.nodes[s, t]) != node:
                    continue
                later = float(made.reward[0, s])
                for u in range(t, int(space.lengths[s])):
                    at = int(space.nodes[s, u]), int(space.sequences[s, u])
                    later -= 0.05 * float(own[at] - ref[at])
                mass += float(p[s])
                total += float(p[s]) * later
        assert float(values[node]) == pytest.approx(total / mass)


def test_the_effective_sample_size_is_that_of_the_ratios() -> None:
    made = problem("stale-behaviour", space=SequenceSpace(3, 2), seed=0)
    found = diagnose(get_method("grpo"), made, curve=False, fixed_point=False)
    pi, mu = made.policy().probabilities()[0], made.sampler().probabilities()[0]
    assert found.ess_sequence == pytest.approx(1 / float((pi * pi / mu).sum().detach()))
    assert 0 < found.ess_sequence < found.ess_step < 1
    fresh = diagnose(get_method("grpo"), verifier(0.3), curve=False, fixed_point=False)
    assert fresh.ess_sequence == pytest.approx(1)
    assert fresh.ess_step == pytest.approx(1)


@dataclasses.dataclass(frozen=True)
class Unknown(Part):
    """Asks for what no exact policy computes."""

    evaluates = frozenset({"attention"})

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        return per_step(evaluation["attention"])


@dataclasses.dataclass(frozen=True)
class Needy(Unknown):
    """Asks for a column that nobody gives."""

    needs = frozenset({"logp/teacher"})
    evaluates = frozenset()


@pytest.mark.parametrize(("part", "words"), [(Unknown(), "'attention'"), (Needy(), "'logp/teacher'")])
def test_a_method_from_outside_the_exact_world_is_told_so(part: Part, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        World(get_method("grpo") | {"objective": part}, verifier(0.3))


def test_the_value_of_each_beta_comes_from_the_parts_that_read_a_model() -> None:
    made = verifier(0.3)
    assert World(get_method("rloo"), made).beta() == 0.05
    assert World(get_method("grpo"), made).beta() == 0.0
    assert World(get_method("grpo") | {"regularizer": get_method("rloo").reward}, made).beta() == 0.05


def test_a_filter_that_keeps_nothing_leaves_no_gradient() -> None:
    made = verifier(0.3, size=1)
    found = diagnose(get_method("dapo"), made, curve=False)
    assert found.kept == 0
    assert math.isnan(found.bias.angle)
    assert found.fixed_point is not None
    assert found.fixed_point.reward == pytest.approx(0.3)


def test_a_sampled_path_says_so() -> None:
    world = World(get_method("rloo"), verifier(0.3))
    point = follow(world, local=False, steps=20)
    assert (point.exact, point.steps, len(point.rewards)) == (False, 20, 21)
    assert point.reward > 0.5
    assert not follow(world, local=True, seconds=0.0).converged


@pytest.mark.parametrize("slug", list(methods()))
@pytest.mark.parametrize("kind", ["multi-reward", "unequal-groups"])
def test_every_method_is_diagnosed(slug: str, kind: str) -> None:
    made, method = problem(kind, space=SMALL, batch=2), get_method(slug)
    if method.offline:
        with pytest.raises(UsageError, match="--pairs on-policy"):
            diagnose(method, made)
        try:
            method = composed(method, {}, pairs="on-policy")
        except UsageError:
            return  # what its data say nobody can sample
    own = (declared(method.rollout, "gives") - {"limit", "turn"}) | MASKED
    if own & (method | {"rollout": None}).needs:
        # What the method's own way to sample finds out is not in groups that are enumerated.
        with pytest.raises(UsageError, match=f"{slug!r}: its .* needs column"):
            diagnose(method, made)
        return
    found = diagnose(method, made, prompts=2, seconds=0.2, curve=False)
    made_plain = found.as_dict()
    assert made_plain["slug"] == slug
    assert math.isfinite(found.bias.norm_ratio)
    assert 0 <= found.kept <= 1
