"""The card of reward-augmented data: what is relabelled how, what a goal-blind model learns, worked examples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.override import override
from polopt.core.policy import Request
from polopt.core.rollout import Rollout
from polopt.methods.preference.dpo import DPO, dpo
from polopt.methods.preference.reward_augmented_dpo import Goals, reward_augmented_dpo
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.rollouts.dataset import Dataset, groups_of
from polopt.training.build import composed
from tests.support import close, f64, now, same, value_and_gradient

SPACE = SequenceSpace(3, 2)


def pair(chosen: str, rejected: str, scores: Sequence[float] | None, name: str = "0", prompt: Any = "Q") -> Example:
    columns: dict[str, Any] = {} if scores is None else {"chosen_score": scores[0], "rejected_score": scores[1]}
    return Example(name, prompt, chosen=chosen, rejected=rejected, columns={**columns, "problem": 0})


def entries(example: Example, part: Goals | None = None) -> list[tuple[str, str, str]]:
    """(prompt, preferred, other) of every entry that the pair form makes."""
    part = part or Goals(template="{goal}")
    found = []
    for request in part.relabelled(Request(example, 1)):
        try:
            (group,) = groups_of(request.example, part.form)
        except UsageError:
            continue
        (better, one), (worse, zero) = group
        assert (one, zero) == (1.0, 0.0)
        found.append((str(request.prompt), str(better), str(worse)))
    return found


def test_worked_example_of_relabelling() -> None:
    scores = [8, 5, 9.5, 7]
    made = [
        entry
        for i, j in ((0, 1), (2, 1), (3, 3))
        for entry in entries(pair(str(i), str(j) + ("" if i != j else " "), (scores[i], scores[j])))
    ]
    assert made == [("8", "0", "1"), ("5", "1", "0"), ("9.5", "2", "1"), ("5", "1", "2")]


@pytest.mark.parametrize("seed", range(3))
def test_two_entries_per_pair_that_agree_with_the_goal_conditioned_reward(seed: int) -> None:
    rng = np.random.default_rng(seed)
    score = {str(i): float(s) for i, s in enumerate(rng.permutation(20)[:8] / 2)}
    for a, b in itertools.permutations(score, 2):
        # Whatever the label says: where scores contradict it, they hold.
        made = entries(pair(a, b, (score[a], score[b])))
        assert [float(goal) for goal, _, _ in made] == sorted((score[a], score[b]), reverse=True)
        for goal, better, worse in made:
            worth = {y: -((float(goal) - score[y]) ** 2) for y in (better, worse)}
            assert worth[better] == 0 > worth[worse]


def test_a_list_has_an_entry_per_score_ordered_by_distance_from_the_goal() -> None:
    example = Example("0", "Q", completions=("a", "b", "c", "d"), labels=(0.2, 0.9, 0.5, 0.9))
    made = Goals(form="lists").relabelled(Request(example, 1))
    assert [request.prompt for request in made] == ["0.9 Q", "0.5 Q", "0.2 Q"]
    for request, goal in zip(made, (0.9, 0.5, 0.2), strict=True):
        same(request.example.labels, [-((goal - r) ** 2) for r in (0.2, 0.9, 0.5, 0.9)])
    assert entries(example) == [("0.9", "b", "a"), ("0.2", "a", "b")]


@pytest.mark.parametrize("bend", [lambda r: 3 * r - 7, lambda r: r**3, math.exp])
def test_only_the_printed_goal_depends_on_the_scale(bend: Any) -> None:
    for scores in itertools.permutations((1.0, 2.5, 4.0), 2):
        plain, bent = (entries(pair("a", "b", s)) for s in (scores, [bend(r) for r in scores]))
        assert [entry[1:] for entry in plain] == [entry[1:] for entry in bent]
        goals = [f"{bend(r):.6g}" for r in sorted(scores, reverse=True)]
        assert [entry[0] for entry in bent] == goals


def test_goals_are_written_into_text_and_chats() -> None:
    part = Goals()
    assert part.conditioned(Request(Example("0", "2+2=?"), 1), 8.0).prompt == "8 2+2=?"
    assert part.conditioned(Request(Example("0", "2+2=?"), 1, prompt="other"), 9.5).prompt == "9.5 other"
    user = {"role": "user", "content": "2+2=?"}
    said = "Give an answer whose quality is 10."
    asked = part.conditioned(Request(Example("0", (user,)), 1), 10.0)
    assert asked.prompt == ({"role": "system", "content": said}, user)
    own = {"role": "system", "content": "Be brief."}
    asked = part.conditioned(Request(Example("0", (own, user)), 1), 10.0)
    assert asked.prompt == ({"role": "system", "content": f"{said}\n\nBe brief."}, user)


class Numbered(Goals):
    """In the exact world a prompt is a number: goals 10 and 5 are problems of their own."""

    def conditioned(self, request: Request, goal: float) -> Request:
        return Request(Example(f"{request.example.id}/{goal:g}", "", columns={"problem": int(goal == 5)},
                               completions=request.example.completions, labels=request.example.labels), 1)  # fmt: skip


def test_the_rollout_has_a_group_per_entry() -> None:
    policy = ExactPolicy(SPACE, 2)
    tie, bare = pair("1 1", "0 0", (5, 5)), pair("1 0", "0 2", None)
    pool = [pair("0 1", "2 2", (10, 5)), tie, bare, pair("2 0", "1 2", (5, 10))]
    rollout = Numbered()(policy, [Request(example, 1) for example in pool], limit=2, seed=0)
    assert rollout.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rollout["label"].tolist() == [1, 0] * 4
    assert rollout.payload is not None
    assert rollout["action"].tolist() == [0, 1, 2, 2, 2, 2, 0, 1, 1, 2, 2, 0, 2, 0, 1, 2]
    assert rollout.payload.problem.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]  # type: ignore[attr-defined]


@pytest.mark.parametrize("scores", [(5, 5), None, (math.nan, 1.0)])
def test_what_cannot_be_used_is_dropped_or_named(scores: Any) -> None:
    policy, usable = ExactPolicy(SPACE, 2), pair("0 1", "2 2", (10, 5))
    bad = pair("1 1", "0 0", scores, name="odd")
    requests = [Request(example, 1) for example in (usable, bad)]
    assert Numbered()(policy, requests, limit=2, seed=0).n_groups == 2
    Numbered().check([usable, bad])
    with pytest.raises(UsageError):
        Numbered()(policy, requests[1:], limit=2, seed=0)
    if scores is None:
        with pytest.raises(UsageError, match="no example has answers with scores"):
            Numbered().check([bad])
    strict = Numbered(unusable="raise")
    with pytest.raises(UsageError, match="odd"):
        strict(policy, requests, limit=2, seed=0)
    with pytest.raises(UsageError, match="odd"):
        strict.check([usable, bad])


def test_only_the_entries_of_chosen_scores_are_ordinary_dpo() -> None:
    """With one goal for all, the prompt has a constant format and the pairs are the plain ones."""
    policy = ExactPolicy(SPACE, 2)
    pool = [pair("0 1", "2 2", (10, 5)), pair("1 1", "0 0", (10, 5))]
    requests = [Request(example, 1) for example in pool]
    ours = Numbered()(policy, requests, limit=2, seed=0)
    kept = ours.select(torch.tensor([0, 1, 4, 5]))
    plain = Dataset()(policy, requests, limit=2, seed=0)
    assert torch.equal(kept["action"], plain["action"]) and torch.equal(kept["label"], plain["label"])


# --- the loss ---------------------------------------------------------------------------------------------------------

LOGP = [-0.5, -1, -0.2, -0.7, -0.4, -0.9, -1.1]
REF = [-0.6, -0.9, -0.3, -0.6, -0.8, -0.7, -1.0]


def entry_loss(logp: Any, ref: Any, ids: Sequence[int], beta: float) -> tuple[float, torch.Tensor]:
    """Two entries: trajectories 0 over 1, and 2 over 3."""
    rollout = Rollout.from_arrays(
        list(ids), [0, 0, 1, 1], step={"logp/ref": f64(ref)}, trajectories={"label": f64([1, 0, 1, 0])}
    )
    return value_and_gradient(reward_augmented_dpo | {"objective": DPO(beta=beta)}, now(logp), rollout)


def test_worked_loss() -> None:
    loss, gradient = entry_loss(LOGP, REF, [0, 0, 1, 2, 2, 3, 3], 0.5)
    close(loss, 0.6364074462409067, digits=12)
    close(gradient, [-0.12812435] * 2 + [0.12812435] + [-0.10638937] * 2 + [0.10638937] * 2, digits=8)


@pytest.mark.parametrize("margin", [-3.0, -0.4, 0.0, 0.1, 2.5])
def test_a_goal_blind_model_learns_nothing(margin: float) -> None:
    """Its margin in one entry is the opposite of that in the other."""
    beta, ref = 0.5, [-1.0] * 4
    s = margin / beta
    # Steps: y_w | r_w, y_l | r_w, y_l | r_l, y_w | r_l.
    loss, gradient = entry_loss([-1 + s, -1, -1, -1 + s], ref, [0, 1, 2, 3], beta)
    softplus = [math.log1p(math.exp(sign * margin)) for sign in (-1, 1)]
    same(2 * loss, sum(softplus))
    assert 2 * loss >= 2 * math.log(2) - 1e-15
    # The gradient in the shared log-probs of y_w and y_l.
    shared = gradient[[0, 1]] + gradient[[3, 2]]
    expected = beta * (1 / (1 + math.exp(-margin)) - 0.5)
    same(shared, [expected, -expected], atol=1e-15)
    if margin == 0:
        assert shared.tolist() == [0.0, 0.0]


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_held_out_prompts_ask_for_the_top() -> None:
    asked: list[Any] = []

    class Listening:
        def sample(self, requests: Any, *_: Any, **__: Any) -> Any:
            asked.extend(requests)
            raise InterruptedError

    draw = Goals(top=10).held_out()
    with pytest.raises(InterruptedError):
        draw(Listening(), [Request(Example("0", "Q"), 3)], limit=4, seed=0)  # type: ignore[arg-type]
    assert [(request.prompt, request.count) for request in asked] == [("10 Q", 3)]


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(UsageError, match="polopt pairs"):
        composed(reward_augmented_dpo, {}, pairs="on-policy")
    for form in ("singles", "demonstrations"):
        with pytest.raises(UsageError, match=form):
            override(reward_augmented_dpo, {"rollout.form": form})


def test_what_it_declares() -> None:
    assert reward_augmented_dpo.offline and reward_augmented_dpo.unit == "group"
    assert reward_augmented_dpo.objective.beta == 0.01
    assert reward_augmented_dpo.models == dpo.models
