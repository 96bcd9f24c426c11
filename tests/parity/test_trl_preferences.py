"""Loss and gradient of the preference methods against those of TRL's own trainers, driven without a model.

TRL's loss code runs as it is; only its forward pass is replaced, by log-probs that the test chooses.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.trl_loss import concatenated_loss, pair_loss, single_loss
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.rollout import Rollout, Source
from polopt.filters.preferences import with_labels
from polopt.methods import get_method
from tests.support import now, value_and_gradient

DPO = pytest.importorskip("trl.trainer.dpo_trainer", reason="the parity tests compare with TRL").DPOTrainer
KTO = pytest.importorskip("trl.trainer.kto_trainer", reason="the parity tests compare with TRL").KTOTrainer
ORPO = pytest.importorskip("trl.experimental.orpo", reason="the parity tests compare with TRL").ORPOTrainer
CPO = pytest.importorskip("trl.experimental.cpo", reason="the parity tests compare with TRL").CPOTrainer

PAIRS, WIDTH = 6, 9
SEEDS = range(3)


class Batch:
    """Right-padded random answers of unequal length: winners, then their losers."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64, rows: int = 2 * PAIRS) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, WIDTH + 1, (rows,), generator=generator)
        lengths[0] = WIDTH
        self.mask = (torch.arange(WIDTH)[None] < lengths[:, None]).long()
        self.logp = -0.05 - 2 * torch.rand(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        noise = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        self.ref = self.logp + 0.5 * noise

    def rollout(self) -> Rollout:
        """The pairs packed, winner and loser of one group apart."""
        half = len(self.mask) // 2
        group = torch.arange(half).repeat(2)
        rollout = Rollout.from_padded(self.mask, group, step={"logp/ref": self.ref, "now": self.logp})
        label = torch.cat([torch.ones(half), torch.zeros(half)])
        return with_labels(rollout, label)


def compare(method: Method, rollout: Rollout, rows: int, expected: tuple[float, Tensor], rel: float = 1e-6) -> None:
    loss, gradient = value_and_gradient(method, now(rollout["now"]), rollout)
    expected_loss, expected_gradient = expected
    assert (expected_gradient != 0).any()
    padded = torch.zeros_like(expected_gradient)
    matrix = rollout.pad(gradient.to(padded))[:rows]
    padded[:, : matrix.shape[1]] = matrix
    assert loss == pytest.approx(expected_loss, rel=rel, abs=1e-9)
    scale = float(expected_gradient.abs().max())
    torch.testing.assert_close(padded, expected_gradient, rtol=rel, atol=rel * scale)


def trained(loss: Any, logp: Tensor) -> tuple[float, Tensor]:
    """A loss of TRL and its gradient in the log-probs."""
    leaf = logp.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None
    return float(value.detach()), leaf.grad


# Our method and settings of its objective; TRL's settings.
PAIR_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ("dpo", {}, {}),
    "sigmoid beta": ("dpo", {"beta": 0.3}, {"beta": 0.3}),
    "forward kl": ("dpo", {"divergence": "forward-kl"}, {"f_divergence_type": "forward_kl"}),
    "js": ("dpo", {"divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    "alpha": (
        "dpo",
        {"divergence": "alpha", "alpha": 0.6},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.6},
    ),
    "alpha one": (
        "dpo",
        {"divergence": "alpha", "alpha": 1.0},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    ),
    "hinge": ("hinge", {"beta": 0.7}, {"loss_type": "hinge", "beta": 0.7}),
    "hinge js": (
        "hinge",
        {"beta": 0.7, "divergence": "js"},
        {"loss_type": "hinge", "beta": 0.7, "f_divergence_type": "js_divergence"},
    ),
    "ipo": ("ipo", {}, {"loss_type": "ipo"}),
    "robust": ("rdpo", {"flip": 0.15}, {"loss_type": "robust", "label_smoothing": 0.15}),
    "exo-pair": ("exo-pair", {"label_smoothing": 0.05}, {"loss_type": "exo_pair", "label_smoothing": 0.05}),
    "nca-pair": ("nca-pair", {}, {"loss_type": "nca_pair"}),
    "bco-pair": ("bco-pair", {}, {"loss_type": "bco_pair"}),
    "sppo-hard": ("sppo-hard", {"beta": 0.4}, {"loss_type": "sppo_hard", "beta": 0.4}),
    "aot": ("aot", {"label_smoothing": 0.1}, {"loss_type": "aot", "label_smoothing": 0.1}),
    "aot-unpaired": ("aot-unpaired", {"beta": 0.3}, {"loss_type": "aot_unpaired", "beta": 0.3}),
    "apo-zero": ("apo-zero", {}, {"loss_type": "apo_zero"}),
    "apo-down": ("apo-down", {}, {"loss_type": "apo_down"}),
    "discopop": ("discopop", {"tau": 0.1}, {"loss_type": "discopop", "discopop_tau": 0.1}),
    "sigmoid-norm": ("sigmoid-norm", {"beta": 2.0}, {"loss_type": "sigmoid_norm", "beta": 2.0}),
    "sft": ("sft", {}, {"loss_type": "sft"}),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", PAIR_CASES)
def test_every_loss_of_the_dpo_trainer(case: str, seed: int) -> None:
    objective, fields, settings = PAIR_CASES[case]
    # TRL's alpha divergence computes in float32 whatever it is given.
    single = case.startswith("alpha")
    batch = Batch(seed, torch.float32 if single else torch.float64)
    method = override(
        get_method("dpo"), {"objective": objective, **{f"objective.{name}": value for name, value in fields.items()}}
    )
    expected = trained(lambda logp: pair_loss(DPO, logp, batch.ref, batch.mask, **settings), batch.logp)
    # TRL holds the smoothing of exo-pair in float32.
    compare(method, batch.rollout(), 2 * PAIRS, expected, rel=5e-6 if single or case == "exo-pair" else 1e-6)


CONCATENATED: dict[str, tuple[type, str, dict[str, Any], dict[str, Any]]] = {
    "orpo": (ORPO, "orpo", {}, {}),
    "orpo beta": (ORPO, "orpo", {"objective.beta": 0.6}, {"beta": 0.6}),
    "cpo": (CPO, "cpo", {}, {}),
    "cpo smoothed": (
        CPO,
        "cpo",
        {"objective.label_smoothing": 0.1, "objective.coefficient": 0.3},
        {"label_smoothing": 0.1, "cpo_alpha": 0.3},
    ),
    # The DPO trainer leaves the smoothing out of its sigmoid loss; this one, without a reference, has it.
    "dpo smoothed": (
        CPO,
        "dpo",
        {"objective.reference_free": True, "objective.label_smoothing": 0.2},
        {"label_smoothing": 0.2, "cpo_alpha": 0.0},
    ),
    "cpo hinge": (
        CPO,
        "slic",
        {"objective.beta": 0.2, "objective.nll": 0.0},
        {"loss_type": "hinge", "beta": 0.2, "cpo_alpha": 0.0},
    ),
    "simpo": (CPO, "simpo", {}, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0}),
    "simpo smoothed": (
        CPO,
        "simpo",
        {"objective.label_smoothing": 0.2, "objective.gamma": 1.1},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.1, "cpo_alpha": 0.0, "label_smoothing": 0.2},
    ),
    "alphapo": (
        CPO,
        "simpo",
        {"objective.shape": 0.4},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0, "alpha": 0.4},
    ),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CONCATENATED)
