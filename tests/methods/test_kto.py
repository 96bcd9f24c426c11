"""The card of KTO: saturating values of single answers around a reference point that is a constant."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.override import override
from polopt.core.rollout import Rollout, Source
from polopt.methods.preference.kto import KTO, kto
from tests.methods.pairs import LENGTHS, POLICY, REFERENCE, spread, sums
from tests.support import close, f64, now, same, value_and_gradient

# Three answers to other prompts, as on the card.
THEIRS, THEIR_REF, THEIR_LENGTHS = [-1, -2, -0.5, -0.7], [-1.1, -1.8, -0.9, -0.6], [2, 1, 1]


def batch(
    labels: Sequence[float] = (1, 0, 1, 0), *, probes: bool = True, reference: Sequence[float] = REFERENCE
) -> Rollout:
    lengths, step = list(LENGTHS), list(reference)
    label, source = list(labels), [Source.DATASET] * 4
    if probes:
        lengths, step = [*lengths, *THEIR_LENGTHS], [*step, *THEIR_REF]
        label, source = [*label, *[math.nan] * 3], [*source, *[Source.PROBE] * 3]
    ids = [i for i, length in enumerate(lengths) for _ in range(length)]
    return Rollout.from_arrays(
        ids,
        range(len(lengths)),
        step={"logp/ref": f64(step)},
        trajectories={"label": f64(label), "source": [int(s) for s in source]},
    )


def by_hand(s: Sequence[float], labels: Sequence[float], z: float, beta: float, weights: tuple[float, float]) -> float:
    terms = [
        weights[0] / (1 + math.exp(beta * (x - z))) if y else weights[1] / (1 + math.exp(beta * (z - x)))
        for x, y in zip(s, labels, strict=True)
    ]
    return float(np.mean(terms))


def test_worked_example() -> None:
    method = override(kto, {"objective.beta": 0.5, "objective.undesirable": 1.5})
    loss, gradient = value_and_gradient(method, now([*POLICY, *THEIRS]), batch())
    close(loss, 0.5917739498, digits=10)
    close(gradient[:11], spread([-0.0311439, 0.04624272, -0.03124783, 0.04686198]), digits=8)
    same(gradient[11:], [0.0] * 4)
    _, metrics = method.loss(now([*POLICY, *THEIRS]), batch())
    close(metrics["kl/mismatched"], 0.0666666667, digits=10)
    close(metrics["rewards/chosen"], 0.5 * 0.2, digits=9)
    close(metrics["rewards/rejected"], 0.5 * -0.2, digits=9)


def test_at_the_reference_every_term_is_half_its_weight() -> None:
    method = override(kto, {"objective.undesirable": 1.5})
    loss, gradient = value_and_gradient(method, now([*REFERENCE, *THEIR_REF]), batch())
    same(loss, (1 + 1.5) / 4)
    same(gradient[:11], spread([-0.1 / 16, 0.15 / 16, -0.1 / 16, 0.15 / 16]))


@pytest.mark.parametrize("labels", [(1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 0, 1)])
def test_any_mixture_of_labels(labels: tuple[int, ...]) -> None:
    loss, _ = value_and_gradient(kto, now([*POLICY, *THEIRS]), batch(labels))
    same(loss, by_hand(sums(POLICY).tolist(), labels, 0.2 / 3, 0.1, (1.0, 1.0)))


def test_the_reference_point_is_never_negative() -> None:
    lower = [x - 1 for x in THEIRS]
    loss, _ = value_and_gradient(kto, now([*POLICY, *lower]), batch())
    same(loss, by_hand(sums(POLICY).tolist(), (1, 0, 1, 0), 0.0, 0.1, (1.0, 1.0)))


def test_without_probes_it_is_that_of_the_answers_themselves() -> None:
    loss, gradient = value_and_gradient(kto, now(POLICY), batch(probes=False))
    s = sums(POLICY)
    same(loss, by_hand(s.tolist(), (1, 0, 1, 0), max(float(s.mean()), 0.0), 0.1, (1.0, 1.0)))
    higher = [x + 1 for x in POLICY]
    loss, gradient = value_and_gradient(kto, now(higher), batch(probes=False))
    z = float(sums(higher).mean())
    assert z > 0
    same(loss, by_hand(sums(higher).tolist(), (1, 0, 1, 0), z, 0.1, (1.0, 1.0)))
    v = 1 / (1 + math.exp(-0.1 * (sums(higher)[0] - z)))
    same(gradient[:3], [-0.1 * v * (1 - v) / 4] * 3)


def test_values_saturate() -> None:
    far = f64([*POLICY, *THEIRS]).clone()
    far[:3] += 1e4
    far[3:5] -= 1e4
    loss, gradient = value_and_gradient(kto, now(far), batch((1, 0, 1, 0)))
    assert math.isfinite(loss) and 0 <= loss <= 1
    same(gradient[:5], [0.0] * 5)


def test_reflection_about_the_reference_point() -> None:
    """Flipping all labels and reflecting every s about z leaves the loss alone."""
    z = 0.2 / 3
    s = sums(POLICY)
    reflected = f64(POLICY) + f64(spread([2 * (z - x) / n for x, n in zip(s, LENGTHS, strict=True)]))
    one, _ = value_and_gradient(kto, now([*POLICY, *THEIRS]), batch())
    other, _ = value_and_gradient(kto, now([*reflected.tolist(), *THEIRS]), batch((0, 1, 0, 1)))
    same(one, other)


def test_what_it_declares() -> None:
    assert kto.unit == "batch" and kto.rollout.form == "singles"
    with pytest.raises(UsageError, match="beta"):
        KTO(beta=0.0)
    assert torch.is_tensor(kto.loss(now([*POLICY, *THEIRS]), batch())[0])
