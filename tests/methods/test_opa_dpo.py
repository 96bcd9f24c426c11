"""The card of OPA-DPO: worked example, identities, the three answers and their weights, the two stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from polopt.claims.exact import start
from polopt.controllers import Stages
from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.policy import Corruption, Request
from polopt.core.rollout import Rollout
from polopt.methods.preference.opa_dpo import ThreePartDPO, opa_dpo
from polopt.policies.causal_lm.policy import CausalLM
from polopt.policies.exact import SequenceSpace
from polopt.policies.exact.payload import SequencePayload
from polopt.policies.exact.policy import example_of
from polopt.rollouts.revisions import Revisions, three_answers
from polopt.tasks.problems import Problem, problem
from tests.methods.pairs import softplus
from tests.policies.causal_lm.models import byte_tokenizer, tiny
from tests.support import close, f64, now, same, value_and_gradient

# Reference, generated, revised, and the first and the last under the corrupted prompt.
POLICY = [[-0.5, -1, -0.2], [-0.8, -1.4], [-0.6, -1.2, -0.4], [-0.9, -1.3, -0.3], [-0.7, -1.9, -0.6]]
REFERENCE = [[-0.7, -0.9, -0.4], [-0.6, -1.2], [-0.9, -1, -0.5], [-0.8, -1.1, -0.5], [-0.9, -1.5, -0.5]]
SEVERITY = [[1, 1, 1], [1, 2], [1, 2, 2], [1, 1, 1], [1, 1, 1]]
RELEVANCE = [[1, 1, 1], [1, 1], [1, 3, 3], [1, 1, 1], [1, 3, 3]]
Answers = Sequence[Sequence[float]]


def flat(values: Answers) -> list[float]:
    return [value for row in values for value in row]


def group(
    reference: Answers = REFERENCE,
    severity: Answers = SEVERITY,
    relevance: Answers = RELEVANCE,
    roles: Sequence[int] = range(5),
    groups: Sequence[int] | None = None,
) -> Rollout:
    label = {0: 1.0, 1: 0.0, 2: 1.0}
    step = {"logp/ref": reference, "severity": severity, "relevance": relevance}
    ids = [i for i, row in enumerate(reference) for _ in row]
    rollout = Rollout.from_arrays(
        ids,
        list(groups or [0] * len(roles)),
        step={name: f64(flat(values)) for name, values in step.items()},
        trajectories={"role": torch.tensor(list(roles)), "label": f64([label.get(r, math.nan) for r in roles])},
    )
    chosen = torch.isin(rollout["role"], torch.tensor([0, 2]))
    return rollout.with_columns(step={"mask": torch.ones(len(ids)).bool(), "mask/chosen": rollout.spread(chosen)})


def ours(logp: Answers = POLICY, rollout: Rollout | None = None, **fields: Any) -> tuple[float, Tensor]:
    return value_and_gradient(using(**fields), now(flat(logp)), group() if rollout is None else rollout)


def using(**fields: Any) -> Method:
    return opa_dpo | {"objective": ThreePartDPO(**fields)}


def by_hand(
    logp: Answers,
    reference: Answers,
    severity: Answers,
    relevance: Answers,
    beta: float = 0.1,
    image: float = 0.2,
    anchor: float = 1.0,
    delta: float = 0.0,
) -> float:
    """One complete group, answer by answer."""
    rho = [np.array(p, dtype=float) - np.array(q, dtype=float) for p, q in zip(logp, reference, strict=True)]
    w, u = [np.array(row) for row in severity], [np.array(row) for row in relevance]
    plain = [beta * r.sum() for r in rho]
    severe = [beta * (c * r).sum() for c, r in zip(w, rho, strict=True)]
    relevant = [beta * (c * r).sum() for c, r in zip(u, rho, strict=True)]
    language = softplus(plain[1] - plain[0]) + softplus(severe[1] - severe[2])
    seeing = softplus(plain[3] - plain[0]) + softplus(relevant[4] - relevant[2])
    held = 2 * (softplus(delta - plain[0]) + softplus(delta - plain[2]))
    return language + image * seeing + anchor * held


def random_group(seed: int) -> tuple[Answers, Answers, Answers, Answers]:
    rng = np.random.default_rng(seed)
    drawn = rng.integers(1, 5, 3).tolist()
    sizes = [*drawn, drawn[0], drawn[2]]

    def values(low: float, high: float) -> Answers:
        return [rng.uniform(low, high, size).tolist() for size in sizes]

    return values(-2, -0.1), values(-2, -0.1), values(1, 2.5), values(1, 3)


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_worked_example() -> None:
    language, _ = ours(image=0.0, anchor=0.0)
    close(language, 1.3175191111, digits=10)
    seeing = ours(anchor=0.0, image=1.0)[0] - language
    close(seeing, 1.3036053619, digits=10)
    close(ours(image=0.0)[0] - language, 2.7229137121, digits=10)
    loss, gradient = ours()
    close(loss, 4.3011538956, digits=10)
    expected = [-0.15655085] * 3 + [0.09650143, 0.14475214] + [-0.15660166, -0.2235542, -0.2235542]
    close(gradient[:8], expected, digits=8)
    _, metrics = using().loss(now(flat(POLICY)), group())
    close([metrics[name] for name in ("language", "image", "anchor")], [1.3175191111, 1.3036053619, 2.7229137121], 10)


def test_the_released_code() -> None:
    close(ours(level="position")[0], 4.4042777592, digits=10)


@pytest.mark.parametrize("level", ["sequence", "position"])
def test_at_the_reference(level: str) -> None:
    same(ours(REFERENCE, level=level)[0], 6.4 * math.log(2))


@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradient(seed: int) -> None:
    logp, reference, severity, relevance = random_group(seed)
    fields = {"beta": 0.3, "image": 0.7, "anchor": 0.4, "delta": 0.2}
    loss, gradient = ours(logp, group(reference, severity, relevance), **fields)
    same(loss, by_hand(logp, reference, severity, relevance, **fields))
    at, sizes = np.array(flat(logp)), [len(row) for row in logp]

    def shaped(values: NDArray[np.float64]) -> Answers:
        return [row.tolist() for row in np.split(values, np.cumsum(sizes)[:-1])]

    for k in range(len(at)):
        step = 1e-6 * np.eye(len(at))[k]
        ends = [by_hand(shaped(at + way * step), reference, severity, relevance, **fields) for way in (1, -1)]
        assert float(gradient[k]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-8)


def test_position_by_slots() -> None:
    """Slot against slot of zero-padded rows, the anchor of the revision with the other sign."""
    logp, reference, severity, relevance = random_group(5)
    width = max(len(row) for row in logp)

    def padded(values: Answers) -> NDArray[np.float64]:
        return np.array([[*row, *[0.0] * (width - len(row))] for row in values])

    rho = 0.1 * (padded(logp) - padded(reference))
    w, u = padded(severity) * rho, padded(relevance) * rho
    total = 0.0
    for t in range(width):
        total += softplus(rho[1, t] - rho[0, t]) + softplus(w[1, t] - w[2, t])
        total += 0.2 * (softplus(rho[3, t] - rho[0, t]) + softplus(u[4, t] - u[2, t]))
        total += 2 * (softplus(-rho[0, t]) + softplus(rho[2, t]))
    same(ours(logp, group(reference, severity, relevance), level="position")[0], total / width)


def test_without_weights_it_is_two_dpo_losses() -> None:
    ones = [[1.0] * len(row) for row in POLICY]
    loss, _ = ours(rollout=group(severity=ones, relevance=ones), image=0.0, anchor=0.0)
    s = [sum(p) - sum(q) for p, q in zip(POLICY, REFERENCE, strict=True)]
    same(loss, softplus(-0.1 * (s[0] - s[1])) + softplus(-0.1 * (s[2] - s[1])))


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_scaled_severity_is_a_scaled_beta(factor: float) -> None:
    scaled = [[factor * w for w in row] for row in SEVERITY]
    loss, _ = ours(rollout=group(severity=scaled), image=0.0, anchor=0.0)
    s = [sum(p) - sum(q) for p, q in zip(POLICY, REFERENCE, strict=True)]
    severe = [
        sum(w * (p - q) for w, p, q in zip(*rows, strict=True))
        for rows in zip(SEVERITY, POLICY, REFERENCE, strict=True)
    ]
    same(loss, softplus(-0.1 * (s[0] - s[1])) + softplus(-0.1 * factor * (severe[2] - severe[1])))


def test_levels_coincide_on_answers_of_one_token() -> None:
    logp, reference = [[row[0]] for row in POLICY], [[row[0]] for row in REFERENCE]
    rollout = group(reference, [[1.0]] * 5, [[1.0]] * 5)
    for found, expected in zip(
        ours(logp, rollout, anchor=0.0, level="position"), ours(logp, rollout, anchor=0.0), strict=True
    ):
        same(found, expected)


def test_groups_count_alike_and_incomplete_ones_give_what_they_have() -> None:
    logp, reference, severity, relevance = random_group(1)
    other = random_group(2)
    both = [[*one, *two] for one, two in zip((logp, reference, severity, relevance), other, strict=True)]
    rollout = group(both[1], both[2], both[3], roles=[*range(5)] * 2, groups=[0] * 5 + [1] * 5)
    mean = (by_hand(logp, reference, severity, relevance) + by_hand(*other)) / 2
    same(ours(both[0], rollout)[0], mean)
    lonely = group(REFERENCE[:2], SEVERITY[:2], RELEVANCE[:2], roles=[0, 1])
    s = [sum(p) - sum(q) for p, q in zip(POLICY[:2], REFERENCE[:2], strict=True)]
    same(ours(POLICY[:2], lonely)[0], softplus(-0.1 * (s[0] - s[1])) + 2 * softplus(-0.1 * s[0]))


def test_masked_steps_are_no_part_of_an_answer() -> None:
    keep = torch.tensor([True] * 7 + [False] + [True] * 6)
    masked = group().with_columns(step={"mask": keep})
    shorter = [[row[:2] if i == 2 else row for i, row in enumerate(rows)] for rows in (POLICY, REFERENCE)]
    weights = [[row[:2] if i == 2 else row for i, row in enumerate(rows)] for rows in (SEVERITY, RELEVANCE)]
    expected, slope = ours(shorter[0], group(shorter[1], weights[0], weights[1]))
    found, gradient = ours(rollout=masked)
    same(found, expected)
    same(gradient[keep], slope)
    assert gradient[7] == 0


def test_only_levels_say_how_far_the_loss_reaches() -> None:
    assert using().unit == "group" and using(level="position").unit == "batch"
    with pytest.raises(UsageError, match="beta must be above 0"):
        ThreePartDPO(beta=0.0)


# --- three answers ----------------------------------------------------------------------------------------------------

SPACE = SequenceSpace(4, 3, end=True)


def three(number: int = 0, **columns: Any) -> Example:
    plain = example_of(number)
    columns = {**plain.columns, "revised": "0 1 2", **columns}
    return Example(f"{number}", plain.prompt, chosen="0 0 0", rejected="2 1", columns=columns)


def made(batch: int = 3) -> Problem:
    return problem("random-rewards", space=SPACE, batch=batch)


def written(examples: Sequence[Example], policy: Any = None, **options: Any) -> Rollout:
    policy = made().policy() if policy is None else policy
    return Revisions(**options)(policy, [Request(example, 1) for example in examples], limit=3, seed=0)


def by_answer(rollout: Rollout, values: Tensor) -> Sequence[Tensor]:
    return torch.split(values, rollout.lengths.tolist())


def test_a_group_of_five() -> None:
    rollout = written([three(0), three(1)])
    assert rollout["role"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4]
    assert rollout.group.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]
    texts = rollout.payload.completions  # type: ignore[union-attr]
    assert texts[:3] == ("0 0 0", "2 1 3", "0 1 2") and texts[6:8] == ("0 0 0", "0 1 2")
    assert rollout["label"][:6].tolist() == [1, 0, 1, 1, 0, 1] and rollout["label"][6:].isnan().all()
    chosen = rollout["mask/chosen"]
    assert (chosen == rollout.spread(torch.isin(rollout["role"], torch.tensor([0, 2])))).all()
    assert (rollout["severity"] == 1).all() and (rollout["relevance"] == 1).all()


def test_sentences_weigh_as_the_report_says() -> None:
    report = [
        {"generated": "2", "revised": "0", "score": 2, "error": "observation"},
        {"generated": "1", "revised": "1", "score": 4, "error": "correct"},
        {"revised": "2", "score": 1},
    ]
    rollout = written([three(report=report)])
    split = by_answer(rollout, rollout["severity"])
    # The end of an answer belongs to its last sentence; what the expert added weighs 1.
    assert [row.tolist() for row in split] == [[1, 1, 1], [2, 1, 1], [2, 1, 1], [1, 1, 1], [2, 1, 1]]
    split = by_answer(rollout, rollout["relevance"])
    assert [row.tolist() for row in split] == [[1, 1, 1], [1, 1, 1], [3, 1, 1], [1, 1, 1], [3, 1, 1]]
    rollout = written([three(report=[{"generated": "2 1", "score": 1}])])
    assert by_answer(rollout, rollout["severity"])[1].tolist() == [2.5] * 3
    with pytest.raises(UsageError, match="a sentence that its answer"):
        written([three(report=[{"generated": "1 1", "score": 1}])])


def test_a_language_model_sees_blanks_and_weighs_sentences() -> None:
    policy = CausalLM(tiny(seed=0), byte_tokenizer())
    report = [
        {"generated": "Red. ", "revised": "Blue. ", "score": 1, "error": "observation"},
        {"generated": "Big.", "revised": "Big.", "score": 3, "error": "language"},
    ]
    columns = {"revised": "Blue. Big.", "report": report, "observation": "a blue box"}
    example = Example("0", "See a blue box: colour?", chosen="It is blue.", rejected="Red. Big.", columns=columns)
    rollout = written([example], policy, probability=1.0)
    ids = [list(prompt) for prompt in rollout.payload.prompts]  # type: ignore[union-attr]
    prompts = [policy.tokenizer.decode(ids[at]) for at in rollout.payload.prompt_of.tolist()]  # type: ignore[union-attr]
    assert prompts[:3] == ["See a blue box: colour?"] * 3
    assert prompts[3:] == ["See " + " " * len("a blue box") + ": colour?"] * 2
    generated, revised = (by_answer(rollout, rollout["severity"])[k].tolist() for k in (1, 2))
    assert generated == [2.5] * 5 + [1.5] * 5 and revised == [2.5] * 6 + [1.5] * 5
    assert by_answer(rollout, rollout["relevance"])[4].tolist() == [3.0] * 6 + [1.0] * 5
    # Blanks reach the policy, with a gradient, and any model.
    policy.add_model("ref")
    found = policy.evaluate(rollout, frozenset({"logp", "logp/ref"}))
    same(found["logp"].detach(), found["logp/ref"], rtol=1e-5, atol=1e-5)
    logp = by_answer(rollout, found["logp"].detach())
    assert float((logp[0] - logp[3]).abs().max()) > 1e-3
    assert found["logp"].requires_grad


def test_a_list_brings_the_answer_that_is_most_like_the_worst() -> None:
    texts = ("1+1=2;#2", "#9", "1+1=3;#9", "#2", "1+1=2;#3")
    example = Example("0", "?", completions=texts, labels=(1.0, 0.2, 0.0, 1.0, 0.9))
    assert three_answers(example) == (("1+1=2;#2", 1.0), ("1+1=3;#9", 0.0), ("1+1=2;#3", 1.0))
    two = replace(example, completions=texts[:2], labels=(1.0, 0.0))
    assert [text for text, _ in three_answers(two)] == [texts[0], texts[1], texts[0]]


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (Example("7", "?", chosen="0", rejected="1"), "'7' brings no revised answer"),
        (Example("7", "?", completions=("0", "1"), labels=(1.0, 1.0)), "prefers none"),
        (Example("7", "?"), "'7' brings no revised answer"),
    ],
)
def test_examples_without_three_answers(example: Example, said: str) -> None:
    for part in (Revisions(), Revisions(unusable="drop")):
        with pytest.raises(UsageError, match=said):
            part.check([example])
    part = Revisions(unusable="drop")
    part.check([example, three()])
    rollout = part(made().policy(), [Request(example, 1), Request(three(), 1)], limit=3, seed=0)
    assert rollout["role"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UsageError, match="'revised'"):
        part.on_policy()


# --- corrupted prompts ------------------------------------------------------------------------------------------------


def test_a_prompt_that_is_not_corrupted_teaches_nothing_of_the_image() -> None:
    policy = made().policy()
    with torch.no_grad():
        policy.logits.add_(0.3)[:, 0, 0].add_(1.0)
    rollout = written([three(0), three(1)], policy, probability=0.0)
    rollout = rollout.with_columns(step=dict(policy.evaluate(rollout, frozenset({"logp/ref"})).columns))
    gradients = []
    for image in (0.0, 5.0):
        loss, metrics = using(image=image).loss(policy.evaluate(rollout, frozenset({"logp"})), rollout)
        gradients.append(torch.autograd.grad(loss, policy.logits)[0])
        same(metrics["image"], 2 * math.log(2))
    same(gradients[0], gradients[1], atol=1e-12)
    assert float(gradients[0].abs().max()) > 0


def test_the_exact_policy_asks_another_problem() -> None:
    policy, size = made(20).policy(), SPACE.n_sequences
    own, sequence = torch.arange(20).repeat_interleave(size), torch.arange(size).repeat(20)
    rollout = policy.rollout(own, sequence, own)

    def asked(probability: float, seed: int = 0) -> Tensor:
        payload = policy.corrupted(rollout, Corruption(probability, seed=seed)).payload
        assert isinstance(payload, SequencePayload)
        return payload.problem

    assert torch.equal(asked(0.0), own) and torch.equal(asked(1.0), asked(1.0))
    assert not torch.equal(asked(1.0), asked(1.0, seed=1))
    # Its own problem is drawn too; standard errors are below 0.02.
    for probability in (0.3, 1.0):
        share = float((asked(probability) != own).double().mean())
        assert share == pytest.approx(probability * 19 / 20, abs=0.06)
    drawn = torch.bincount(asked(1.0), minlength=20) / len(own)
    assert float((drawn - 1 / 20).abs().max()) < 0.035
    # The same sequences, as those problems answer them.
    spoilt = policy.corrupted(rollout, Corruption(1.0))
    found = spoilt.sum_steps(policy.evaluate(spoilt, frozenset({"logp"}))["logp"].detach())
    same(found, policy.log_probabilities().detach()[asked(1.0), sequence])


# --- two stages -------------------------------------------------------------------------------------------------------


def test_the_registered_stages_are_imitation_and_preference() -> None:
    controller = opa_dpo.clone().controller
    first = override(opa_dpo, controller({}))
    logp = now(flat(POLICY))
    nll = -np.mean([*POLICY[0], *POLICY[2]])
    same(first.loss(logp, group())[0].detach(), nll)
    assert controller({"progress": 0.2, "iteration": 2.0}) == controller({})
    then = controller({"progress": 0.34, "iteration": 5.0})
    assert then["models.ref.at"] == 5
    second = override(first, then)
    same(second.loss(logp, group())[0].detach(), 4.3011538956, atol=1e-9)
    assert second.models["ref"].due(5) and not second.models["ref"].due(6)
    assert controller({"progress": 0.9, "iteration": 9.0}) == then


def test_stages_resume_and_may_be_one() -> None:
    running = Stages(first={"a.b": 1.0}, second={"a.b": 0.0}, share=0.25)
    running({"progress": 0.3, "iteration": 3.0})
    resumed = Stages(first={"a.b": 1.0}, second={"a.b": 0.0}, share=0.25)
    resumed.load_state_dict(running.state_dict())
    assert resumed({"progress": 0.9, "iteration": 9.0}) == {"a.b": 0.0, "models.ref.at": 3}
    assert Stages(second={"a.b": 0.0}, share=0.0)({}) == {"a.b": 0.0, "models.ref.at": 0}
    with pytest.raises(UsageError, match="share of the first stage"):
        Stages(share=1.0)


def test_the_reference_is_the_policy_after_imitation() -> None:
    there = made(1)
    run = start(there, opa_dpo, seed=0, examples=[three()], optimizer="sgd", lr=1.0)
    run.trainer.budget = replace(run.trainer.budget, steps=9)
    before = run.policy.table().detach().clone()
    tables = []
    for _ in range(9):
        tables.append(run.policy.table().detach().clone())
        run.step()
        expected = before if len(tables) <= 3 else tables[3]
        assert torch.equal(run.policy.model("ref"), expected)
    assert run.trainer.iteration == 9
