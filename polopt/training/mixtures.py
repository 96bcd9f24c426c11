"""A mixture of reward models of language: one per taste, from comparisons by users whose tastes differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.example import Example, Text
from polopt.core.method import Method
from polopt.core.policy import Request
from polopt.core.rollout import Rollout
from polopt.policies.causal_lm.policy import CausalLM
from polopt.rewards.mixtures import Mixture, expectation_maximisation, numbered
from polopt.rewards.models import Options, RewardModel
from polopt.rollouts.dataset import groups_of
from polopt.training.optimizer import make_optimizer
from polopt.training.update import BatchStep


@dataclass(frozen=True)
class Fitting:
    """One M step of one model: ``steps`` updates of AdamW on ``pairs`` each, drawn in proportion to responsibility."""

    steps: int = 20
    pairs: int = 16
    lr: float = 1e-4
    token_budget: int = 16_384
    seed: int = 0


def train_mixture(
    method: Method,
    policies: Sequence[CausalLM],
    examples: Sequence[Example],
    *,
    user: str = "user",
    rounds: int = 10,
    hard: bool = True,
    fitting: Fitting | None = None,
) -> Mixture:
    """Train one reward model per policy, in place, by hard or soft EM; column ``user`` of an example says who compared.

    ``method`` trains a single reward model from pairs (`polopt.methods.preference.reward_model`); the critics are added
    here. Every M step goes on from the weights of the round before, as in the code of arXiv:2402.08925: it is no exact
    one, and the likelihood may fall. The mixture's users are numbered in order of appearance in the examples.
    Raises UsageError for an example without the column or without a pair, and as `expectation_maximisation`.
    """
    fitting = fitting or Fitting()
    if lacking := next((example.id for example in examples if user not in example.columns), None):
        raise UsageError(f"example {lacking!r} has no column {user!r} to say which user compared")
    number, _ = numbered([example.columns[user] for example in examples])
    prompts = [example.prompt for example in examples]
    sides = [[text for text, _ in groups_of(example, "pairs")[0]] for example in examples]
    chosen, rejected = ([pair[side] for pair in sides] for side in (0, 1))
    for policy in policies:
        policy.add_critic()
    optimizers = [
        make_optimizer(policy.parameters(), fitting.lr, weight_decay=0.0, betas=(0.9, 0.999)) for policy in policies
    ]
    generator = torch.Generator().manual_seed(fitting.seed)

    def margins() -> Float[Tensor, "pair model"]:
        return torch.stack([_margin(policy, prompts, chosen, rejected) for policy in policies], 1)

    def fit(model: int, weight: Float[Tensor, " pair"]) -> None:
        if not bool((weight > 0).any()):
            return
        for _ in range(fitting.steps):
            drawn = torch.multinomial(weight, fitting.pairs, replacement=True, generator=generator)
            requests = [Request(examples[place], 1) for place in drawn.tolist()]
            batch = method.shape_reward(method.rollout(policies[model], requests, limit=1, seed=fitting.seed))
            step = BatchStep(policies[model], method, batch, optimizers[model], fitting.token_budget, _refuse)
            method.update(step)

    return expectation_maximisation(margins, fit, number, len(policies), rounds=rounds, hard=hard)


def _margin(
    policy: CausalLM, prompts: Sequence[Text], chosen: Sequence[Text], rejected: Sequence[Text]
) -> Float[Tensor, " pair"]:
    model, plain = RewardModel(policy), Options(normalize=False)
    return model.scores(prompts, chosen, plain)[0] - model.scores(prompts, rejected, plain)[0]


def _refuse(reason: str, batch: Rollout) -> None:
    raise UsageError(f"a reward model of the mixture could not be trained, because {reason}; try a lower learning rate")
