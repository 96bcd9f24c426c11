"""The card of self-improving SRPO: worked example, the game that it solves, six sequences a pair, revision."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.example import Example, Text
from polopt.core.loss import Evaluation
from polopt.core.override import override
from polopt.core.policy import Request
from polopt.core.rollout import Rollout
from polopt.methods.preference.srpo_selfimproving import SelfImproving, srpo_selfimproving
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.rollouts.drafts import BetterDraft, DraftedGroups, DraftedPairs, Drafts, Revised
from polopt.rollouts.groups import Groups
from tests.support import close, f64, now, same, value_and_gradient

LABELS = [1, 0, 1, 0, 1, 0]
DRAFTS = [-1, -1, 0, 0, 1, 1]
"""w, l, w|l, l|l, w|w, l|w: as the rollout writes them."""


def pairs(ratios: Sequence[Sequence[float]], **step: Any) -> tuple[Rollout, Any]:
    """Groups of six answers of one step with these log-ratios, log pi_ref = 0."""
    count = len(ratios)
    rollout = Rollout.from_arrays(
        range(6 * count),
        np.repeat(np.arange(count), 6),
        step={"logp/ref": f64([0.0] * 6 * count), **step},
        trajectories={"label": f64(LABELS * count), "draft": torch.tensor(DRAFTS * count)},
    )
    return rollout, now([value for group in ratios for value in group])


# g(w), g(l), r(w|l), r(l|l), r(w|w), r(l|w) of the worked example's two pairs.
WORKED = [[0.3, -0.4, 0.5, 0.1, 0.2, -0.1], [-0.2, 0.1, 0.2, -0.3, 0.4, 0.3]]


def of(ratios: Sequence[Sequence[float]] = WORKED, beta: float = 0.5, alpha: float = 0.25) -> tuple[float, Tensor]:
    rollout, evaluation = pairs(ratios)
    return value_and_gradient(srpo_selfimproving | {"objective": SelfImproving(beta, alpha)}, evaluation, rollout)


def test_worked_example() -> None:
    loss, gradient = of()
    close(loss, 0.176328125, digits=9)
    close(of(alpha=0.0)[0], 0.1953125, digits=9)
    close(of(alpha=1.0)[0], 0.119375, digits=9)
    slopes = gradient.view(2, 6)
    close(slopes[:, 0], [-0.0328125, -0.1125], digits=9)
    close(slopes[:, 1], [0.0328125, 0.1125], digits=9)
    close(slopes[:, 2], [-0.0515625, -0.128125], digits=9)
    close(slopes[:, 5], [0.0546875, 0.140625], digits=9)
    close(slopes[:, 4], [-0.021875, -0.028125], digits=9)
    # dr(l|l) = alpha a beta / P with a = 1/2 - beta (r(w|l) - r(l|l)).
    same(slopes[:, 3], [0.25 * 0.5 * (0.5 - 0.5 * 0.4) / 2, 0.25 * 0.5 * (0.5 - 0.5 * 0.5) / 2])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_at_the_reference_the_loss_is_a_quarter(alpha: float) -> None:
    same(of([[0.0] * 6], alpha=alpha)[0], 0.25)


def test_it_is_linear_in_alpha() -> None:
    whole = [of(alpha=a)[0] for a in (0.0, 1.0)]
    same(of(alpha=0.7)[0], 0.3 * whole[0] + 0.7 * whole[1])


def test_exchanging_the_label_changes_the_targets() -> None:
    w, l, w_l, l_l, w_w, l_w = WORKED[0]  # noqa: E741
    swapped = of([[l, w, l_w, w_w, l_l, w_l]])[0]
    a, b, c = 0.5 * (w_l - l_l), 0.5 * (w_w - l_w), 0.25 * (w - l + w_l - l_w)
    same(swapped, 0.75 * (-0.5 - c) ** 2 + 0.125 * ((-0.5 - a) ** 2 + (-0.5 - b) ** 2))


def test_a_pair_that_lacks_a_sequence_teaches_nothing() -> None:
    rollout, evaluation = pairs(WORKED)
    mask = torch.ones(12, dtype=torch.bool)
    mask[3] = False
    method = srpo_selfimproving | {"objective": SelfImproving(0.5, 0.25)}
    for broken in (
        rollout.with_columns(step={"mask": mask}),
        rollout.with_columns(trajectory={"label": rollout["label"].masked_fill(~mask, torch.nan)}),
        rollout.with_columns(trajectory={"draft": torch.where(mask, rollout["draft"], 1)}),
    ):
        loss, gradient = value_and_gradient(method, evaluation, broken)
        same(loss, of([WORKED[1]])[0] / 2)
        assert not gradient[:6].any() and gradient[6:].any()
    alone, gradient = value_and_gradient(method, now([0.3]), rollout.select(torch.tensor([0])))
    assert alone == 0 and not gradient.any()


def test_pieces_add_up_and_order_does_not_matter() -> None:
    rollout, evaluation = pairs([*WORKED, [0.1, 0.2, -0.3, 0.4, 0.0, 0.6]])
    method, found = srpo_selfimproving, []
    loss, metrics = method.loss(evaluation, rollout)
    for group in range(3):
        chosen = rollout.group == group
        part = rollout.piece(chosen)
        found.append(method.loss(Evaluation({"logp": evaluation.logp[chosen]}), part))
    same(sum(value.detach() for value, _ in found), loss.detach())
    for name, value in metrics.items():
        same(sum(float(m[name]) for _, m in found), float(value), rtol=1e-6)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    moved = method.loss(Evaluation({"logp": evaluation.logp[order]}), rollout.select(order))[0]
    same(moved.detach(), loss.detach())


def test_metrics_are_those_of_the_first_answers() -> None:
    rollout, evaluation = pairs(WORKED)
    _, metrics = (srpo_selfimproving | {"objective": SelfImproving(0.5, 0.25)}).loss(evaluation, rollout)
    close(metrics["rewards/accuracies"], 0.5)
    close(metrics["rewards/margins"], 0.5 * (0.7 - 0.3) / 2)
    close(metrics["improver/margin"], 0.5 * (0.4 + 0.5) / 2)


def test_values_out_of_range() -> None:
    for field, value in (("beta", 0.0), ("alpha", 1.5)):
        with pytest.raises(UsageError, match=field):
            override(srpo_selfimproving, {f"objective.{field}": value})


# --- the game ---------------------------------------------------------------------------------------------------------

SIZE, BETA = 4, 0.4


class Game:
    """Random preferences that no reward explains, random references of generator [y] and improver [draft, y]."""

    def __init__(self, seed: int, even: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand(SIZE, SIZE, generator=generator, dtype=torch.float64)
        self.p = 0.5 + (0.0 if even else 1.0) * (draw - draw.T) / 2
        self.reference = torch.randn(SIZE, generator=generator, dtype=torch.float64).softmax(-1)
        self.draft_reference = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64).softmax(-1)
        # [draft, y]: P(y beats draft).
        tilted = self.draft_reference * (self.p.T / BETA).exp()
        self.normaliser = tilted.sum(-1)
        self.improver = tilted / self.normaliser[:, None]
        self.policy = (self.reference / self.normaliser) / (self.reference / self.normaliser).sum()

    def value(self, policy: Tensor, improver: Tensor) -> float:
        wins = (policy[:, None] * improver * self.p.T).sum()
        kl = (improver * (improver / self.draft_reference).log()).sum(-1)
        return float(wins - BETA * (policy * kl).sum() + BETA * (policy * (policy / self.reference).log()).sum())

    def loss(self, generator: Tensor, improver: Tensor, law: Tensor, alpha: float) -> Tensor:
        """Expected loss over ordered pairs of a law, from logits, through the method's objective."""
        w, l = (side.flatten() for side in torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij"))  # noqa: E741
        kept = w != l
        w, l = w[kept], l[kept]  # noqa: E741
        g, r = generator.log_softmax(-1), improver.log_softmax(-1)
        g_ref, r_ref = self.reference.log(), self.draft_reference.log()
        logp = torch.stack([g[w], g[l], r[l, w], r[l, l], r[w, w], r[w, l]], 1)
        ref = torch.stack([g_ref[w], g_ref[l], r_ref[l, w], r_ref[l, l], r_ref[w, w], r_ref[w, l]], 1)
        rollout, _ = pairs([[0.0] * 6] * len(w), **{"logp/ref": ref.flatten()})
        terms = SelfImproving(BETA, alpha)(Evaluation({"logp": logp.flatten()}), rollout).value
        return (law[w, l] * self.p[w, l] * terms).sum()


@pytest.mark.parametrize("seed", range(3))
def test_both_identities_hold_at_the_solution(seed: int) -> None:
    game = Game(seed)
    g = (game.policy / game.reference).log()
    r = (game.improver / game.draft_reference).log().T  # r[y', y] of y' behind the draft y
    for y2 in range(SIZE):
        for y1 in range(SIZE):
            same(game.p[y2, y1], 0.5 + BETA * (r[y2, y1] - r[y1, y1]))
            same(game.p[y2, y1], 0.5 + BETA / 2 * (g[y2] - g[y1] + r[y2, y1] - r[y1, y2]))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_solution_is_stationary_whoever_wrote_the_pairs(seed: int, alpha: float) -> None:
    game = Game(seed)
    generator = torch.Generator().manual_seed(10 + seed)
    for _ in range(2):
        law = torch.rand(SIZE, SIZE, generator=generator, dtype=torch.float64)
        law = law + law.T
        tables = [game.policy.log().requires_grad_(), game.improver.log().requires_grad_()]
        at = torch.autograd.grad(
            game.loss(tables[0], tables[1], law, alpha), tables, allow_unused=True, materialize_grads=True
        )
        assert all(float(slope.abs().max()) < 1e-13 for slope in at)
        tables = [game.reference.log().requires_grad_(), game.draft_reference.log().requires_grad_()]
        away = torch.autograd.grad(
            game.loss(tables[0], tables[1], law, alpha), tables, allow_unused=True, materialize_grads=True
        )
        assert max(float(slope.abs().max()) for slope in away) > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_the_solution_is_a_saddle(seed: int) -> None:
    game, generator = Game(seed), torch.Generator().manual_seed(seed)
    best = game.value(game.policy, game.improver)
    for share in (0.1, 0.5, 1.0):
        other = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64).softmax(-1)
        assert game.value(game.policy, (1 - share) * game.improver + share * other) < best
        draft = torch.randn(SIZE, generator=generator, dtype=torch.float64).softmax(-1)
        assert game.value((1 - share) * game.policy + share * draft, game.improver) > best


