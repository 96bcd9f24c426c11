from __future__ import annotations

import pickle

import pytest

from polopt.compare.plan import (
    EXACT_LR,
    TUNING_SEED,
    Plan,
    World,
    make_worlds,
    parse_budget,
    parse_contender,
    parse_problem,
)
from polopt.core.errors import UsageError
from tests.compare.worlds import exact_job


def plan(*contenders: str, **options: object) -> Plan:
    worlds = make_worlds((), ("sparse-rewards",), None)
    return Plan(tuple(map(parse_contender, contenders)), worlds, "rollouts", 640, **options)  # type: ignore[arg-type]


def test_a_contender_is_a_method() -> None:
    made = parse_contender("grpo")
    assert (made.label, made.slug, made.slots) == ("grpo", "grpo", {})


@pytest.mark.parametrize(
    "text",
    [
        "grpo --advantage leave-one-out --objective.high 0.3",
        "grpo --advantage=leave-one-out --objective.high=0.3",
        "grpo+advantage=leave-one-out+objective.high=0.3",
        "grpo --slots.advantage leave-one-out --objective.high 0.3",
    ],
)
def test_every_way_of_writing_replaced_slots_is_the_same_contender(text: str) -> None:
    made = parse_contender(text)
    assert made.label == "grpo+advantage=leave-one-out+objective.high=0.3"
    assert made.method().advantage.name == "leave-one-out"
    assert made.method().objective.high == 0.3


@pytest.mark.parametrize("text", ["dpo+pairs=on-policy", "dpo --pairs on-policy"])
def test_a_contender_may_sample_what_it_would_read(text: str) -> None:
    made = parse_contender(text)
    assert (made.label, made.pairs, dict(made.slots)) == ("dpo+pairs=on-policy", "on-policy", {})
    assert not made.method().offline and parse_contender("dpo").method().offline
    job = plan("dpo", text).job(made, World("arithmetic", task="arithmetic"), 0, None)
    assert job.method.slots() == made.method().slots() and job.config.pairs == "on-policy"
    # For all contenders that learn from a data set, unless they say otherwise.
    assert parse_contender("dpo", pairs="on-policy").pairs == "on-policy"
    assert parse_contender("dpo+pairs=data", pairs="on-policy").pairs == "data"
    assert parse_contender("grpo", pairs="on-policy").pairs == "data"


def test_shared_settings_hold_where_a_contender_has_none_of_its_own() -> None:
    shared = {"advantage": "leave-one-out", "advantage.normalize": "true", "rollout.temperature": "0.7"}
    assert parse_contender("grpo", shared).method().rollout.temperature == 0.7
    made = parse_contender("grpo --advantage group-zscore", shared)
    assert made.method().advantage.name == "group-zscore" and "advantage.normalize" not in made.slots


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpro", "unknown method 'gpro'; did you mean"),
        ("grpo --advantage", "--advantage needs a value"),
        ("grpo --advantage nonsense", "unknown advantage 'nonsense'"),
        ("grpo --advantages x", "unknown slot 'advantages'"),
        ("grpo+leave-one-out", "without a value"),
        ("grpo+objective.highest=1", "has no field 'highest'"),
        ("grpo --objective.high 0.3 stray", "expected --SLOT VALUE after the method, got 'stray'"),
        ("grpo --advantage 'x", "cannot be read"),
        ("+advantage=x", "names no method"),
        ("grpo+pairs=on-policy", "samples its own answers"),
        (
            "safe --regularizer none",
            "controller moves regularizer.threshold, regularizer.average, which the method",
        ),
    ],
)
def test_a_wrong_contender_is_said(text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_contender(text)
    assert said in str(error.value)


def test_a_value_may_have_a_plus_sign() -> None:
    assert parse_contender("grpo+objective.high=1e+3").method().objective.high == 1000.0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("rollouts=20000", ("rollouts", 20000.0)),
        ("tokens=1e6", ("tokens", 1e6)),
        ("steps=20_000", ("steps", 20000.0)),
        ("seconds=1.5", ("seconds", 1.5)),
    ],
)
def test_budgets(text: str, found: tuple[str, float]) -> None:
    assert parse_budget(text) == found


@pytest.mark.parametrize("text", ["20000", "rollouts", "rollouts=", "hours=1", "steps=0", "steps=-1", "tokens=inf"])
def test_a_wrong_budget_is_said(text: str) -> None:
    with pytest.raises(UsageError, match="cannot read the budget"):
        parse_budget(text)


