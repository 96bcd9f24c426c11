"""What answers a policy in the middle of its trajectory: a tool, a search engine, a game."""

from __future__ import annotations

from typing import Protocol

from polopt.core.example import Example


class Environment(Protocol):
    """A function of what was asked and of what was written so far, so that it needs no state of its own.

    ``stop`` are the strings after which the policy waits for an answer.
    """

    @property
    def stop(self) -> tuple[str, ...]: ...

    def reply(self, example: Example, completion: str) -> str | None:
        """What follows a completion that ends in a stop string.

        An empty text means that there is nothing to say and the policy goes on; None ends the trajectory. What a policy
        wrote is untrusted: it is parsed, never executed, and a malformed call is answered, not raised.
        """
        ...
