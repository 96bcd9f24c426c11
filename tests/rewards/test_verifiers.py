"""Verifiers, against GSM8K's own answers, Python's fractions and literal cases."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.rewards import NamedReward, RewardError, Transcript, parse_reward, score

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"


def judge(spec: str, said: str, gold: str | None) -> float | None:
    (value,) = parse_reward(spec).function(completions=[said], answer=[gold])
    return value  # type: ignore[no-any-return]


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the GSM8K files are not beside the repository")
@pytest.mark.parametrize("form", ["{}", "#### {}", "I think so.\n#### {}", r"The answer is \boxed{{{}}}.", "It is {}."])
def test_math_verify_on_gsm8k(form: str) -> None:
    rows = [json.loads(line) for line in (GSM8K / "test.jsonl").read_text(encoding="utf-8").splitlines()[:50]]
    golds = [row["answer"].rpartition("####")[2].strip() for row in rows]
    for raw in (False, True):
        answers = [row["answer"] for row in rows] if raw else golds
        right = [form.format(gold) for gold in golds]
        wrong = [form.format(int(gold.replace(",", "")) + 1) for gold in golds]
        reward = parse_reward("math-verify").function
        assert reward(completions=right, answer=answers) == [1.0] * 50
        assert reward(completions=wrong, answer=answers) == [0.0] * 50


@pytest.mark.parametrize(
    ("said", "gold", "expected"),
    [
        ("72", "72", 1.0),
        ("#### 1,234", "1234", 1.0),
        ("#### 1234", "1,234", 1.0),
        ("12 + 60 = 72\n#### 72", "72", 1.0),
        ("12 + 60 = 72\n#### 73", "72", 0.0),
        ("#### 72\n\nQuestion: 5 apples and 6 pears?", "72", 1.0),
        ("#### Step 1\nadd\n#### Step 2\nso \\boxed{72}", "72", 1.0),
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{1 + x^2}", "x^2 + 1", 1.0),
        (r"\boxed{1}", "x^2 + 1", 0.0),
        (r"\boxed{(1, 2)}", "(1, 2)", 1.0),
        (r"\boxed{(2, 1)}", "(1, 2)", 0.0),
        (r"\boxed{1} or \boxed{2}", "2", 0.0),
        ("-5", "5", 0.0),
        ("I do not know.", "72", 0.0),
        ("", "72", 0.0),
        ("72", None, None),
        ("72", "", None),
    ],
)
def test_math_verify_cases(said: str, gold: str | None, expected: float | None) -> None:
    assert judge("math-verify", said, gold) == expected


@settings(max_examples=60, deadline=None)
@given(st.fractions(min_value=-50, max_value=50, max_denominator=9), st.fractions(-50, 50, max_denominator=9))
def test_math_verify_agrees_with_fractions(a: Fraction, b: Fraction) -> None:
    said = rf"So \boxed{{{'-' if a < 0 else ''}\frac{{{abs(a.numerator)}}}{{{a.denominator}}}}}"
    assert judge("math-verify", said, f"{b.numerator}/{b.denominator}") == float(a == b)


def test_math_verify_reads_chats() -> None:
    example = Example(id="a", prompt=({"role": "user", "content": "6*12?"},), answer="72")
    scores = score([Transcript(example, example.prompt, "#### 72", (1,))], [parse_reward("math-verify")])
    assert scores.total.tolist() == [1.0]


def test_math_verify_that_takes_too_long_is_undecided_and_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    import math_verify

    def verify(expected: Any, found: Any, **options: Any) -> bool:
        while found[0] == 2:
            with contextlib.suppress(Exception):
                time.sleep(60)
        return bool(expected[0] == found[0])

    monkeypatch.setattr(math_verify, "verify", verify)
    batch = [Transcript(Example(id=f"q/{n}", prompt="?", answer="1"), "?", f"{n}", (n,)) for n in range(1, 4)]
    rewards = [parse_reward("math-verify:0.1")]
    scores = score(batch, rewards, timeout=5.0)
    # Undecided by the model's doing: not wrong, and no fault that ends the run.
    assert scores.total.nan_to_num(-1.0).tolist() == [1.0, -1.0, 0.0]
    assert scores.invalid == ()


@pytest.mark.parametrize("said", [r"\boxed{9^{9^{9^9}}}", "9**9**9**9", r"\boxed{100000!!}", "1" * 5000, "{" * 3000])
def test_math_verify_does_not_hang_on_strange_completions(said: str) -> None:
    batch = [Transcript(Example(id="q/0", prompt="?", answer="72"), "?", said, (0,))]
    started = time.monotonic()
    scores = score(batch, [parse_reward("math-verify:1")], on_error="skip")
    assert time.monotonic() - started < 5
    assert scores.total.isnan().item() or scores.total.item() == 0.0
    assert scores.invalid == ()


def test_math_verify_on_another_thread_without_warnings(caplog: pytest.LogCaptureFixture) -> None:
    import math_verify.grader
    import math_verify.parser

    math_verify.parser.TIMEOUT_WARNING_SHOWN = math_verify.grader.TIMEOUT_WARNING_SHOWN = False
    values: list[float | None] = []
    with caplog.at_level(logging.WARNING):
        worker = threading.Thread(target=lambda: values.append(judge("math-verify", "#### 72", "72")))
        worker.start()
        worker.join(10)
    assert values == [1.0]
    assert not caplog.records


@pytest.mark.parametrize(
    ("spec", "said", "gold", "expected"),
    [
        ("exact-match", " a \n b ", "a b", 1.0),
        ("exact-match", "ab", "a b", 0.0),
        ("exact-match", "A b", "a b", 0.0),
        ("exact-match", "#### 72", "72", 0.0),
        ("exact-match", "72", None, None),
        ("exact-match:####", "#### 1 then\n#### 72\n", "72", 1.0),
        ("exact-match:####", "72", "72", 0.0),
        ("exact-match:####", "72", None, None),
        (r"regex:^\d+$", "72", None, 1.0),
        (r"regex:^\d+$", "72 apples", None, 0.0),
        (r"regex:\w+@\w+", "mail me@home now", None, 1.0),
        ("regex:a:b", "xa:bx", None, 1.0),
    ],
)
def test_matching(spec: str, said: str, gold: str | None, expected: float | None) -> None:
    assert judge(spec, said, gold) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("regex", "needs a pattern: regex:PATTERN"),
        ("regex:(", r"'\(' is not a regular expression"),
        ("math-verify:fast", "'fast' in math-verify:SECONDS must be a positive number"),
        ("math-verify:0", "'0' in math-verify:SECONDS must be a positive number"),
    ],
)
def test_bad_arguments(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_reward(spec)


def test_verifiers_need_answers() -> None:
    batch = [Transcript(Example(id="q/0", prompt="?"), "?", "72", (0,))]
    with pytest.raises(RewardError, match="reward 'exact-match' takes 'answer'"):
        score(batch, [NamedReward("exact-match", parse_reward("exact-match").function)])
