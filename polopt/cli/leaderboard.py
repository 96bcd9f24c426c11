"""``polopt leaderboard``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from polopt.cli.compare import MACHINE, command_line, made_with, run_plan, workers_for
from polopt.cli.options import Groups, Option, parse
from polopt.cli.output import check_json_path, make_console, silence_libraries, write_json
from polopt.core.errors import UsageError
from polopt.training.files import write_whole

DESCRIPTION = """\
Every method that learns from generated prompts, against a baseline, in the small and the exact world: one page.

Finished runs are kept, so that after a method is added only its runs are carried out."""

WHAT = (
    Option("methods", str | None, None, "Contenders, as for `polopt compare`; all methods when left out.", "A,B"),
    Option("baseline", str, "grpo", "What they are compared with.", "METHOD"),
    Option("task", tuple[str, ...], ("arithmetic", "countdown", "grid"), "Tasks of the small world.", "NAME"),
    Option(
        "problem",
        tuple[str, ...],
        ("binary-verifier", "sparse-rewards", "several-modes", "multi-step"),
        "Problems of the exact world.",
        "NAME",
    ),
    Option("world", tuple[str, ...], ("small", "exact"), "Worlds to run.", "NAME"),
    Option("quick", bool, False, "One task, one problem, two seeds, tiny budgets: to see that it works."),
)
SMALL = (
    Option("budget", str, "rollouts=1600", "Of a run in the small world.", "UNIT=N"),
    Option("seeds", int, 5, "Of a method in the small world.", "N"),
    Option("prompts", int, 16, "Prompts per iteration.", "N"),
    Option("group", int, 4, "Trajectories per prompt.", "N"),
    Option("lr", float, 2e-4, "Learning rate of every method.", "X"),
    Option("eval_prompts", int, 512, "Held-out prompts of each evaluation.", "N"),
    Option("points", int, 4, "Evaluations of a run, after the one before it; in both worlds.", "N"),
)
EXACT = (
    Option("exact_budget", str, "rollouts=4096", "Of a run in the exact world.", "UNIT=N"),
    Option("exact_seeds", int, 10, "Of a method in the exact world.", "N"),
    Option("exact_lr", float, 0.03, "Learning rate of every method in the exact world.", "X"),
)
OUTPUT = (
    Option("out", str, "docs/leaderboard.md", "The page.", "FILE"),
    Option("json", str | None, None, "Write the numbers to this file.", "FILE"),
)
QUICK = {"seeds": 2, "exact_seeds": 2, "budget": "rollouts=64", "exact_budget": "rollouts=256", "eval_prompts": 16}


def groups() -> Groups:
    """Every option by the title under which the help shows it."""
    threads = Option("threads", int | None, None, "Threads of each run; all cores, or 1 with several at a time.", "N")
    return {"what": WHAT, "small world": SMALL, "exact world": EXACT, "machine": [*MACHINE, threads], "output": OUTPUT}


def leaderboard_command(arguments: Sequence[str]) -> int:
    """Run what is missing and write the page; returns the exit code. Raises UsageError before anything runs."""
    given = parse("leaderboard", DESCRIPTION, groups(), arguments)
    options: dict[str, Any] = {o.name: o.default for members in groups().values() for o in members}
    options |= {**(QUICK if given.options.get("quick") else {}), **given.options}
    if options["quick"]:
        for name in ("task", "problem"):
            options[name] = options[name][:1]
    check_json_path(options["json"])
    page = Path(options["out"])
    if page.is_dir() or not page.absolute().parent.is_dir():
        raise UsageError(f"--out {page}: name a file in a folder that exists")
    if unknown := sorted(set(options["world"]) - {"small", "exact"}):
        raise UsageError(f"--world cannot be {unknown[0]!r}; choose from small, exact")
    silence_libraries()

    from polopt.compare.leaderboard import fitting, make_page
    from polopt.compare.plan import Plan, make_worlds, parse_budget, parse_contender
    from polopt.compare.report import Report, as_dict, make_report

    fit, others = fitting()
    named = fit if options["methods"] is None else [text.strip() for text in options["methods"].split(",")]
    contenders = [parse_contender(options["baseline"])]
    contenders += [c for c in map(parse_contender, named) if c.label != contenders[0].label]
    console = make_console()
    reports: dict[str, Report] = {}
    plans: dict[str, Plan] = {}
    if "small" in options["world"]:
        settings = {name: options[name] for name in ("prompts", "group", "eval_prompts")}
        unit, limit = parse_budget(options["budget"])
        plans["small"] = Plan(
            tuple(contenders),
            make_worlds(options["task"], (), None),
            unit,
            limit,
            seeds=options["seeds"],
            points=options["points"],
            lr=options["lr"],
            settings=settings,
        )
    if "exact" in options["world"]:
        unit, limit = parse_budget(options["exact_budget"])
        plans["exact"] = Plan(
            tuple(contenders),
            make_worlds((), options["problem"], None),
            unit,
            limit,
            seeds=options["exact_seeds"],
            points=options["points"],
            lr=options["exact_lr"],
        )
    workers = {name: workers_for(plan, options) for name, plan in plans.items()}
    for name, plan in plans.items():
        console.print(f"{name} world: {_size(plan)}", style="dim", highlight=False)
        reports[name] = make_report(run_plan(plan, options, workers[name], console))
    command = command_line("leaderboard", arguments)
    made = made_with(max(workers.values(), default=1))
    text = make_page(
        reports.get("small"),
        reports.get("exact"),
        command=command,
        made=made,
        left_out=others if options["methods"] is None else {},
    )
    write_whole(page, text)
    if options["json"] is not None:
        numbers: Mapping[str, Any] = {
            name: as_dict(report, command=command, made=made) for name, report in reports.items()
        }
        write_json(numbers, options["json"])
    console.print(f"[bold]page[/bold] {escape(str(page))}", highlight=False, soft_wrap=True)
    return 0


def _size(plan: Any) -> str:
    runs = len(plan.contenders) * len(plan.worlds) * plan.seeds
    return f"{len(plan.contenders)} methods, {len(plan.worlds)} tasks, {plan.seeds} seeds: {runs} runs"
