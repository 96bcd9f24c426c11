"""``polopt compare`` and ``polopt leaderboard``."""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from polopt.cli.options import Given, Groups, Option, parse, run_options, split
from polopt.cli.output import check_json_path, make_console, silence_libraries, write_json
from polopt.core.errors import UsageError

if TYPE_CHECKING:
    from polopt.compare.execute import Progress as Done
    from polopt.compare.plan import Plan
    from polopt.compare.report import Report

DESCRIPTION = """\
Which of several methods helps, by how much, and is it noise? The first one named is what the others are compared with.

Runs of one seed are paired: the same initial policy, the same prompts in the same order, the same held-out prompts.
Finished runs are kept: a comparison that was stopped, or that gets another contender, runs only what is missing.
docs/compare.md explains every number.

A contender is a method, alone or with slots and fields of its parts replaced, quoted or joined by plus signs. Slots
given outside the quotes hold for every contender.
  polopt compare grpo dapo --task countdown --budget rollouts=5000
  polopt compare grpo "grpo --advantage leave-one-out" grpo+objective.high=0.28
  polopt compare dpo dpo+pairs=on-policy grpo --task countdown
  polopt compare grpo gspo --problem binary-verifier:pass_rate=0.1 --seeds 10
  polopt compare grpo vcpo --problem multi-step --stale 0 4 16 64"""

CONTENDERS = Option("contenders", tuple[str, ...], (), "Methods, with or without replaced slots.", "METHOD")
WHERE = (
    Option("task", tuple[str, ...], (), "Generated task; else the one that the methods name, or 'arithmetic'.", "NAME"),
    Option(
        "problem",
        tuple[str, ...],
        (),
        "Problem of the exact world, NAME or NAME:OPTION=VALUE,...; scores are exact expectations.",
        "NAME",
    ),
    Option(
        "stale",
        tuple[int, ...],
        (),
        "Updates between sampling a batch and learning from it: 0 4 16. Each number is one more world, and the figure "
        "shows the final score against it.",
        "N",
    ),
)
HOW = (
    Option(
        "budget",
        str | None,
        None,
        "Of each run: rollouts=20000, tokens=1e6, steps=100 or seconds=60; by default 7680 rollouts in the small world "
        "and 4096 in the exact world, with --stale 60 and 256 steps.",
        "UNIT=N",
    ),
    Option("seeds", int, 5, "Runs of each contender.", "N"),
    Option("seed", int, 0, "The first seed.", "N"),
    Option("points", int, 8, "Held-out evaluations of a run, evenly over the budget, after the one before it.", "N"),
    Option("target", float | None, None, "Score to reach; by default the first contender's final one.", "X"),
    Option("confidence", float, 0.95, "Level of the intervals.", "X"),
)
RATE = (
    Option("tune_lr", str | None, None, "Rates to choose from, for each contender by itself: 3e-5,1e-4,3e-4.", "X,X"),
    Option("tune_seeds", int, 2, "Trials of each rate, with seeds that the comparison does not use.", "N"),
)
MACHINE = (
    Option("jobs", int | None, None, "Runs at a time; all cores, but 1 for a budget of seconds or on a GPU.", "N"),
    Option("cache", str | None, None, "Where finished runs are kept; ~/.cache/polopt/compare.", "FOLDER"),
    Option(
        "reuse",
        Literal["same-code", "any-version"],
        "same-code",
        "Which kept results may be taken: those of the present code, or of earlier code too.",
    ),
)
OUTPUT = (
    Option("out", str | None, None, "Folder of the page, figure and numbers; runs/compare-TIME.", "FOLDER"),
    Option("json", str | None, None, "Write the numbers to this file too.", "FILE"),
)
_RUN = {
    "model and data": (
        *("model", "level", "data", "eval_data", "split", "map"),
        *("reward", "pairs", "on_reward_error", "reward_timeout"),
    ),
    "batch and optimizer": (
        *("prompts", "group", "lr", "lr_schedule", "warmup", "weight_decay", "beta1", "beta2"),
        *("token_budget", "max_rows", "lora", "lora_alpha", "lora_targets", "precision", "device"),
        *("eval_prompts", "eval_samples", "strict"),
    ),
}
SMALL_BUDGET = "rollouts=7680"
EXACT_BUDGET = "rollouts=4096"
# The same number of updates at any staleness: what is sampled ahead costs rollouts, not steps.
STALE_SMALL_BUDGET, STALE_EXACT_BUDGET = "steps=60", "steps=256"


def groups() -> Groups:
    """Every option by the title under which the help shows it."""
    known = dict(run_options())
    known["eval_prompts"] = dataclasses.replace(
        known["eval_prompts"], default=None, kind=int | None, help="Held-out prompts of each evaluation; 512."
    )
    run = {title: [known[name] for name in names] for title, names in _RUN.items()}
    machine = [*MACHINE, known["threads"]]
    return {"where": WHERE, "comparison": HOW, **run, "choice of the learning rate": RATE, "machine": machine} | {
        "output": OUTPUT
    }