def test_without_preferences_both_roles_are_the_reference() -> None:
    game = Game(0, even=True)
    same(game.policy, game.reference)
    same(game.improver, game.draft_reference)


# --- drafts -----------------------------------------------------------------------------------------------------------


def test_how_a_prompt_shows_a_draft() -> None:
    request = Request(Example("a", "1+{x}=?\n"), 1)
    assert Drafts().with_draft(request, "{3}").prompt == "1+{x}=?\n{3}\n1+{x}=?\n"
    shown = Drafts(template="Q {prompt} A {draft} again {draft}").with_draft(request, "{prompt}")
    assert shown.prompt == "Q 1+{x}=?\n A {prompt} again {prompt}"
    chat = Request(Example("b", ({"role": "user", "content": "hi"},)), 1)
    asked = ({"role": "assistant", "content": "no"}, {"role": "user", "content": "Better."})
    assert Drafts(instruction="Better.").with_draft(chat, "no").prompt == (*chat.example.prompt, *asked)
    assert Drafts(instruction="Better.").with_draft(chat, (asked[0],)).prompt == (*chat.example.prompt, *asked)
    with pytest.raises(UsageError, match="'a' is a chat"):
        Drafts().with_draft(request, (asked[0],))
    with pytest.raises(UsageError, match="does not show the draft"):
        DraftedPairs(template="{prompt}")
    with pytest.raises(UsageError, match="does not show the draft"):
        Revised(template="{prompt}")
    with pytest.raises(UsageError, match="rounds is -1"):
        Revised(rounds=-1)