def test_losses_without_a_reference(case: str, seed: int) -> None:
    trainer, slug, fields, settings = CONCATENATED[case]
    batch = Batch(seed)
    method = override(get_method(slug), fields)
    expected = trained(lambda logp: concatenated_loss(trainer, logp, batch.mask, **settings), batch.logp)
    # TRL casts the log-probs of ORPO's odds to float32.
    compare(method, batch.rollout(), 2 * PAIRS, expected, rel=5e-6 if trainer is ORPO else 1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 1.5)])
@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_kto(seed: int, weights: tuple[float, float], shift: float) -> None:
    rows = 7
    batch, others = Batch(seed, rows=rows), Batch(seed + 100, rows=rows)
    # One way the reference point is positive, the other way it is held at 0.
    others.ref = others.logp - shift
    label = torch.tensor([True, False, True, True, False, False, True])
    settings = {"desirable_weight": weights[0], "undesirable_weight": weights[1], "beta": 0.3}
    expected = trained(
        lambda logp: single_loss(
            KTO, logp, batch.ref, batch.mask, label, (others.logp, others.ref, others.mask), **settings
        ),
        batch.logp,
    )
    rollout = Rollout.from_padded(
        torch.cat([batch.mask, others.mask]),
        torch.arange(2 * rows),
        step={"logp/ref": torch.cat([batch.ref, others.ref]), "now": torch.cat([batch.logp, others.logp])},
        trajectories={
            "label": torch.cat([label.double(), torch.full((rows,), torch.nan, dtype=torch.float64)]),
            "source": torch.tensor([int(Source.DATASET)] * rows + [int(Source.PROBE)] * rows),
        },
    )
    method = override(
        get_method("kto"),
        {"objective.beta": 0.3, "objective.desirable": weights[0], "objective.undesirable": weights[1]},
    )
    compare(method, rollout, rows, expected)
    _, gradient = value_and_gradient(method, now(rollout["now"]), rollout)
    assert not rollout.pad(gradient)[rows:].any(), "the reference point is a constant"


@pytest.mark.parametrize("seed", SEEDS)
def test_apo_zero_of_single_answers(seed: int) -> None:
    rows = 7
    batch = Batch(seed, rows=rows)
    label = torch.tensor([True, False, True, True, False, False, True])
    settings = {"loss_type": "apo_zero_unpaired", "calculate_KL": False, "beta": 0.3}
    expected = trained(
        lambda logp: single_loss(
            KTO, logp, batch.ref, batch.mask, label, (batch.logp.detach(), batch.ref, batch.mask), **settings
        ),
        batch.logp,
    )
    rollout = Rollout.from_padded(
        batch.mask,
        torch.arange(rows),
        step={"logp/ref": batch.ref, "now": batch.logp},
        trajectories={"label": label.double(), "source": torch.ones(rows, dtype=torch.int64)},
    )
    method = override(get_method("kto"), {"objective.beta": 0.3, "objective.reference_point": False})
    compare(method, rollout, rows, expected)