PLACES = frozenset({"--cache", "--out", "--json"})
"""Options that say where things are kept on this machine, and change no number."""


def command_line(name: str, arguments: Sequence[str]) -> str:
    """The command that repeats the numbers, as a page shows it: without `PLACES`."""
    kept: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word.partition("=")[0] not in PLACES:
            kept.append(word)
        elif "=" not in word and rest:
            rest.pop(0)
    return shlex.join(["polopt", name, *kept])


def compare_command(arguments: Sequence[str]) -> int:
    """Run what is missing, print, write; returns the exit code. Raises UsageError before anything runs."""
    known = {option.name: option for options in groups().values() for option in options}
    own, _, slots = split(arguments, known, with_slots=True)
    given = parse("compare", DESCRIPTION, groups(), own, CONTENDERS)
    options = {name: option.default for name, option in known.items()} | dict(given.options)
    check_json_path(options["json"])
    folder = _out_folder(options["out"])
    silence_libraries()

    plan = make_plan(given, options, slots)
    _check_confidence(options["confidence"])

    from polopt.compare.report import as_dict, make_report

    console = make_console()
    workers = workers_for(plan, options)
    comparison = run_plan(plan, options, workers, console)
    report = make_report(comparison, target=options["target"], level=options["confidence"])
    for table in make_tables(report):
        console.print(table)
    from polopt.compare.figure import plot_report
    from polopt.compare.page import write_page
    from polopt.compare.words import cost, edges, headline, plain_settings, title_of

    console.print(headline(report), highlight=False, markup=False)
    if said := edges(report):
        console.print(said, style="yellow", highlight=False, markup=False)
    console.print(cost(report), style="dim", highlight=False, markup=False)
    command = command_line("compare", arguments)
    made = made_with(workers)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = as_dict(report, command=command, made=made)
    write_json(numbers, str(folder / "compare.json"))
    plot_report(report, title_of(report), folder / "compare.png")
    write_page(
        report,
        folder / "index.html",
        figure=folder / "compare.png",
        command=command,
        settings=plain_settings(report),
        made=made,
    )
    if options["json"] is not None:
        write_json(numbers, options["json"])
    console.print(f"[bold]page[/bold] {escape(str(folder / 'index.html'))}", highlight=False, soft_wrap=True)
    return 0


def make_plan(given: Given, options: Mapping[str, Any], slots: Mapping[str, str]) -> Plan:
    """The plan that the command line means.

    Raises UsageError for one that cannot be run.
    """
    from polopt.compare.plan import Plan, make_worlds, parse_budget, parse_contender

    pairs = given.options.get("pairs", "data")
    contenders = tuple(parse_contender(text, slots, pairs=pairs) for text in given.positional or ())
    worlds = make_worlds(options["task"], options["problem"], options["data"], contenders, options["stale"])
    exact = worlds[0].exact
    if options["budget"] is None and not exact and options["model"] is not None:
        raise UsageError("a model of your own needs a budget: --budget rollouts=20000, tokens=1e6 or seconds=600")
    small_budget, exact_budget = SMALL_BUDGET, EXACT_BUDGET
    if any(world.stale for world in worlds):
        small_budget, exact_budget = STALE_SMALL_BUDGET, STALE_EXACT_BUDGET
    unit, limit = parse_budget(options["budget"] or (exact_budget if exact else small_budget))
    names = {name for members in _RUN.values() for name in members}
    settings = {name: value for name, value in given.options.items() if name in names and name != "lr"}
    if exact and (unfit := sorted(set(settings) & {"model", "data", "lora", "level", "eval_data"})):
        raise UsageError(f"--{unfit[0].replace('_', '-')} has no meaning for a problem of the exact world")
    tune = _rates(options["tune_lr"])
    plan = Plan(
        contenders,
        worlds,
        unit,
        limit,
        seeds=options["seeds"],
        first_seed=options["seed"],
        points=options["points"],
        lr=given.options.get("lr"),
        tune=tune,
        tune_seeds=options["tune_seeds"],
        settings=settings,
    )
    # Settings that contradict each other are said before anything runs.
    plan.jobs({})
    return plan


