"""The card of differential information: laws, fit, entropy, where DPO settles, and the pairs of the recipe."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.preference.did import InformativePairs, did
from polopt.methods.preference.dpo import DPO, dpo
from polopt.policies.differential_information import (
    did_entropy,
    differential_information,
    power_law_fit,
    rejected_law,
)
from tests.support import close, f64, now, same

REFERENCE, TARGET, BETA = f64([0.4, 0.3, 0.2, 0.1]), f64([0.7, 0.1, 0.15, 0.05]), 0.5


def laws(seed: int, size: int = 7, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, size, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(count)]


def test_worked_example() -> None:
    reference, target = REFERENCE.log(), TARGET.log()
    close(differential_information(target, reference).exp(), [0.525, 0.1, 0.225, 0.15], digits=10)
    close(did_entropy(target, reference)[0], 1.1887362879, digits=10)
    rejected = rejected_law(reference, target, BETA)
    close(rejected.exp(), [0.25316868, 0.43506174, 0.19336077, 0.11840881], digits=8)
    log_q = differential_information(reference, rejected)
    close(torch.sigmoid(log_q[0] - log_q), [0.5, 0.69616757, 0.60435608, 0.65166852], digits=8)
    for law, entropy in (([0.97, 0.01, 0.01, 0.01], 0.3243128238), ([0.30, 0.27, 0.23, 0.20], 1.3110253812)):
        close(did_entropy(f64(law).log(), reference)[0], entropy, digits=10)


@pytest.mark.parametrize("seed", range(3))
def test_bayes_rule_and_scale(seed: int) -> None:
    law, before, _ = laws(seed)
    q = differential_information(law, before)
    same(q.exp().sum(-1), [1.0, 1.0])
    same((before + q).log_softmax(-1), law)
    same(differential_information(law + 3.0, before - 5.0), q)
    same(differential_information(law, law).exp(), torch.full_like(law, 1 / 7))
    same(did_entropy(law, law)[0], [math.log(7)] * 2)
    entropy, effective = did_entropy(law + 3.0, before - 5.0)
    same(entropy, -(q.exp() * q).sum(-1))
    same(effective, 1 / q.exp().square().sum(-1))
    assert bool((entropy < math.log(7)).all())


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_the_closed_form_is_the_power_law(beta: float) -> None:
    reference, target, other = laws(3)
    rejected = rejected_law(reference, target, beta)
    slope, fit = power_law_fit(rejected, reference, target)
    same(slope, [beta, beta])
    same(fit, [1.0, 1.0])
    log_l = reference.numpy() + beta * (reference - target).numpy()
    same(rejected.exp(), np.exp(log_l) / np.exp(log_l).sum(-1, keepdims=True))
    same(rejected_law(reference, target, 0.0), reference)
    same(rejected_law(reference, reference, beta), reference)
    # Of laws without such a relation the fit is that of least squares.
    slope, fit = power_law_fit(other, reference, target)
    for row in range(2):
        x, y = (target - reference)[row].numpy(), (reference - other)[row].numpy()
        same(slope[row], np.polyfit(x, y, 1)[0])
        same(fit[row], np.corrcoef(x, y)[0, 1] ** 2)
        assert float(fit[row]) < 0.99


def expected_gradient(logits: Tensor, reference: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Of DPO's loss with the chosen answer from the reference and the rejected one from its law, all pairs weighted."""
    size = len(logits)
    first, second = (index.flatten() for index in torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))
    members = torch.stack([first, second], dim=1).flatten()
    rollout = Rollout.from_arrays(
        range(2 * size**2),
        torch.arange(size**2).repeat_interleave(2),
        step={"logp/ref": reference[members]},
        trajectories={"label": f64([1.0, 0.0] * size**2)},
    )
    leaf = logits.clone().requires_grad_()
    evaluation = now(reference[members])
    evaluation.columns["logp"] = leaf.log_softmax(-1)[members]  # type: ignore[index]
    terms = DPO(beta=beta)(evaluation, rollout).value
    (gradient,) = torch.autograd.grad((terms * (reference.exp()[first] * rejected.exp()[second])).sum(), leaf)
    return gradient


@pytest.mark.parametrize("seed", range(3))
def test_dpo_settles_at_the_target_for_the_matching_beta_alone(seed: int) -> None:
    reference, target, other = (law[0] for law in laws(seed))
    rejected = rejected_law(reference, target, 0.4)
    assert float(expected_gradient(target, reference, rejected, 0.4).abs().max()) < 1e-14
    for wrong in (
        expected_gradient(target, reference, rejected, 0.8),
        expected_gradient(target, reference, other, 0.4),
        expected_gradient(reference, reference, rejected, 0.4),
    ):
        assert float(wrong.abs().max()) > 1e-3


