"""CPL: the policy from regrets, without a reward model (Hejna et al. 2023, arXiv:2310.13639).

Design, fixed before the first run. An exact world of its own, a tabular MDP: 12 states, 4 actions, rewards r(s, a)
standard normal, transitions Dirichlet(1/2), discount 0.9, uniform start. The optimal soft policy has temperature 0.5,
the behaviour policy is a softmax of normal logits of standard deviation 1. Segments of 5 steps start in uniform states;
of two, the first is preferred with probability sigma(A(1) - A(2)), A the discounted sum of optimal soft advantages.

The policy is a table of logits. Behaviour cloning on all segments is exact, with a pseudo-count per action; from there
the method's own loss takes 200 full-batch updates of Adam at rate 0.1 with alpha 0.5 and discount 0.9: "cpl" with
lambda 1, "bias" with lambda 0.5, "cloning" with lambda 1 and 0.1 times behaviour cloning. "sft" is behaviour cloning on
the preferred segments. "reward" fits r(s, a) to the comparisons, P = sigma of the difference of discounted sums, with
ridge 0.1 on the summed loss, and takes its exact optimal soft policy. 20, 200 and 1000 comparisons. Metric: exact
discounted return, as a share of the way from the behaviour policy (0) to the optimal soft policy (1).

- cpl above sft with 200 and with 1000 comparisons.
- cpl not below reward by more than 0.05 with 1000, and with 200, comparisons.
- With 20 comparisons bias above cpl, and cloning above cpl; with 1000 cpl above bias.
- cpl with 1000 comparisons within 0.1 of the optimal soft policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from polopt.claims.claim import Claim
from polopt.core.loss import Evaluation
from polopt.core.method import Method
from polopt.core.rollout import Rollout
from polopt.methods.preference.cpl import CPL, BehaviourCloning, cpl

STATES, ACTIONS, STEPS, DISCOUNT, TEMPERATURE = 12, 4, 5, 0.9, 0.5
UPDATES, RATE, RIDGE, SWEEPS = 200, 0.1, 0.1, 300
SIZES = (20, 200, 1000)

PLAIN = CPL(alpha=TEMPERATURE, bias=1.0, discount=DISCOUNT)
ARMS: Mapping[str, Method] = {
    "cpl": cpl | {"objective": PLAIN},
    "bias": cpl | {"objective": CPL(alpha=TEMPERATURE, bias=0.5, discount=DISCOUNT)},
    "cloning": cpl | {"objective": PLAIN, "regularizer": BehaviourCloning(0.1)},
}


@dataclass(frozen=True)
class MDP:
    """Rewards [S, A], transitions [S, A, S]."""

    reward: Tensor
    transition: Tensor

    @classmethod
    def random(cls, generator: torch.Generator) -> MDP:
        reward = torch.randn(STATES, ACTIONS, generator=generator, dtype=torch.float64)
        # A Gamma(1/2) variable is half the square of a normal one.
        mass = torch.randn(STATES, ACTIONS, STATES, generator=generator, dtype=torch.float64).square()
        return cls(reward, mass / mass.sum(-1, keepdim=True))

    def soft_advantage(self) -> Tensor:
        """Q - V of the optimal soft policy, [S, A]: temperature times its log-probs."""
        q = self.reward
        for _ in range(SWEEPS):
            value = TEMPERATURE * (q / TEMPERATURE).logsumexp(-1)
            q = self.reward + DISCOUNT * self.transition @ value
        return q - TEMPERATURE * (q / TEMPERATURE).logsumexp(-1, keepdim=True)

    def value(self, logits: Tensor) -> float:
        """Exact discounted return of a policy from a uniform start."""
        chance = logits.softmax(-1)
        mean = (chance * self.reward).sum(-1)
        moves = torch.einsum("sa,sat->st", chance, self.transition)
        return float(torch.linalg.solve(torch.eye(STATES).to(mean) - DISCOUNT * moves, mean).mean())

    def segments(self, logits: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Places (state, action) of the steps of ``count`` segments, s A + a, [count, T]."""
        state = torch.randint(STATES, (count,), generator=generator)
        found = []
        for _ in range(STEPS):
            action = torch.multinomial(logits.softmax(-1)[state], 1, generator=generator)[:, 0]
            found.append(state * ACTIONS + action)
            state = torch.multinomial(self.transition[state, action], 1, generator=generator)[:, 0]
        return torch.stack(found, 1)


def cloned(places: Tensor) -> Tensor:
    """Logits of behaviour cloning with a pseudo-count of 1."""
    return (torch.bincount(places.flatten(), minlength=STATES * ACTIONS) + 1.0).double().log().view(STATES, ACTIONS)