def _rates(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        rates = tuple(float(item) for item in text.split(",") if item.strip())
    except ValueError:
        rates = ()
    if len(set(rates)) < 2:
        raise UsageError(f"--tune-lr needs at least two learning rates, such as 3e-5,1e-4,3e-4; got {text!r}")
    return tuple(dict.fromkeys(rates))


def _check_confidence(level: float) -> None:
    if not 0 < level < 1:
        raise UsageError(f"--confidence lies strictly between 0 and 1, got {level}")


def _out_folder(given: str | None) -> Path:
    if given is None:
        return Path("runs") / f"compare-{time.strftime('%Y%m%d-%H%M%S')}"
    if Path(given).exists() and not Path(given).is_dir():
        raise UsageError(f"--out {given} is a file; name a folder")
    return Path(given)


def workers_for(plan: Plan, options: Mapping[str, Any]) -> int:
    """Runs at a time: those asked for, else as many as there are cores, or one where they would disturb each other."""
    asked = options["jobs"]
    if asked is not None:
        if asked < 1:
            raise UsageError(f"--jobs must be at least 1, got {asked}")
        return int(asked)
    if plan.unit == "seconds":
        return 1
    if not plan.worlds[0].exact:
        import torch

        if torch.cuda.is_available() and options.get("device") != "cpu":
            return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_plan(plan: Plan, options: Mapping[str, Any], workers: int, console: Console) -> Any:
    """Carry out a plan with a line of progress."""
    from polopt.compare.cache import Cache, default_folder
    from polopt.compare.execute import compare

    folder = Path(options["cache"]) if options["cache"] else default_folder()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--cache {folder} is a file; name a folder")
    cache = Cache(folder, any_version=options["reuse"] == "any-version")
    if plan.unit == "seconds" and workers > 1:
        console.print(f"a budget of seconds with {workers} runs at a time: each gets less done than alone", style="dim")
    with ShownProgress(console) as shown:
        return compare(plan, cache, workers=workers, threads=options["threads"], tell=shown)


class ShownProgress:
    """A line that is redrawn on a terminal; elsewhere a line every so often."""

    def __init__(self, console: Console, interval: float = 15.0) -> None:
        self.console, self.interval = console, interval
        self.bar: Progress | None = None
        self.said = time.monotonic()

    def __enter__(self) -> ShownProgress:
        if self.console.is_terminal:
            self.bar = Progress(BarColumn(), TextColumn("{task.description}"), console=self.console, transient=True)
            self.bar.start()
            self.bar.add_task("", total=1.0)
        return self

    def __call__(self, done: Done) -> None:
        from polopt.compare.words import duration

        text = f"{done.done} of {done.total} runs, {duration(done.left)} left  {done.latest}"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done.fraction, description=escape(text))
        elif time.monotonic() - self.said > self.interval:
            self.said = time.monotonic()
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()


def made_with(workers: int) -> dict[str, Any]:
    """When, where and with which versions a comparison was made."""
    from importlib.metadata import version

    return {
        "date": time.strftime("%Y-%m-%d"),
        "polopt": version("polopt"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "runs at a time": workers,
    }


# --- the tables -----------------------------------------------------------------------------------------------------


def make_tables(report: Report) -> list[Table]:
    """Final scores and differences; what happened on the way."""
    from polopt.compare.words import interval as bounds
    from polopt.compare.words import (
        lines,
        number,
        rollouts_to_target,
        signed,
        target_text,
        title_of,
    )

    base = report.baseline.contender.label
    final = Table(title=escape(title_of(report)), title_justify="left")
    final.add_column("contender", overflow="fold")
    # Intervals below their means: labels need the width.
    for name in ("final mean", "interquartile mean", f"difference to {base}", "P(better)"):
        final.add_column(escape(name), justify="right", no_wrap=True)
    final.add_column("")
    colours = {"better": "green", "worse": "red", "unclear": "dim"}
    for entry in report.entries:
        versus = entry.versus
        cells = [lines(entry.contender.label), *(f"{number(v.mean)}\n{bounds(v)}" for v in (entry.mean, entry.iqm))]
        if versus is not None:
            cells.append(f"{signed(versus.difference.mean)}\n{bounds(versus.difference)}")
            cells.append(f"{versus.improvement.mean:.0%}")
        shade = colours[versus.verdict] if versus is not None else ""
        said = "" if versus is None else versus.verdict
        final.add_row(*map(escape, cells), *[""] * (5 - len(cells)), f"[{shade}]{said}[/{shade}]" if shade else said)
    way = Table()
    way.add_column("contender", overflow="fold")
    for name in (
        "area",
        f"rollouts to {target_text(report)}",
        "entropy",
        "length",
        "s/step",
        "steps",
        "rollouts",
        "lr",
    ):
        way.add_column(escape(name), justify="right")
    for entry in report.entries:
        way.add_row(
            escape(lines(entry.contender.label)),
            number(entry.area.mean),
            rollouts_to_target(entry),
            number(entry.entropy),
            f"{entry.length:.1f}",
            f"{entry.step_seconds:.3g}",
            f"{entry.spent['steps']:,.0f}",
            f"{entry.spent['rollouts']:,.0f}",
            ", ".join(dict.fromkeys(f"{rate:g}" for rate in entry.rates.values())),
        )
    return [final, way]
