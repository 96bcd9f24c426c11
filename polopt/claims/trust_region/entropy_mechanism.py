"""KL-Cov and Clip-Cov: entropy is kept at the steps of largest covariance (Cui et al. 2025, arXiv:2505.22617).

Design, fixed before the first run. Exact world.

- Theory: 64 softmax over 8 tokens with normal logits (standard deviation 1) and normal advantages. The entropy is
  measured after a step of 1e-3 along A (natural gradient) and along pi A (vanilla); the least-squares slope of its
  change on -eta Cov(log pi, direction) through 0, both directions together. "1" means within 0.01.
- Training: 5 tokens, length 4, 8 prompts of pass rate 0.25, reward 1 on a random quarter of the sequences, groups of
  16, token mean, 8 updates per rollout, each on all of it, SGD at rate 20, 30 rollouts, no filter. Baseline: the clip
  0.2.
  * Law: least squares of the expected reward on exp(H), H the exact entropy per step, over the baseline's 31 values;
    "fits" means R^2 above 0.9. Covariance: mean over the baseline's rollouts of that of advantage and log-prob over 64
    fresh responses per prompt.
  * A table shares nothing between contexts, so that a thousandth of the steps cannot matter as in a network: KL-Cov and
    Clip-Cov select a tenth (51 of 512), their other settings as published. KL-Cov is also run with its published share.
    Controls: the same number of random steps, held by KL-Cov's penalty or left out under Clip-Cov's bounds.
  * Entropy: exact, of the distribution over sequences, after the first rollout with an expected reward of 0.8, at most
    150. Reward: expected, after 30 rollouts; "not lower": by at most 0.02. Roughness: mean |second difference| of the
    entropy over the 30 rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from polopt.aggregations import TokenMean
from polopt.claims.claim import Claim
from polopt.claims.exact import batch, credited, iterations_until, start, with_updates
from polopt.core.loss import Evaluation, Loss, per_step
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.trust_region.entropy_mechanism import ClipCov, KLCov, covariance
from polopt.objectives.ratio import log_ratio
from polopt.objectives.selection import chosen
from polopt.policies.exact import SequenceSpace
from polopt.tasks.problems import problem

SPACE = SequenceSpace(5, 4)
PROMPTS, GROUP, UPDATES, ROLLOUTS = 8, 16, 8, 30
SHARE = 0.1


@dataclass(frozen=True)
class RandomKL(KLCov):
    """KL-Cov's penalty on random steps; for experiments."""

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        gap = log_ratio(evaluation, rollout)
        held = chosen(rollout, rollout.mask, self.share)
        return per_step(-rollout.advantage * gap.exp() + self.beta * torch.where(held, gap.abs(), 0.0))


BASE = with_updates(grpo | {"aggregation": TokenMean()}, UPDATES)
ARMS = {
    "grpo": BASE,
    "kl-cov": BASE | {"objective": KLCov(share=SHARE)},
    "kl-cov published": BASE | {"objective": KLCov()},
    "kl random": BASE | {"objective": RandomKL(share=SHARE)},
    "clip-cov": BASE | {"objective": ClipCov(share=SHARE)},
    "clip random": BASE | {"objective": ClipCov(share=SHARE, lower=-math.inf, upper=math.inf)},
}


def theory(seed: int, quick: bool) -> Mapping[str, float]:
    """Slope of the measured change of the entropy on the predicted one."""
    generator = torch.Generator().manual_seed(seed)
    logits, advantage = torch.randn(2, 64, 8, generator=generator, dtype=torch.float64)
    eta = 1e-3

    def entropy(z: torch.Tensor) -> torch.Tensor:
        logp = z.log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)

    logp = logits.log_softmax(-1)
    pi = logp.exp()
    measured, predicted = [], []
    for direction in (advantage, pi * advantage):
        mean = (pi * direction).sum(-1, keepdim=True)
        predicted.append(-eta * (pi * logp * (direction - mean)).sum(-1))
        measured.append(entropy(logits + eta * direction) - entropy(logits))
    x, y = torch.cat(predicted), torch.cat(measured)
    return {"slope": float((x * y).sum() / x.square().sum()), "one": 1.0}


