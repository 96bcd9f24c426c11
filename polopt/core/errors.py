"""The one exception that means: the user's input is at fault, and here is what to change."""

from __future__ import annotations


class UsageError(ValueError):
    """A sentence a user can act on. The command line prints it as one line and exits with code 2."""
