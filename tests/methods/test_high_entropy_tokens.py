"""The card of high-entropy tokens: which steps are kept, what that does to loss and gradient, worked example."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.rollout import Rollout
from polopt.methods.base.dapo import dapo
from polopt.methods.credit.high_entropy_tokens import HighEntropy, high_entropy_tokens
from polopt.regularizers.kl import KL
from tests.support import close, f64, now, same, value_and_gradient, with_advantage

ENTROPY = [0.05, 1.2, 0.01, 0.3, 2.1, 0.02, 0.0, 0.9, 0.04, 0.6]
LOG_RATIO = [0.1, 0.2, -0.1, 0.0, 0.4, 0.1, 0.0, -0.1, 0.2, -0.4]
OLD = f64([-1.0] * 10)


def card(entropy: Any = ENTROPY, **step: Any) -> Rollout:
    """Two responses of five steps, advantages +1 and -1."""
    columns = {"logp": OLD, "entropy": f64(entropy), **step}
    rollout = Rollout.from_arrays([0] * 5 + [1] * 5, [0, 0], step=columns, trajectories={"reward": f64([1.0, 0.0])})
    return with_advantage(rollout, [1.0, -1.0])


def weighted(part: HighEntropy, rollout: Rollout) -> Rollout:
    return rollout.with_columns(step={"weight": part(rollout)})


def kept(entropy: Any, fraction: float, mask: Any = None) -> list[int]:
    """Steps that the part keeps of one response."""
    columns = {"entropy": f64(entropy), **({} if mask is None else {"mask": torch.as_tensor(mask)})}
    rollout = Rollout.from_arrays([0] * len(columns["entropy"]), [0], step=columns)
    return [int(step) for step in HighEntropy(fraction)(rollout).nonzero().flatten()]


def random_entropy(count: int, seed: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@pytest.mark.parametrize(
    ("fraction", "steps", "loss", "slopes"),
    [
        (0.2, [1, 4], -0.250140, {1: -0.122140}),  # step 4 is clipped
        (0.4, [1, 4, 7, 9], -0.079657, {1: -0.122140, 7: 0.090484}),  # step 9 is clipped
    ],
)
def test_worked_example(fraction: float, steps: list[int], loss: float, slopes: dict[int, float]) -> None:
    rollout = weighted(HighEntropy(fraction), card())
    assert rollout.weight.nonzero().flatten().tolist() == steps
    value, gradient = value_and_gradient(high_entropy_tokens, now(OLD + f64(LOG_RATIO)), rollout)
    close(value, loss)
    close(gradient, [slopes.get(step, 0.0) for step in range(10)])
    assert (gradient[[step for step in range(10) if step not in slopes]] == 0).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.33, 0.5, 0.9, 1.0])
def test_the_mask_is_that_of_trl(seed: int, fraction: float) -> None:
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    alone = SimpleNamespace(pad_across_processes=lambda x, **_: x, gather=lambda x: x)
    # Its threshold is a float32 number.
    entropy = random_entropy(4 * 9, seed).view(4, 9).float()
    mask = torch.rand(4, 9, generator=torch.Generator().manual_seed(seed + 100)) > 0.25
    expected = trainer.get_high_entropy_mask(SimpleNamespace(accelerator=alone), entropy, mask, 1 - fraction)
    rollout = Rollout.from_padded(mask, [0, 0, 1, 1], step={"entropy": entropy})
    same(rollout.pad(HighEntropy(fraction)(rollout)), expected[:, : int(rollout.lengths.max())])


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.25, 0.5, 0.77])
@pytest.mark.parametrize("count", [1, 2, 7, 50, 101])
def test_how_many_are_kept(fraction: float, count: int) -> None:
    entropy = random_entropy(count, count)
    number = count - math.ceil(round((1 - fraction) * (count - 1), 9))
    assert kept(entropy, fraction) == sorted(entropy.argsort()[count - number :].tolist())
    assert number >= 1
    if (fraction, count) == (0.2, 50):
        assert number == 10


def test_everything_is_kept_at_one_and_the_loss_is_the_base_methods() -> None:
    evaluation, rollout = now(OLD + f64(LOG_RATIO)), weighted(HighEntropy(1.0), card())
    assert (rollout.weight == 1).all()
    loss, gradient = value_and_gradient(high_entropy_tokens, evaluation, rollout)
    expected_loss, expected = value_and_gradient(dapo, evaluation, card())
    same(loss, expected_loss)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
def test_the_highest_and_the_others_add_up_to_full_training(fraction: float) -> None:
    evaluation = now(OLD + f64(LOG_RATIO))
    halves = [
        value_and_gradient(high_entropy_tokens, evaluation, weighted(HighEntropy(fraction, lowest), card()))
        for lowest in (False, True)
    ]
    loss, gradient = value_and_gradient(dapo, evaluation, card())
    same(halves[0][0] + halves[1][0], loss)
    same(halves[0][1] + halves[1][1], gradient)


def test_kept_steps_have_the_gradient_of_full_training_and_others_none() -> None:
    evaluation, rollout = now(OLD + 0.1 * f64(LOG_RATIO)), weighted(HighEntropy(0.4), card())
    _, gradient = value_and_gradient(high_entropy_tokens, evaluation, rollout)
    _, full = value_and_gradient(dapo, evaluation, card())
    on = rollout.weight > 0
    assert torch.equal(gradient[on], full[on])
    assert (full != 0).all() and (gradient[~on] == 0).all()


@pytest.mark.parametrize(("scale", "shift"), [(2.0, 0.0), (0.01, 5.0), (7.5, -0.3)])
def test_only_the_ranks_matter(scale: float, shift: float) -> None:
    entropy = random_entropy(37, 1)
    for fraction in (0.1, 0.2, 0.6):
        assert kept(scale * entropy + shift, fraction) == kept(entropy, fraction)


def test_equal_entropies_are_all_kept() -> None:
    assert kept([0.7] * 6, 0.2) == list(range(6))
    assert kept([0.7] * 3 + [0.1] * 9, 0.2) == [0, 1, 2]


def test_kept_sets_are_nested() -> None:
    entropy = random_entropy(61, 2)
    sets = [set(kept(entropy, fraction)) for fraction in (0.02, 0.1, 0.2, 0.5, 0.9, 1.0)]
    assert all(small < large for small, large in itertools.pairwise(sets))


def test_masked_steps_take_no_part() -> None:
    entropy, mask = [9.0, 0.2, 0.9, math.nan, 0.5, 0.1, 0.4], [False, True, True, False, True, True, True]
    assert kept(entropy, 0.4, mask) == [2, 4]
    assert kept(entropy, 0.4, [False] * 7) == []


def test_the_quantile_is_one_of_the_whole_batch() -> None:
    rollout = Rollout.from_arrays([0, 0, 0, 1, 1, 1], [0, 1], step={"entropy": f64([5, 4, 3, 2, 1, 0])})
    assert HighEntropy(0.5)(rollout).tolist() == [1, 1, 1, 0, 0, 0]


def test_a_batch_beyond_the_limit_of_torch_quantile() -> None:
    count = 2**24 + 3
    entropy = torch.zeros(count)
    entropy[-count // 10 :] = 1.0
    rollout = Rollout(torch.tensor([count]), torch.tensor([0]), {"step": {"entropy": entropy}})
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(entropy, 0.95)
    assert torch.equal(HighEntropy(0.05)(rollout), entropy)


def test_a_kl_term_is_not_masked() -> None:
    rollout = weighted(HighEntropy(0.2), card(**{"logp/ref": OLD - 0.5}))
    _, gradient = value_and_gradient(high_entropy_tokens | {"regularizer": KL(beta=0.1)}, now(OLD), rollout)
    _, penalty = value_and_gradient(dapo | {"objective": None, "regularizer": KL(beta=0.1)}, now(OLD), rollout)
    _, surrogate = value_and_gradient(high_entropy_tokens, now(OLD), rollout)
    assert (penalty != 0).all()
    same(gradient, surrogate + penalty)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_a_fraction_out_of_range_is_named(fraction: float) -> None:
    with pytest.raises(UsageError, match=str(fraction)):
        HighEntropy(fraction)


def test_what_it_keeps_of_dapo() -> None:
    assert {slot for slot, value in high_entropy_tokens.slots().items() if value != dapo.slots().get(slot)} == {
        "weight"
    }
    assert high_entropy_tokens.weight == HighEntropy(0.2)