SPACE = SequenceSpace(3, 2)
S = SPACE.n_sequences


def behind(request: Request, draft: Text) -> Request:
    """In the exact world a prompt is a number: that of problem 0 behind draft s is 1 + s."""
    place = 1 + SPACE.index([int(token) for token in str(draft).split()])
    return dataclasses.replace(request, example=dataclasses.replace(request.example, columns={"problem": place}))


class ExactPairs(DraftedPairs):
    def with_draft(self, request: Request, draft: Text) -> Request:
        return behind(request, draft)


class ExactRevised(Revised):
    def with_draft(self, request: Request, draft: Text) -> Request:
        return behind(request, draft)


def test_a_pair_is_written_as_six_sequences() -> None:
    policy = ExactPolicy(SPACE, 1 + S)
    examples = [
        Example("a", "", chosen="2 1", rejected="0 0"),
        Example("b", "", completions=("0 1", "1 1"), labels=(0.2, 0.7)),
    ]
    requests = [Request(dataclasses.replace(e, columns={"problem": 0}), 3, columns={"hint": 0.5}) for e in examples]
    rollout = ExactPairs()(policy, [*requests, Request(examples[0], 0)], limit=7, seed=0)
    payload: Any = rollout.payload
    assert payload.completions == ("2 1", "0 0") * 3 + ("1 1", "0 1") * 3
    assert payload.problem.tolist() == [0, 0, 1, 1, 8, 8, 0, 0, 2, 2, 5, 5]
    assert rollout["label"].tolist() == LABELS * 2 and rollout["draft"].tolist() == DRAFTS * 2
    assert rollout.group.tolist() == [0] * 6 + [1] * 6 and rollout["limit"].tolist() == [7] * 12
    assert rollout["hint"].tolist() == [0.5] * 12
    assert srpo_selfimproving.rollout.gives <= set(rollout.names())
    with pytest.raises(UsageError, match="'c' brings no pair"):
        ExactPairs()(policy, [Request(Example("c", "", columns={"problem": 0}), 1)], limit=7, seed=0)


