"""Format and length, against literal cases and the stated equation in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polopt.core.errors import UsageError
from polopt.rewards import parse_reward


@pytest.mark.parametrize(
    ("spec", "said", "expected"),
    [
        ("format", "<think>a</think><answer>b</answer>", 1.0),
        ("format", "\n<think>a\nb</think>\n\n<answer></answer>\n", 1.0),
        ("format", "<answer>b</answer><think>a</think>", 0.0),
        ("format", "<think>a</think>", 0.0),
        ("format", "<think>a</think> so <answer>b</answer>", 0.0),
        ("format", "<think>a</think><answer>b</answer> done", 0.0),
        ("format", "Well <think>a</think><answer>b</answer>", 0.0),
        ("format", "<think>a<think>b</think><answer>b</answer>", 0.0),
        ("format", "<think>a</think><answer>b</answer></answer>", 0.0),
        ("format", "<think>a<answer>b</answer></think>", 0.0),
        ("format", "</think>a<think><answer>b</answer>", 0.0),
        ("format", "", 0.0),
        ("format:plan", "<plan>x</plan>", 1.0),
        ("format:plan", "<think>a</think><answer>b</answer>", 0.0),
        ("format:a,b,c", "<a></a> <b></b> <c></c>", 1.0),
        (r"format:Answer: .*", "Answer: 1\n2", 1.0),
        (r"format:Answer: \d+", "Answer: 12 or so", 0.0),
    ],
)
def test_format(spec: str, said: str, expected: float) -> None:
    reward = parse_reward(spec).function
    assert reward(completions=[said]) == [expected]
    assert reward(completions=[[{"role": "assistant", "content": said}]]) == [expected]


@given(st.integers(1, 300), st.integers(0, 1000))
def test_length(target: int, tokens: int) -> None:
    (value,) = parse_reward(f"length:{target}").function(completion_ids=[[0] * tokens])
    exact = max(Fraction(0), 1 - Fraction(abs(tokens - target), target))
    assert value == pytest.approx(float(exact), abs=1e-12)


@pytest.mark.parametrize("spec", ["length", "length:0", "length:-3", "length:long", "length:1.5"])
def test_length_needs_a_target(spec: str) -> None:
    with pytest.raises(UsageError, match="needs a target in tokens, at least 1: length:200"):
        parse_reward(spec)


def test_format_with_a_bad_pattern() -> None:
    with pytest.raises(UsageError, match="is not a regular expression"):
        parse_reward("format:<(>")