def test_the_chosen_answers_lose_likelihood_by_the_divergence() -> None:
    reference, target, _ = laws(5)
    change = (reference.exp() * (target - reference)).sum(-1)
    kl = [
        sum(math.exp(r) * (r - t) for r, t in zip(*rows, strict=True))
        for rows in zip(reference.tolist(), target.tolist(), strict=True)
    ]
    same(change, [-value for value in kl])
    assert bool((change < 0).all())


def test_the_sample_estimate() -> None:
    law, before, proposal = laws(6)
    uniform = torch.full_like(law, -math.log(7))
    same(did_entropy(law, before, uniform)[0], did_entropy(law, before)[0])
    # By hand, on a few answers with a law of their own.
    drawn = torch.tensor([0, 3, 3, 5])
    entropy, effective = did_entropy(law[:, drawn], before[:, drawn], proposal[:, drawn])
    for row in range(2):
        u = (law - before)[row, drawn].numpy()
        w = u - proposal[row, drawn].numpy()
        share = np.exp(w) / np.exp(w).sum()
        same(entropy[row], -(share * (u - np.log(np.exp(w).mean()))).sum())
        same(effective[row], 1 / (share**2).sum())


def test_the_sample_estimate_converges() -> None:
    law, before, proposal = (values[0] for values in laws(7))
    drawn = torch.multinomial(proposal.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    estimate = did_entropy(law[drawn], before[drawn], proposal[drawn])[0]
    assert float(estimate) == pytest.approx(float(did_entropy(law, before)[0]), abs=0.02)


# --- the recipe's pairs ----------------------------------------------------------------------------------------------


def groups(values: list[float], copies: int = 1) -> Rollout:
    size = len(values)
    return Rollout.from_arrays(
        range(size * copies),
        torch.arange(copies).repeat_interleave(size),
        trajectories={"score": f64(values * copies), "member": torch.arange(size).repeat(copies)},
    )


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_members_are_drawn_by_their_laws(scale: float) -> None:
    values, copies = [0.0, 1.0, -0.5, math.nan], 20_000
    kept = InformativePairs(scale=scale)(groups(values, copies))
    assert kept.n_groups == copies and kept.n_trajectories == 2 * copies
    table = torch.zeros(4, 4)
    place = kept["member"].view(-1, 2)
    winner_first = kept["label"].view(-1, 2)[:, 0] == 1
    winner = torch.where(winner_first, place[:, 0], place[:, 1])
    loser = torch.where(winner_first, place[:, 1], place[:, 0])
    table.index_put_((winner, loser), torch.ones(copies), accumulate=True)
    for w in range(3):
        weights = [math.exp(-scale * v) if i != w else 0.0 for i, v in enumerate(values[:3])]
        for lo in range(3):
            chance = weights[lo] / sum(weights) / 3
            error = 5 * math.sqrt(chance * (1 - chance) / copies) + 1e-12
            assert float(table[w, lo]) / copies == pytest.approx(chance, abs=error)
    assert float(table[3].sum() + table[:, 3].sum()) == 0


def test_equal_rewards_make_any_pair_and_groups_of_one_make_none() -> None:
    kept = InformativePairs()(groups([0.7, 0.7]))
    assert sorted(kept["label"].tolist()) == [0.0, 1.0]
    assert InformativePairs()(groups([0.7])).n_trajectories == 0
    assert InformativePairs()(groups([0.7, math.nan])).n_trajectories == 0
    rollout = Rollout.from_arrays(range(6), [0, 1, 1, 2, 2, 2], trajectories={"score": f64([1, 0, 1, 0, 0, 1])})
    kept = InformativePairs()(rollout)
    assert kept.n_groups == 2 and kept["label"].view(2, 2).sum(1).tolist() == [1.0, 1.0]
    # Any scale, extreme ones too, draws a pair.
    assert InformativePairs(scale=1e6)(groups([0.0, 1.0, 2.0])).n_trajectories == 2


def test_draws_are_a_function_of_seed_and_state() -> None:
    def labels(part: InformativePairs) -> list[list[float]]:
        return [part(groups([0.0, 1.0, 2.0], 20))["member"].tolist() for _ in range(2)]

    one, other = labels(InformativePairs(seed=1)), labels(InformativePairs(seed=1))
    assert one == other and one[0] != one[1] and one != labels(InformativePairs(seed=2))
    resumed = InformativePairs(seed=1)
    resumed.load_state_dict({"batches": 1})
    assert resumed(groups([0.0, 1.0, 2.0], 20))["member"].tolist() == one[1]


def test_what_it_is_made_of() -> None:
    assert did.objective == dpo.objective and not did.offline
    assert (did.rollout.mixture_of, did.rollout.mixture_weight) == ("ref", 1.0)
    with pytest.raises(UsageError, match="scale"):
        override(did, {"filter.scale": math.nan})
