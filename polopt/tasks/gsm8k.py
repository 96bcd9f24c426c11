"""GSM8K's way of writing a worked solution (Cobbe et al. 2021, arXiv:2110.14168).

One step per line, calculator marks such as ``<<48/2=24>>`` inside the steps, and ``#### 72`` as the last line.
"""

from __future__ import annotations

import re

MARKER = "####"
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


def split_solution(solution: str) -> tuple[tuple[str, ...], str] | None:
    """The steps without calculator marks and the answer after the last ``####``; None where there is no answer."""
    worked, marker, answer = solution.rpartition(MARKER)
    if not marker or not answer.strip():
        return None
    lines = (_CALCULATOR_MARK.sub("", line).strip() for line in worked.splitlines())
    return tuple(line for line in lines if line), answer.strip()
