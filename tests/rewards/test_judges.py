"""Judges against loops over pairs; what becomes of their columns; errors that never become a number."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from polopt.claims.exact import scored, start
from polopt.core.errors import UsageError
from polopt.core.override import override
from polopt.core.policy import Request
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_pairs
from polopt.methods import get_method
from polopt.policies.causal_lm.policy import CausalLM
from polopt.rewards.comparisons import LanguageModelJudge, as_text
from polopt.rewards.judges import MatrixJudge, PairwiseJudge, ScoreJudge, beaten_by
from polopt.rollouts.groups import Groups
from polopt.tasks.problems import Problem, problem
from tests.policies.causal_lm.models import byte_tokenizer, tiny
from tests.support import f64, same

GROUP = [1, 0, 1, 2, 0, 1]
SCORES = [0.5, 2.0, -1.0, 0.3, 2.0, 0.5]


def rollout(scores: list[float] = SCORES) -> Rollout:
    return Rollout.from_arrays(
        range(6), GROUP, step={"logp": f64([-1.0] * 6)}, trajectories={"score": f64(scores), "reward": f64(scores)}
    )


def table(judged: Rollout) -> dict[tuple[int, int], float]:
    """P(i beats j) for all pairs of a group, read as the columns say."""
    pairs = [(i, j) for i in range(judged.n_trajectories) for j in range(judged.n_trajectories)]
    pairs = [(i, j) for i, j in pairs if judged.group[i] == judged.group[j]]
    i, j = torch.tensor(pairs).T
    return dict(zip(pairs, beaten_by(judged, i, j).tolist(), strict=True))


def test_pairs_of_a_segment_are_those_of_a_double_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    for size, count in ((0, 3), (1, 1), (9, 4), (40, 6)):
        index = torch.randint(count, (size,), generator=generator)
        mask = torch.rand(size, generator=generator) > 0.3
        for chosen in (None, mask):
            first, second = segment_pairs(index, count, mask=chosen)
            kept = range(size) if chosen is None else [i for i in range(size) if chosen[i]]
            expected = {(i, j) for i in kept for j in kept if i != j and index[i] == index[j]}
            found = list(zip(first.tolist(), second.tolist(), strict=True))
            assert len(found) == len(set(found)) and set(found) == expected
            order = [(int(index[i]), i, j) for i, j in found]
            assert order == sorted(order)


def test_scores_give_bradley_terry_probabilities() -> None:
    judged = ScoreJudge(scale=2.0)(rollout())
    assert judged["beats"].shape == (6, 3)
    for (i, j), chance in table(judged).items():
        expected = 0.5 if i == j else 1 / (1 + math.exp(-2.0 * (SCORES[i] - SCORES[j])))
        assert chance == pytest.approx(expected, rel=1e-12)
    for i in range(6):
        others = [table(judged)[i, j] for j in range(6) if j != i and GROUP[i] == GROUP[j]]
        if others:
            assert float(judged["win"][i]) == pytest.approx(sum(others) / len(others), rel=1e-6)
        else:
            assert math.isnan(float(judged["win"][i]))
    # Groups of two and of one in rows of three.
    assert judged["beats"].isnan().sum(1).tolist() == [0, 1, 0, 2, 1, 0]


def test_hard_scores_tie_at_one_half() -> None:
    chances = table(ScoreJudge(scale=None)(rollout()))
    assert chances[0, 5] == chances[1, 4] == 0.5
    assert (chances[0, 2], chances[2, 0]) == (1.0, 0.0)


def test_an_invalid_score_makes_its_comparisons_invalid_and_no_others() -> None:
    for scale in (1.0, None):
        judged = ScoreJudge(scale=scale)(rollout([0.5, 2.0, math.nan, 0.3, 1.0, 0.1]))
        chances = table(judged)
        for (i, j), chance in chances.items():
            assert math.isnan(chance) == (i != j and 2 in (i, j))
        assert judged["win"].isnan().tolist() == [True, False, True, True, False, True]


def test_columns_follow_their_trajectories() -> None:
    judged = ScoreJudge()(rollout())
    before = table(judged)
    chosen = torch.tensor([5, 2, 4, 1])
    after = table(judged.select(chosen))
    for (i, j), chance in after.items():
        assert chance == before[int(chosen[i]), int(chosen[j])]
    small = ScoreJudge()(rollout().select(torch.tensor([1, 4, 3])))
    assert small["beats"].shape[1] == 2
    both = Rollout.concat([small, judged])
    assert both["beats"].shape == (9, 3) and bool(both["beats"][:3, 2].isnan().all())
    shifted = {(i - 3, j - 3): chance for (i, j), chance in table(both).items() if i >= 3}
    assert shifted == before
    saved = Rollout.from_state(both.state_dict())
    assert table(saved) == table(both)
    pieces = judged.split("group", [1] * 6, 3)
    assert sorted(c for piece in pieces for c in table(piece).values()) == sorted(before.values())
    swapped = judged.replaced(torch.tensor([1]), small.select(torch.tensor([0])))
    assert swapped["beats"].shape == (6, 3)


# --- functions --------------------------------------------------------------------------------------------------------


def world(seed: int = 0, count: int = 4) -> tuple[Problem, Rollout]:
    made = problem("intransitive-preferences", batch=2, seed=seed)
    requests = [Request(example, count - place) for place, example in enumerate(made.examples())]
    return made, scored(made, Groups()(made.policy(), requests, limit=made.space.length, seed=seed))


def test_the_matrix_is_the_problems_game() -> None:
    made, drawn = world()
    judged = MatrixJudge().of_problem(made)(drawn)
    assert made.game is not None
    ids = drawn.payload.completion_ids  # type: ignore[union-attr]
    for (i, j), chance in table(judged).items():
        rows = [made.space.index(ids[k]) for k in (i, j)]
        expected = 0.5 if i == j else float(made.game.preference[int(drawn.group[i]), rows[0], rows[1]])
        assert chance == pytest.approx(expected, abs=1e-12)
    # The game is antisymmetric, so asking both ways changes nothing.
    same(MatrixJudge(swapped=True).of_problem(made)(drawn)["beats"].nan_to_num(9), judged["beats"].nan_to_num(9))


def test_a_method_of_the_exact_world_trains_on_win_rates() -> None:
    made, _ = world()
    method = override(get_method("grpo"), {"reward": "judge-matrix", "reward.replace": "true"})
    run = start(made, method, seed=0, group=4)
    run.step()
    assert 0 <= run.metrics["reward"] <= 1
    # The mean win rate within a group is 1/2 whatever the game.
    assert run.metrics["reward"] == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(UsageError, match="no preferences"):
        start(problem("random-rewards"), method, seed=0, group=4)


def biased(first: list[str], second: list[str], **_: Any) -> list[float]:
    """Prefers the longer answer a little, and the first one much."""
    return [0.6 + 0.01 * (len(a) - len(b)) for a, b in zip(first, second, strict=True)]


def test_swapping_takes_the_bias_for_the_first_place_away() -> None:
    _, drawn = world()
    plain, swapped = PairwiseJudge(judge=biased)(drawn), PairwiseJudge(judge=biased, swapped=True)(drawn)
    texts = drawn.payload.completions  # type: ignore[union-attr]
    for (i, j), chance in table(swapped).items():
        if i != j:
            assert table(plain)[i, j] == pytest.approx(0.6 + 0.01 * (len(texts[i]) - len(texts[j])))
            assert chance == pytest.approx(0.5 + 0.01 * (len(texts[i]) - len(texts[j])))


def test_one_call_asks_for_all_pairs() -> None:
    _, drawn = world()
    calls: list[int] = []

    def counted(first: list[str], second: list[str], prompts: list[str], problem: list[int]) -> list[float]:
        calls.append(len(first))
        assert len(problem) == len(prompts) == len(second) == len(first)
        return [0.5] * len(first)

    PairwiseJudge(judge=counted)(drawn)
    assert calls == [4 * 3 + 3 * 2]


@pytest.mark.parametrize(
    ("answer", "said"),
    [(1.5, "not a probability"), ("raise", "ValueError: no"), ("short", "0 values for 18 comparisons")],
)
def test_a_failing_judge_ends_the_run(answer: Any, said: str) -> None:
    _, drawn = world()

    def judge(first: list[str], **_: Any) -> list[float]:
        if answer == "raise":
            raise ValueError("no")
        return [] if answer == "short" else [answer] * len(first)

    with pytest.raises(UsageError, match=said):
        PairwiseJudge(judge=judge)(drawn)


def test_a_failing_comparison_is_invalid_where_it_may_be(caplog: pytest.LogCaptureFixture) -> None:
    _, drawn = world()
    texts = list(drawn.payload.completions)  # type: ignore[union-attr]
    worst = texts[0]

    def judge(first: list[str], second: list[str], **_: Any) -> list[float | None]:
        if worst in first:
            raise ValueError("cannot read it")
        return [None if worst == other else 0.25 for other in second]

    with caplog.at_level(logging.WARNING):
        judged = PairwiseJudge(judge=judge, on_error="skip", replace=True)(drawn)
    assert "cannot read it" in caplog.text
    for (i, j), chance in table(judged).items():
        assert i == j or math.isnan(chance) == (worst in (texts[i], texts[j]))
    assert torch.equal(judged.reward.isnan(), judged["win"].isnan())
    # What is invalid has no step that trains.
    assert torch.equal(judged.active_lengths == 0, judged["win"].isnan())


def test_a_judge_is_named_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def longer(first, second):\n    return [float(len(a) > len(b)) for a, b in zip(first, second)]\n")
    method = override(get_method("grpo"), {"reward": "judge-pairwise", "reward.judge": f"{file}:longer"})
    _, drawn = world()
    assert set(method.shape_reward(drawn)["beats"].nan_to_num(0).unique().tolist()) <= {0.0, 0.5, 1.0}
    with pytest.raises(UsageError, match=r"--reward\.judge"):
        override(get_method("grpo"), {"reward": "judge-pairwise"}).shape_reward(drawn)
    with pytest.raises(UsageError, match="there is no file"):
        override(get_method("grpo"), {"reward": "judge-pairwise", "reward.judge": f"{tmp_path}/no.py:longer"})


# --- a language model as a judge --------------------------------------------------------------------------------------


def test_a_language_model_answers_by_its_two_verdicts(tmp_path: Path) -> None:
    policy = CausalLM(tiny(), byte_tokenizer())
    judge = LanguageModelJudge(policy, "{prompt}?{first}|{second}=", ("A", "B"))
    prompts, first, second = ["1+1", "{first}", "x"], ["2", "{second}", "yes"], ["3", "b", "{prompt} no"]
    found = judge(prompts, first, second)
    for p, a, b, chance in zip(prompts, first, second, found, strict=True):
        ids = policy.tokenizer(f"{p}?{a}|{b}=")["input_ids"]
        with torch.no_grad():
            logits = policy.model(torch.tensor([ids])).logits[0, -1]
        verdicts = torch.tensor([policy.tokenizer(v, add_special_tokens=False)["input_ids"][0] for v in "AB"])
        assert chance == pytest.approx(float(logits[verdicts].softmax(0)[0]), rel=1e-4)
    policy.save(tmp_path / "judge")
    part = PairwiseJudge(judge=f"lm:{tmp_path / 'judge'}", template=judge.template, verdicts=("A", "B"))
    _, drawn = world()
    beats = part(drawn)["beats"]
    assert bool(((beats > 0) & (beats < 1))[~beats.isnan()].all())


def test_a_judge_that_cannot_be_asked_says_why() -> None:
    policy = CausalLM(tiny(), byte_tokenizer())
    with pytest.raises(UsageError, match=r"\{second\}"):
        LanguageModelJudge(policy, "{prompt}{first}", ("A", "B"))
    with pytest.raises(UsageError, match="one token"):
        LanguageModelJudge(policy, verdicts=("first", "B"))
    with pytest.raises(UsageError, match="two verdicts"):
        PairwiseJudge(verdicts=("A",))


def test_a_chat_is_shown_with_its_roles() -> None:
    assert as_text([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) == "user: a\nassistant: b"
