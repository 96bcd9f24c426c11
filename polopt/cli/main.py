"""The command ``polopt``: finds the subcommand and turns its errors into exit codes.

Exit codes: 0 done, 2 wrong input (one line on the error output), 130 interrupted. Subcommands are imported when they
are called, so that help and version wait for no model library.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import cast

from polopt.core.errors import UsageError


@dataclass(frozen=True)
class Command:
    """Where a subcommand is and what it does, in a line."""

    module: str
    function: str
    summary: str

    def __call__(self, arguments: Sequence[str]) -> int:
        function = getattr(importlib.import_module(self.module), self.function)
        return cast(Callable[[Sequence[str]], int], function)(arguments)


COMMANDS = {
    "train": Command("polopt.cli.train", "train_command", "improve a policy by a method"),
    "eval": Command("polopt.cli.evaluate", "eval_command", "measure a policy on held-out prompts"),
    "pairs": Command("polopt.cli.pairs", "pairs_command", "sample, judge and write a preference data set"),
    "diagnose": Command("polopt.cli.diagnose", "diagnose_command", "measure a method's gradient by enumeration"),
    "claim": Command("polopt.cli.claim", "claim_command", "test a paper's claim at small scale"),
    "study": Command("polopt.cli.study", "study_command", "rerun the comparison of a paper, with its figure"),
    "compare": Command("polopt.cli.compare", "compare_command", "compare methods under one budget: better, or noise?"),
    "leaderboard": Command("polopt.cli.leaderboard", "leaderboard_command", "compare every method with a baseline"),
    "methods": Command("polopt.cli.catalog", "methods_command", "list the methods"),
    "show": Command("polopt.cli.catalog", "show_command", "explain a method: citation, equations, parts, options"),
    "parts": Command("polopt.cli.catalog", "parts_command", "list the parts that fit a slot"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``polopt ARGUMENTS`` (those of the process when left out) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(given)
    except UsageError as error:
        print_error(f"error: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of the output, such as `head`, has gone; what is still buffered must not fail at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:
        # How the option parser ends after its help (0) or a value it cannot read (2).
        return stop.code if isinstance(stop.code, int) else 2


def print_error(text: str) -> None:
    """A line on the error output."""
    sys.stderr.write(f"polopt: {text}\n")


def _dispatch(given: list[str]) -> int:
    first = given[0] if given else "--help"
    if first in ("-h", "--help", "help"):
        sys.stdout.write(_help())
        return 0
    if first in ("--version", "-V"):
        from importlib.metadata import version

        sys.stdout.write(f"polopt {version('polopt')}\n")
        return 0
    if first not in COMMANDS:
        close = get_close_matches(first, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(f"unknown command {first!r}; {hint}commands: {', '.join(COMMANDS)}")
    return COMMANDS[first](given[1:])


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "".join(f"  {name:<{width}}  {command.summary}\n" for name, command in COMMANDS.items())
    return (
        "usage: polopt COMMAND [OPTIONS]\n\n"
        "Policy optimization: every method a short file of interchangeable parts.\n\n"
        f"commands:\n{commands}\n"
        "options:\n  -h, --help     this text; `polopt COMMAND --help` for a command's options\n"
        "  -V, --version  the version\n\n"
        "examples:\n"
        "  polopt train grpo\n"
        "  polopt train grpo --advantage leave-one-out --objective.high 0.28\n"
        "  polopt train dapo --model MODEL --data train.jsonl --map prompt=question --reward math-verify --lora 16\n"
        "  polopt compare grpo dapo --task arithmetic --budget rollouts=5000\n"
        "  polopt show ppo\n"
    )
