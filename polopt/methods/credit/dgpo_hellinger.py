"""DGPO: distribution guided policy optimisation, fine-grained credit (Jin et al. 2026, arXiv:2605.03327).

d_t = 1 - sum_v sqrt(pi(v | s_t) pi_ref(v | s_t)), the squared Hellinger distance, in [0, 1];
h_t = H(pi(. | s_t)) / log V;  s_t = d_t h_t^kappa;
w_t = T exp(s_t / tau) / sum_u exp(s_u / tau), a softmax over the T trainable steps of a response, mean 1;
L = (1/M) sum_i (1/|y_i|) sum_t -w_t min(rho_t A_i, clip(rho_t, 1 - eps, 1 + eps) A_i), A_i the group z-score.
Deviation from the reference is a signal for credit instead of a penalty: no KL, no entropy bonus. The gate h^kappa
takes weight from confident deviations. With pi = pi_ref, as at the first update of a run, every weight is 1.

Not stated in what could be read of the paper: the standard deviation and eps of the z-score and the mean of the loss,
which are GRPO's here (the public reimplementation erikqu/tiny-dgpo takes the mean over steps and then responses too);
and whether w moves within a rollout. Here d and h are of the policy that sampled, so that w is a constant of the
rollout; that code makes w anew at each update, which is the same where a rollout has one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_softmax
from polopt.methods.base.grpo import grpo


@part("weight", "gated-deviation")
@dataclass(frozen=True)
class GatedDeviation(Part):
    """w_t = T softmax_t(d_t h_t^kappa / tau) over the T trainable steps of a response, [N]; 0 on masked steps.

    d is the squared Hellinger distance to ``model`` over all tokens (one pass through each of the two), h the entropy
    over its maximum; ``kappa`` 0 switches the gate off (0^0 = 1). The weights of a response have mean 1 and differ by a
    factor of at most exp(1 / tau). arXiv:2605.03327.
    """

    tau: float = 0.5
    kappa: float = 1.0
    model: str = "ref"

    @property
    def needs(self) -> frozenset[str]:
        gate = {"entropy", "max_entropy"} if self.kappa else set()
        return frozenset({f"hellinger/{self.model}"} | gate)

    def __call__(self, rollout: Rollout) -> Float[Tensor, " step"]:
        score = rollout[f"hellinger/{self.model}"]
        if self.kappa:
            # An entropy of 0 may be rounded below it, and a power of that would be NaN.
            score = score * (rollout["entropy"] / rollout["max_entropy"]).clamp_min(0) ** self.kappa
        score = torch.where(rollout.mask, score, 0.0) / self.tau
        share = segment_softmax(score, rollout.trajectory, rollout.n_trajectories, mask=rollout.mask)
        return share * rollout.spread(rollout.active_lengths)


dgpo_hellinger = method("dgpo-hellinger", grpo, seed="001", paper="arXiv:2605.03327", weight=GatedDeviation())
