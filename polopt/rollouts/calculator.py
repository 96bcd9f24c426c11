"""A calculator that fills in what the policy asks: ``7+8=`` is answered with ``15;``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from polopt.core.example import Example

_CALL = re.compile(r"(?<![0-9+*-])([0-9]{1,9}(?:[+*-][0-9]{1,9}){1,20})=\Z")
_TERM = re.compile(r"[+-]?[0-9*]+")


@dataclass(frozen=True)
class Calculator:
    """Answers a sum, difference or product of integers that ends in ``=``, products first, with its value and ``;``.

    At most 21 numbers of at most 9 digits. After anything else that ends in ``=`` it has nothing to say.
    """

    stop: tuple[str, ...] = ("=",)

    def reply(self, example: Example, completion: str) -> str | None:
        call = _CALL.search(completion)
        return "" if call is None else f"{value(call[1])};"


def value(expression: str) -> int:
    """``2+3*4-1`` -> 13; integers, ``+``, ``-`` and ``*`` only."""
    terms = _TERM.findall(expression)
    factors = ([int(number) for number in term.lstrip("+-").split("*")] for term in terms)
    signed = (-prod(of) if term.startswith("-") else prod(of) for term, of in zip(terms, factors, strict=True))
    return sum(signed)
