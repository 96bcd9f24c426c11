"""GSM8K's ways of writing worked solutions (Cobbe et al. 2021, arXiv:2110.14168).

One step per line, calculator marks such as ``<<48/2=24>>`` inside the steps, and ``#### 72`` as the last line. A file
of several models' solutions has ``question``, ``ground_truth``, whose last line is ``A: 72``, and a column for each
model: ``{"is_correct": true, "solution": "..."}``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MARKER = "####"
_LAST_LINE = "A:"
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


def split_solution(solution: str) -> tuple[tuple[str, ...], str] | None:
    """The steps without calculator marks and the answer after the last ``####``; None where there is no answer."""
    worked, marker, answer = solution.rpartition(MARKER)
    if not marker or not answer.strip():
        return None
    lines = (_CALCULATOR_MARK.sub("", line).strip() for line in worked.splitlines())
    return tuple(line for line in lines if line), answer.strip()


def solvers(columns: Sequence[str], first: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that hold a model's labelled solution, by the first row; none in a file of another layout."""
    if not isinstance(first.get("question"), str):
        return ()
    return tuple(name for name in columns if _labelled(first.get(name)) is not None)


def solutions(row: Mapping[str, Any], names: Sequence[str]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The models' solutions of a problem, right ones with label 1 and wrong ones with 0, as they are written.

    Raises ValueError naming the column that holds none.
    """
    found = []
    for name in names:
        labelled = _labelled(row.get(name))
        if labelled is None:
            raise ValueError(name)
        found.append(labelled)
    return tuple(text for text, _ in found), tuple(label for _, label in found)


def split_ground_truth(text: Any) -> tuple[tuple[str, ...], str] | None:
    """The steps without calculator marks and the answer of the last line, ``A: 72``; None where that is another."""
    if not isinstance(text, str):
        return None
    worked, _, last = text.rstrip().rpartition("\n")
    return split_solution(f"{worked}\n{MARKER}{last.removeprefix(_LAST_LINE)}") if last.startswith(_LAST_LINE) else None


def _labelled(value: Any) -> tuple[str, float] | None:
    if not isinstance(value, Mapping) or not isinstance(value.get("is_correct"), bool):
        return None
    text = value.get("solution")
    return (text, float(value["is_correct"])) if isinstance(text, str) and text.strip() else None
