"""SRPO: a policy that does not depend on who wrote the pairs (Choi et al. 2024, arXiv:2406.01660).

Design, fixed before the first run.

Exact world: 2 prompts, the 9 sequences of two tokens out of 3, and the improver as 9 prompts more for each of them, one
per draft, with a reference of its own. Preferences: half a circle, half Bradley-Terry, so that no reward explains them;
references from normal logits with standard deviation 0.5. Two laws mu of the pairs' answers: softmax of twice a
standard normal, drawn apart. beta 0.25 in every loss (SRPO with alpha 1/2, IPO on sums, DPO). TV is the mean over
prompts of the total variation between the generators learned from mu_1 and from mu_2.

Population: the minimiser of the expected loss over all ordered pairs, P(w beats l) mu(w) mu(l) each, through the
objective parts, found by L-BFGS from the reference in 300 steps.

- TV of SRPO within 0.01 of 0; that of IPO, and of DPO, above it.
- Its revisions win: y_0 from the generator, y_{k+1} from the improver behind y_k, all laws exact. The chance that y_1
  beats a fresh y_0 is above one half, and that y_5 does above that of y_1.

Sample: 100 pairs per prompt from each law with drawn labels, the ordinary trainer, 100 updates with Adam at rate 0.1 on
all of them.

- TV of SRPO below that of IPO, and below that of DPO.
- A language model that revises: needs a policy fine-tuned on the template for revisions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from polopt.claims.claim import Claim
from polopt.claims.exact import start
from polopt.core.example import Example, Text
from polopt.core.loss import Evaluation, Loss
from polopt.core.method import Method, Schedule
from polopt.core.policy import Request
from polopt.core.rollout import Rollout
from polopt.methods.preference.dpo import DPO, dpo
from polopt.methods.preference.ipo import IPO
from polopt.methods.preference.srpo_selfimproving import SelfImproving, srpo_selfimproving
from polopt.policies.exact import SequenceSpace, tree
from polopt.rollouts.drafts import DraftedPairs
from polopt.tasks.preferences import labelled, sequence_of
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(3, 2)
S, PROMPTS, BETA, STEPS, REVISIONS = SPACE.n_sequences, 2, 0.25, 300, 5
PAIRS, UPDATES = 100, 100
OBJECTIVES: Mapping[str, Callable[[Evaluation, Rollout], Loss]] = {
    "srpo": SelfImproving(BETA),
    "ipo": IPO(BETA, per_step=False),
    "dpo": DPO(BETA),
}


class ExactDrafts(DraftedPairs):
    """Prompt b behind the draft s is the problem `PROMPTS` + S b + s."""

    def with_draft(self, request: Request, draft: Text) -> Request:
        place = sequence_of(SPACE, draft)
        number = PROMPTS + S * int(request.example.columns["problem"]) + place
        return replace(request, example=replace(request.example, columns={"problem": number}))


@dataclasses.dataclass(frozen=True)
class World:
    """Problems, their references [b, y] and [b, draft, y] as log-probabilities, and the two laws [b, y]."""

    made: Problem
    wide: Problem
    laws: tuple[Tensor, Tensor]

    @property
    def references(self) -> tuple[Tensor, Tensor]:
        """Of the generator and of the improver."""
        logs = tree.log_probabilities(SPACE, self.wide.initial)
        return logs[:PROMPTS], logs[PROMPTS:].view(PROMPTS, S, S)


def world(seed: int) -> World:
    """The world of a seed."""
    made = problem("intransitive-preferences", space=SPACE, batch=PROMPTS, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (PROMPTS * S, *made.initial.shape[1:])
    initial = torch.cat([made.initial, 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)])
    wide = replace(
        made,
        rewards={"none": torch.zeros(len(initial), S, dtype=torch.float64)},
        initial=initial,
        reference=initial,
        game=None,
        group_sizes=(1,) * len(initial),
    )
    first, second = ((2 * torch.randn(PROMPTS, S, generator=generator, dtype=torch.float64)).softmax(-1) for _ in "12")
    return World(made, wide, (first, second))


# --- the whole law of pairs -------------------------------------------------------------------------------------------


def expected(name: str, world: World, law: Tensor, logs: Sequence[Tensor]) -> Tensor:
    """The expected loss of log-probabilities of generator and improver."""
    b, w, l = (x.flatten() for x in torch.meshgrid(torch.arange(PROMPTS), *[torch.arange(S)] * 2, indexing="ij"))  # noqa: E741
    kept = w != l
    b, w, l = b[kept], w[kept], l[kept]  # noqa: E741

    def sequences(tables: Sequence[Tensor]) -> Tensor:
        g, r = tables
        first = [g[b, w], g[b, l]]
        rest = [r[b, l, w], r[b, l, l], r[b, w, w], r[b, w, l]] if name == "srpo" else []
        return torch.stack([*first, *rest], 1).flatten()

    count = 6 if name == "srpo" else 2
    group = torch.arange(len(b)).repeat_interleave(count)
    rollout = Rollout.from_arrays(
        torch.arange(len(group)),
        group,
        step={"logp/ref": sequences(world.references)},
        trajectories={
            "label": torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(group) // 2),
            "draft": torch.tensor([-1, -1, 0, 0, 1, 1][:count]).repeat(len(b)),
        },
    )
    terms = OBJECTIVES[name](Evaluation({"logp": sequences(logs)}), rollout).value
    assert world.made.game is not None
    weight = law[b, w] * law[b, l] * world.made.game.preference[b, w, l]
    return (weight * terms).sum() / weight.sum()


def minimiser(name: str, world: World, law: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Probabilities of generator and improver at the least expected loss."""
    logits = [table.clone().requires_grad_() for table in world.references]
    optimizer = torch.optim.LBFGS(
        logits if name == "srpo" else logits[:1],
        max_iter=steps,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = expected(name, world, law, [z.log_softmax(-1) for z in logits])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    generator, improver = (z.detach().softmax(-1) for z in logits)
    return generator, improver


def variation(one: Tensor, other: Tensor) -> float:
    """Total variation between laws [b, y], mean over prompts."""
    return float((one - other).abs().sum(-1).mean() / 2)


def population(seed: int, quick: bool) -> Mapping[str, float]:
    """TV of every loss, and how often revisions of SRPO beat its first answers."""
    made, steps = world(seed), 3 if quick else STEPS
    found: dict[str, float] = {}
    for name in OBJECTIVES:
        (one, improver), (other, _) = (minimiser(name, made, law, steps) for law in made.laws)
        found[name] = variation(one, other)
        if name == "srpo":
            assert made.made.game is not None
            law, wins = one, []
            for _ in range(REVISIONS):
                law = (law[:, None] @ improver)[:, 0]
                wins.append(float(made.made.game.win_rate(law, one).mean()))
            found |= {"wins/first": wins[0] - 0.5, "wins/gain": wins[-1] - wins[0]}
    return found


# --- a sample of pairs ------------------------------------------------------------------------------------------------


def learned(method: Method, made: World, examples: Sequence[Example], seed: int, updates: int) -> Tensor:
    """Probabilities of the generator after training."""
    run = start(made.wide, method | {"schedule": Schedule(epochs=updates)}, seed=seed, examples=examples)
    run.step()
    return run.policy.probabilities()[:PROMPTS].detach()


def sample(seed: int, quick: bool) -> Mapping[str, float]:
    """TV of every loss after training on pairs that were drawn."""
    made, updates = world(seed), 2 if quick else UPDATES
    methods = {name: dpo | {"objective": objective} for name, objective in OBJECTIVES.items()}
    methods["srpo"] = srpo_selfimproving | {"rollout": ExactDrafts(), "objective": OBJECTIVES["srpo"]}
    pools = [labelled(made.made, PAIRS * PROMPTS, law=law, seed=seed) for law in made.laws]
    return {
        name: variation(*(learned(method, made, pool, seed, updates) for pool in pools))
        for name, method in methods.items()
    }


TV = "total variation between policies learned from two laws of pairs"


def _less(world: str, rival: str, baseline: str, measure: Callable[[int, bool], Mapping[str, float]]) -> Claim:
    statement = {
        "population": f"What {baseline} learns from all pairs depends on who wrote them, unlike SRPO's policy.",
        "sample": f"From 100 pairs per prompt SRPO's policy depends less on who wrote them than that of {baseline}.",
    }[world]
    return Claim(
        "srpo-selfimproving",
        f"{world}-{rival}",
        statement,
        "exact",
        baseline,
        TV,
        "lower",
        "srpo",
        rival,
        measure=measure,
    )


CLAIMS = (
    Claim(
        "srpo-selfimproving",
        "robust",
        "What SRPO learns from all pairs does not depend on who wrote them.",
        "exact",
        "itself on pairs of another law",
        TV,
        "equal",
        "srpo",
        None,
        margin=0.01,
        measure=population,
    ),
    _less("population", "ipo", "IPO", population),
    _less("population", "dpo", "DPO", population),
    _less("sample", "ipo", "IPO", sample),
    _less("sample", "dpo", "DPO", sample),
    Claim(
        "srpo-selfimproving",
        "revision",
        "The improver's revision beats the generator's answers.",
        "exact",
        "the generator's own answers",
        "exact win rate of the first revision, above one half",
        "higher",
        "wins/first",
        None,
        measure=population,
    ),
    Claim(
        "srpo-selfimproving",
        "revisions",
        "Further revisions win more often still.",
        "exact",
        "the first revision",
        "exact win rate of the fifth revision against the first answers, above that of the first revision",
        "higher",
        "wins/gain",
        None,
        measure=population,
    ),
    Claim(
        "srpo-selfimproving",
        "language-model",
        "A language model trained by SRPO improves its drafts where one trained by DPO or IPO does not.",
        "small",
        "DPO and IPO, prompted to revise",
        "win rate of revisions against the first draft, over rounds",
        "higher",
        untestable="needs a policy that was fine-tuned on the template for revisions; the shipped one never saw it",
    ),
)