def contrasted(method: Method, segments: Tensor, label: Tensor, updates: int) -> Tensor:
    """The logits that the method learns from segments [2 P, T], two after the other being compared."""
    count = len(segments)
    rollout = Rollout.from_arrays(
        torch.arange(count).repeat_interleave(STEPS), torch.arange(count) // 2, trajectories={"label": label}
    )
    logits = cloned(segments).requires_grad_()
    optimizer = torch.optim.Adam([logits], RATE)
    for _ in range(updates):
        logp = logits.log_softmax(-1).flatten()[segments.flatten()]
        loss, _ = method.loss(Evaluation({"logp": logp}), rollout)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return logits.detach()


def rewarded(made: MDP, winners: Tensor, losers: Tensor) -> Tensor:
    """Optimal soft logits for the rewards that a Bradley-Terry model of summed rewards finds."""
    power = DISCOUNT ** torch.arange(STEPS, dtype=torch.float64)

    def features(places: Tensor) -> Tensor:
        return (F.one_hot(places, STATES * ACTIONS).double() * power[:, None]).sum(1)

    difference = features(winners) - features(losers)
    reward = torch.zeros(STATES * ACTIONS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([reward], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -F.logsigmoid(difference @ reward).sum() + RIDGE * reward.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    fitted = MDP(reward.detach().view(STATES, ACTIONS), made.transition)
    return fitted.soft_advantage() / TEMPERATURE


def measure(seed: int, quick: bool) -> Mapping[str, float]:
    """The share of the way to the optimal soft policy, of every arm at every number of comparisons."""
    generator = torch.Generator().manual_seed(seed)
    made = MDP.random(generator)
    behaviour = torch.randn(STATES, ACTIONS, generator=generator, dtype=torch.float64)
    advantage = made.soft_advantage()
    start, best = made.value(behaviour), made.value(advantage / TEMPERATURE)
    power = DISCOUNT ** torch.arange(STEPS, dtype=torch.float64)
    most = 40 if quick else max(SIZES)
    every = made.segments(behaviour, 2 * most, generator)
    regret = (advantage.flatten()[every] * power).sum(1).view(-1, 2)
    draw = torch.rand(most, generator=generator, dtype=torch.float64)
    first = draw < torch.sigmoid(regret[:, 0] - regret[:, 1])
    label = torch.stack([first, ~first], 1).double().flatten()
    found = {"optimum": 1.0}
    for size in SIZES:
        segments, own = every[: 2 * size], label[: 2 * size]
        winners, losers = segments[own > 0], segments[own == 0]
        learned = {
            **{name: contrasted(method, segments, own, 3 if quick else UPDATES) for name, method in ARMS.items()},
            "sft": cloned(winners),
            "reward": rewarded(made, winners, losers),
        }
        found |= {f"{name}/{size}": (made.value(z) - start) / (best - start) for name, z in learned.items()}
    return found


SHARE = "exact return, from the behaviour policy (0) to the optimal soft policy (1)"


def _sft(size: int) -> Claim:
    return Claim(
        "cpl",
        f"sft-{size}",
        f"With {size} comparisons CPL finds a better policy than fine-tuning on the preferred segments.",
        "exact",
        "behaviour cloning of the preferred segments",
        SHARE,
        "higher",
        f"cpl/{size}",
        f"sft/{size}",
        measure=measure,
    )


def _reward(size: int) -> Claim:
    return Claim(
        "cpl",
        f"reward-model-{size}",
        f"With {size} comparisons labelled by regret CPL is no worse than a model of summed rewards with exact RL.",
        "exact",
        "Bradley-Terry model of summed rewards, exact soft-optimal policy",
        SHARE,
        "higher",
        f"cpl/{size}",
        f"reward/{size}",
        margin=0.05,
        measure=measure,
    )


def _variant(name: str, statement: str, baseline: str, treatment: str, control: str) -> Claim:
    return Claim("cpl", name, statement, "exact", baseline, SHARE, "higher", treatment, control, measure=measure)


CLAIMS = (
    _sft(200),
    _sft(1000),
    _reward(200),
    _reward(1000),
    _variant(
        "bias-few",
        "With 20 comparisons the conservative bias of 0.5 helps.",
        "cpl without bias",
        "bias/20",
        "cpl/20",
    ),
    _variant(
        "cloning-few",
        "With 20 comparisons behaviour cloning beside the contrast helps.",
        "cpl without bias",
        "cloning/20",
        "cpl/20",
    ),
    _variant(
        "bias-many",
        "With 1000 comparisons CPL without the bias of 0.5 is better.",
        "cpl with bias 0.5",
        "cpl/1000",
        "bias/1000",
    ),
    Claim(
        "cpl",
        "optimum",
        "With 1000 comparisons CPL reaches the optimal soft policy.",
        "exact",
        "the optimal soft policy",
        SHARE,
        "equal",
        "cpl/1000",
        "optimum",
        margin=0.1,
        measure=measure,
    ),
    Claim(
        "cpl",
        "p-iql",
        "CPL beats preference-based IQL on robot manipulation.",
        "exact",
        "P-IQL",
        "success rate",
        "higher",
        untestable="needs continuous control from states and images, and critics learned offline",
    ),
)