def training(seed: int, quick: bool) -> Mapping[str, float]:
    """Reward, entropy and roughness of every arm; the law and the covariance of the baseline."""
    made = problem("binary-verifier", space=SPACE, batch=PROMPTS, pass_rate=0.25, seed=seed)
    found: dict[str, float] = {}
    for name, method in ARMS.items():
        run = start(made, method, seed=seed, group=GROUP, optimizer="sgd")
        rewards, entropies, products = [run.reward], [run.entropy], []
        for index in range(3 if quick else ROLLOUTS):
            if method is BASE:
                fresh = batch(made, run.policy, seed=1000 * seed + index, sizes=[64])
                fresh = credited(BASE, run.policy, fresh)
                products.append(float(covariance(Evaluation({"logp": fresh.logp}), fresh).mean()))
            run.step()
            rewards.append(run.reward)
            entropies.append(run.entropy)
        bends = torch.tensor(entropies, dtype=torch.float64).diff().diff().abs()
        found |= {f"{name}/reward": rewards[-1], f"{name}/roughness": float(bends.mean())}
        if method is BASE:
            bound = torch.tensor([[h / SPACE.length, r] for h, r in zip(entropies, rewards, strict=True)]).double()
            correlation = torch.corrcoef(torch.stack([bound[:, 0].exp(), bound[:, 1]]))[0, 1]
            found |= {"fit": float(correlation.square()), "covariance": sum(products) / len(products)}
        run = start(made, method, seed=seed, group=GROUP, optimizer="sgd")
        iterations_until(run, 0.8, 2 if quick else 150)
        found[f"{name}/entropy"] = run.entropy
    return {**found, "good": 0.9}


ENTROPY = "exact entropy when the expected reward is 0.8, nats"
REWARD = "expected reward after 240 updates"

CLAIMS = (
    Claim(
        "entropy-mechanism",
        "theory",
        "The entropy of a softmax changes by minus the covariance of log-prob and logit change.",
        "exact",
        "a slope of 1",
        "slope of the measured on the predicted change",
        "equal",
        "slope",
        "one",
        margin=0.01,
        measure=theory,
    ),
    Claim(
        "entropy-mechanism",
        "law",
        "Without intervention reward follows -a exp(H) + b.",
        "exact",
        "R^2 of 0.9",
        "R^2 of the fit over a run",
        "higher",
        "fit",
        "good",
        measure=training,
    ),
    Claim(
        "entropy-mechanism",
        "positive-covariance",
        "Without intervention the covariance of advantage and log-prob is positive on average.",
        "exact",
        "no covariance",
        "covariance over steps, mean over a run",
        "higher",
        "covariance",
        None,
        measure=training,
    ),
    Claim(
        "entropy-mechanism",
        "kl-cov-entropy",
        "KL-Cov on a tenth of the steps keeps a higher entropy than GRPO.",
        "exact",
        "grpo",
        ENTROPY,
        "higher",
        "kl-cov/entropy",
        "grpo/entropy",
        measure=training,
    ),
    Claim(
        "entropy-mechanism",
        "kl-cov-published-share",
        "KL-Cov on its published share of the steps keeps a higher entropy than GRPO.",
        "exact",
        "grpo",
        ENTROPY,
        "higher",
        "kl-cov published/entropy",
        "grpo/entropy",
        measure=training,
    ),
    Claim(
        "entropy-mechanism",
        "clip-cov-entropy",
        "Clip-Cov on up to a tenth of the steps keeps a higher entropy than GRPO.",
        "exact",
        "grpo",
        ENTROPY,
        "higher",
        "clip-cov/entropy",
        "grpo/entropy",
        measure=training,
    ),
    Claim(
        "entropy-mechanism",
        "kl-random",
        "KL-Cov keeps a higher entropy than the same penalty on as many random steps.",
        "exact",
        "the penalty on random steps",
        ENTROPY,
        "higher",
        "kl-cov/entropy",
        "kl random/entropy",
        measure=training,
    ),
    Claim(
        "entropy-mechanism",
        "clip-random",
        "Clip-Cov keeps a higher entropy than leaving out as many random steps.",
        "exact",
        "random steps left out",
        ENTROPY,
        "higher",
        "clip-cov/entropy",
        "clip random/entropy",
        measure=training,
    ),
    Claim(
        "entropy-mechanism",
        "kl-cov-reward",
        "KL-Cov is not less accurate than GRPO.",
        "exact",
        "grpo",
        REWARD,
        "higher",
        "kl-cov/reward",
        "grpo/reward",
        margin=0.02,
        measure=training,
    ),
    Claim(
        "entropy-mechanism",
        "clip-cov-reward",
        "Clip-Cov is not less accurate than GRPO.",
        "exact",
        "grpo",
        REWARD,
        "higher",
        "clip-cov/reward",
        "grpo/reward",
        margin=0.02,
        measure=training,
    ),
    Claim(
        "entropy-mechanism",
        "smoother",
        "The entropy runs smoother under KL-Cov than under Clip-Cov.",
        "exact",
        "clip-cov",
        "mean |second difference| of the entropy over 30 rollouts, nats",
        "lower",
        "kl-cov/roughness",
        "clip-cov/roughness",
        measure=training,
    ),
)