@dataclasses.dataclass(frozen=True)
class ExactDrafts(Drafts):
    def with_draft(self, request: Request, draft: Text) -> Request:
        return behind(request, draft)


class ExactGroups(DraftedGroups):
    def drafts(self) -> Drafts:
        return ExactDrafts()


def test_pairs_on_policy_are_judged_and_turned() -> None:
    policy = ExactPolicy(SPACE, 1 + S)
    request = Request(Example("a", "", columns={"problem": 0}), 5, columns={"hint": 0.5})
    drawn: Any = Groups()(policy, [request, request], limit=2, seed=1).payload
    texts = drawn.completions
    rollout = ExactGroups()(policy, [request, request], limit=2, seed=1)
    wanted = [(texts[i], texts[i + 1]) for i in (0, 2, 5, 7) if texts[i] != texts[i + 1]]
    payload: Any = rollout.payload
    assert payload.completions == tuple(text for pair in wanted for text in pair * 3)
    count = len(wanted)
    assert count >= 2 and rollout.group.tolist() == [g for g in range(count) for _ in range(6)]
    assert rollout["draft"].tolist() == DRAFTS * count and rollout["hint"].tolist() == [0.5] * 6 * count
    # The second answer of the first pair is better; the second pair ties, others have no valid score.
    score = torch.full((6 * count,), torch.nan)
    score[:6] = torch.tensor([0.0, 1.0] * 3)
    score[6:12] = 0.5
    judged = BetterDraft()(rollout.with_columns(trajectory={"score": score}))
    assert judged.n_trajectories == 6
    assert judged["label"].tolist() == [0, 1] * 3 and judged["draft"].tolist() == [-1, -1, 1, 1, 0, 0]
    kept = BetterDraft()(rollout.with_columns(trajectory={"score": 1 - score}))
    assert kept["label"].tolist() == LABELS and kept["draft"].tolist() == DRAFTS
    slots = srpo_selfimproving.rollout.on_policy()
    assert (srpo_selfimproving | slots).needs >= {"score", "logp/ref"} and "draft" not in (
        srpo_selfimproving | slots
    ).needs


def test_answers_that_cannot_be_compared() -> None:
    logits = torch.zeros(1 + S, SPACE.n_nodes, 3, dtype=torch.float64)
    logits[..., 0] = 50.0
    request = Request(Example("a", "", columns={"problem": 0}), 2)
    with pytest.raises(UsageError, match="no two answers can be compared"):
        ExactGroups()(ExactPolicy(SPACE, 1 + S, logits), [request], limit=2, seed=0)
    with pytest.raises(UsageError, match="'a' asks for one answer"):
        ExactGroups()(ExactPolicy(SPACE, 1 + S), [dataclasses.replace(request, count=1)], limit=2, seed=0)


def test_answers_are_revised_round_by_round() -> None:
    """An improver that turns sequence s into s + 1: k rounds add k."""
    logits = torch.zeros(1 + S, SPACE.n_nodes, 3, dtype=torch.float64)
    for draft in range(S):
        target = SPACE.sequences[(draft + 1) % S]
        logits[1 + draft, 0, target[0]] = 50.0
        logits[1 + draft, 1 + target[0], target[1]] = 50.0
    policy = ExactPolicy(SPACE, 1 + S, logits)
    request = Request(Example("a", "", columns={"problem": 0}), 5)

    def answers(rounds: int) -> Tensor:
        rollout = ExactRevised(rounds=rounds)(policy, [request, request], limit=2, seed=3)
        assert rollout.group.tolist() == [0] * 5 + [1] * 5
        payload: Any = rollout.payload
        return torch.tensor([SPACE.index(ids) for ids in payload.completion_ids])

    first = answers(0)
    assert len(set(first.tolist())) > 1
    for rounds in (1, 4):
        assert torch.equal(answers(rounds), (first + rounds) % S)


def test_what_it_declares() -> None:
    assert srpo_selfimproving.unit == "group" and srpo_selfimproving.offline
    held_out = override(srpo_selfimproving, {"rollout.rounds": 5}).rollout.held_out()
    assert isinstance(held_out, Revised) and held_out.rounds == 5
    assert held_out.held_out() is held_out
