"""GSPO: one ratio per response averages the noise of its tokens' ratios (Zheng et al. 2025, arXiv:2507.18071).

Design, fixed before the first run. Exact world, as the card says: 3 tokens, length 6, reward 1 on a random quarter of
the sequences; normal noise of standard deviation 0.2 (the middle of the card's range) on the recorded log-prob of every
step, as where sampler and learner compute differently. Baseline: GRPO's token ratio, clip 0.2.

Two clips for GSPO: the paper's (3e-4, 4e-4), and 0.2 / sqrt(6) on both sides, which is GRPO's 0.2 in units of the
spread of s for six tokens: the card's notes ask for a re-tuned clip where responses are short.

- One gradient: one prompt of pass rate 0.25, 8 groups of 8 per batch, 200 batches from the initial policy, first
  update. Noise is the trace of the covariance over the squared norm of the mean (in logarithms): without the division a
  method that clips more would win by shrinking. Cosine: mean over batches with the exact gradient of the expected
  reward.
- No mismatch, first update: relative distance of GSPO's gradient to GRPO's in one batch; the same means below 1e-6.
- Learning: 8 prompts of pass rate 0.25, 8 responses each, four minibatches per rollout (GSPO's own schedule, for both),
  SGD at rate 20, 40 iterations, noise 0.2 in both. Mean clipped share of the steps; expected reward at the end, "at
  least as fast" meaning not lower by more than 0.02.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from polopt.claims.claim import Claim
from polopt.claims.exact import NoisyGroups, batch, credited, disturbed, gradient, spread, start
from polopt.core.override import override
from polopt.methods.base.grpo import grpo
from polopt.methods.base.gspo import gspo
from polopt.policies.exact import SequenceSpace, policy_gradient
from polopt.tasks.problems import problem

SPACE = SequenceSpace(3, 6)
NOISE, PASS_RATE, GROUP = 0.2, 0.25, 8
WIDE = 0.2 / math.sqrt(SPACE.length)
ARMS = {
    "grpo": grpo | {"schedule": gspo.schedule},
    "gspo": gspo,
    "gspo-wide": override(gspo, {"objective.low": WIDE, "objective.high": WIDE}),
}


def mismatch(seed: int, quick: bool) -> Mapping[str, float]:
    """Relative noise of the gradient and its cosine to the exact one, under mismatch."""
    made = problem("binary-verifier", space=SPACE, pass_rate=PASS_RATE, seed=seed)
    policy = made.policy()
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in ARMS}
    for index in range(5 if quick else 200):
        rollout = batch(made, policy, seed=1000 * seed + index, sizes=[GROUP] * 8)
        rollout = disturbed(rollout, generator, noise=NOISE)
        for name, method in ARMS.items():
            rows[name].append(gradient(method, policy, credited(method, policy, rollout)))
    exact = policy_gradient(policy, made.reward).detach()
    found: dict[str, float] = {}
    for name, gradients in rows.items():
        measured = spread(gradients, exact)
        found |= {f"{name}/noise": math.log(measured.relative), f"{name}/cosine": measured.cosine}
    return found


def agreement(seed: int, quick: bool) -> Mapping[str, float]:
    """Relative distance of GSPO's gradient to GRPO's where sampler and learner agree."""
    made = problem("binary-verifier", space=SPACE, pass_rate=PASS_RATE, seed=seed)
    policy = made.policy()
    rollout = credited(grpo, policy, batch(made, policy, seed=seed, sizes=[GROUP] * (1 if quick else 8)))
    token, sequence = gradient(grpo, policy, rollout), gradient(gspo, policy, rollout)
    return {"distance": float((token - sequence).norm() / max(float(token.norm()), 1e-12))}


def learning(seed: int, quick: bool) -> Mapping[str, float]:
    """Clipped share and expected reward at the end, with noise."""
    made = problem("binary-verifier", space=SPACE, batch=8, pass_rate=PASS_RATE, seed=seed)
    found: dict[str, float] = {}
    for name, method in ARMS.items():
        run = start(made, method | {"rollout": NoisyGroups(noise=NOISE)}, seed=seed, group=GROUP, optimizer="sgd")
        clipped = []
        for _ in range(2 if quick else 40):
            run.step()
            clipped.append(run.metrics["clip_ratio/region_mean"])
        found |= {f"{name}/clipped": sum(clipped) / len(clipped), f"{name}/reward": run.reward}
    return found


RELATIVE = "log of the gradient's total variance over the squared norm of its mean"
COSINE = "mean cosine of a batch's gradient with the exact gradient"
END = "expected reward after 40 iterations"

CLAIMS = (
    Claim(
        "gspo",
        "variance",
        "Under mismatch GSPO's gradient is less noisy than that of the token ratio.",
        "exact",
        "grpo",
        RELATIVE,
        "lower",
        "gspo/noise",
        "grpo/noise",
        measure=mismatch,
    ),
    Claim(
        "gspo",
        "cosine",
        "Under mismatch GSPO's gradient is closer to the exact one in direction.",
        "exact",
        "grpo",
        COSINE,
        "higher",
        "gspo/cosine",
        "grpo/cosine",
        measure=mismatch,
    ),
    Claim(
        "gspo",
        "variance-wide-clip",
        "Under mismatch GSPO's gradient, with a clip for short responses, is less noisy than that of the token ratio.",
        "exact",
        "grpo",
        RELATIVE,
        "lower",
        "gspo-wide/noise",
        "grpo/noise",
        measure=mismatch,
    ),
    Claim(
        "gspo",
        "cosine-wide-clip",
        "Under mismatch GSPO's gradient, with a clip for short responses, is closer to the exact one in direction.",
        "exact",
        "grpo",
        COSINE,
        "higher",
        "gspo-wide/cosine",
        "grpo/cosine",
        measure=mismatch,
    ),
    Claim(
        "gspo",
        "agreement",
        "Without mismatch the first update of GSPO is GRPO's.",
        "exact",
        "grpo",
        "relative distance of the gradients",
        "equal",
        "distance",
        None,
        margin=1e-6,
        measure=agreement,
    ),
    Claim(
        "gspo",
        "clipped-share",
        "GSPO clips a larger share of the steps.",
        "exact",
        "grpo",
        "mean clipped share of the steps",
        "higher",
        "gspo/clipped",
        "grpo/clipped",
        measure=learning,
    ),
    Claim(
        "gspo",
        "learning",
        "Under mismatch GSPO learns at least as fast.",
        "exact",
        "grpo",
        END,
        "higher",
        "gspo/reward",
        "grpo/reward",
        margin=0.02,
        measure=learning,
    ),
    Claim(
        "gspo",
        "learning-wide-clip",
        "Under mismatch GSPO, with a clip for short responses, learns at least as fast.",
        "exact",
        "grpo",
        END,
        "higher",
        "gspo-wide/reward",
        "grpo/reward",
        margin=0.02,
        measure=learning,
    ),
)