def test_a_fraction_of_a_rollout_is_no_budget() -> None:
    with pytest.raises(UsageError, match="not a whole number"):
        parse_budget("rollouts=1.5")


def test_problems_have_options() -> None:
    world = parse_problem("binary-verifier:pass_rate=0.1,problems=3")
    assert world.exact and world.options == {"pass_rate": 0.1} and world.problems == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("binary", "unknown problem 'binary'"),
        ("binary-verifier:rate=0.1", "'rate=0.1' is no OPTION=VALUE; its options are pass_rate"),
        ("binary-verifier:pass_rate=high", "expects float, got 'high'"),
        ("binary-verifier:pass_rate=2", "strictly between 0 and 1"),
    ],
)
def test_a_wrong_problem_is_said(text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_problem(text)
    assert said in str(error.value)


def test_worlds_are_of_one_kind() -> None:
    assert [w.label for w in make_worlds((), (), None)] == ["arithmetic"]
    assert [w.task for w in make_worlds(("grid", "countdown"), (), None)] == ["grid", "countdown"]
    named = make_worlds((), (), None, [parse_contender("grpo"), parse_contender("gdpo-multireward")])
    assert [w.task for w in named] == ["worksheet"]
    asked = make_worlds(("grid",), (), None, [parse_contender("gdpo-multireward")])
    assert [w.task for w in asked] == ["grid"]
    with pytest.raises(UsageError, match="one kind per comparison"):
        make_worlds(("grid",), ("sparse-rewards",), None)
    with pytest.raises(UsageError, match="unknown task 'chess'"):
        make_worlds(("chess",), (), None)


def test_every_contender_gets_the_same_seeds_and_settings() -> None:
    jobs = plan("grpo", "dapo", seeds=3, first_seed=5).jobs({})
    for members in jobs.values():
        assert [job.config.seed for job in members] == [5, 6, 7]
        assert {(job.config.lr, job.config.rollouts, job.config.group) for job in members} == {(EXACT_LR, 640, 8)}
    first, second = (dict(jobs[label, "sparse-rewards"][0].settings) for label in ("grpo", "dapo"))
    assert first.pop("method") == "grpo" and second.pop("method") == "dapo" and first == second


def test_every_contender_tries_as_many_rates_on_seeds_of_their_own() -> None:
    made = plan("grpo", "dapo", tune=(0.1, 0.2), tune_seeds=3)
    trials = made.trials()
    assert {label for label, _ in trials} == {"grpo", "dapo"}
    for rates in trials.values():
        assert {rate: len(jobs) for rate, jobs in rates.items()} == {0.1: 3, 0.2: 3}
        for rate, jobs in rates.items():
            assert all(job.config.lr == rate and job.config.seed >= TUNING_SEED and job.tuning for job in jobs)
    chosen = made.jobs({("dapo", "sparse-rewards"): 0.2, ("grpo", "sparse-rewards"): 0.1})
    assert chosen["dapo", "sparse-rewards"][0].config.lr == 0.2
    assert chosen["grpo", "sparse-rewards"][0].config.lr == 0.1


@pytest.mark.parametrize(
    ("contenders", "options", "said"),
    [
        ((), {}, "name the methods to compare"),
        (("grpo", "grpo"), {}, "'grpo' is named twice"),
        (("grpo",), {"seeds": 0}, "--seeds must be at least 1, got 0"),
        (("grpo",), {"points": 0}, "--points must be at least 1, got 0"),
        (("grpo",), {"first_seed": -1}, "seeds lie between"),
        (("grpo",), {"lr": 0.1, "tune": (0.1, 0.2)}, "exclude each other"),
        (("grpo",), {"tune": (0.1, -0.2)}, "a learning rate must be above 0, got -0.2"),
    ],
)
def test_a_plan_that_cannot_be_run_is_said(contenders: tuple[str, ...], options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as error:
        plan(*contenders, **options)
    assert said in str(error.value)


def test_a_job_is_sent_without_the_parts_that_it_names() -> None:
    job = exact_job("grpo")
    assert job.method.slug == "grpo" and "method" in vars(job)
    sent = pickle.loads(pickle.dumps(job))
    assert sent == job and "method" not in vars(sent)
    assert sent.method == job.method
