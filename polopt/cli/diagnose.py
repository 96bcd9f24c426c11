"""``polopt diagnose``."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from polopt.cli.options import Groups, Option, parse, split
from polopt.cli.output import check_json_path, make_console, write_json
from polopt.core.errors import UsageError

if TYPE_CHECKING:
    from polopt.core.method import Method
    from polopt.diagnosis.diagnose import Bias, Diagnosis, Signal
    from polopt.tasks.problems import Problem

DESCRIPTION = """\
Measure a method's gradient where every expectation is a finite sum: bias, noise, what it learns from, where it leads.

The first update of the whole chain (reward shaping, filter, advantage, weight, objective, regularizer, aggregation)
on a problem of the exact world. Several methods are compared side by side. Slots and fields of parts are options as
for `polopt train`, and hold for every method named: --advantage leave-one-out, --objective.high 0.28.
docs/diagnose.md explains every number."""

SLUGS = Option(
    "slugs", tuple[str, ...], (), "Slugs of the methods, which `polopt methods` lists, or files of your own.", "METHOD"
)
PROBLEM = (
    Option(
        "problem", str, "binary-verifier", "Kind of problem: rewards over all short sequences, and a policy.", "NAME"
    ),
    Option("vocabulary", int | None, None, "Tokens to choose from; the problem's own number when left out.", "V"),
    Option("length", int | None, None, "Tokens of a sequence, at most; the problem's own when left out.", "H"),
    Option("end", bool, True, "The last token ends a sequence, so that lengths vary; else all have one length."),
    Option("problems", int, 3, "Prompts: independent problems of the kind, one as likely as the other.", "N"),
    Option("pass_rate", tuple[float, ...], (0.1, 0.5, 0.9), "Of each prompt of a binary problem.", "P"),
    Option(
        "group", int | None, None, "Trajectories per prompt; the problem's own number, 4 mostly, when left out.", "N"
    ),
    Option("seed", int, 0, "Of the problem, and of sampling where enumeration is out of reach.", "N"),
)
ESTIMATE = (
    Option(
        "pairs",
        Literal["data", "on-policy"],
        "data",
        "on-policy: a method that learns from a data set is measured on pairs of the policy's own answers.",
    ),
    Option("prompts", int, 8, "Groups per batch of a method whose groups depend on their batch.", "N"),
    Option("seconds", float, 10.0, "Longest search for the fixed point of a method.", "X"),
)
OUTPUT = (
    Option("json", str | None, None, "Write everything measured to this file.", "FILE"),
    Option("png", str | None, None, "Draw it into this file.", "FILE"),
    Option("out", str | None, None, "Write diagnosis.json and diagnosis.png into this folder.", "FOLDER"),
)
PATIENCE = 2.0
"""Seconds before progress is shown."""


def groups() -> Groups:
    """Every option by the title under which the help shows it."""
    return {"problem": PROBLEM, "estimate": ESTIMATE, "output": OUTPUT}


def diagnose_command(arguments: Sequence[str]) -> int:
    """Measure, print, write; returns the exit code.

    Raises UsageError for wrong input.
    """
    known = {option.name: option for options in groups().values() for option in options}
    own, _, slots = split(arguments, known, with_slots=True)
    given = parse("diagnose", DESCRIPTION, groups(), own, SLUGS)
    options = {name: option.default for name, option in known.items()} | dict(given.options)
    slugs = list(dict.fromkeys(given.positional or ()))
    if not slugs:
        raise UsageError("name a method: polopt diagnose METHOD; `polopt methods` lists them")
    targets = _targets(options)

    from polopt.diagnosis.diagnose import diagnose
    from polopt.diagnosis.plot import plot_diagnosis
    from polopt.methods import get_method
    from polopt.training.build import composed

    def made(method: Method) -> Method:
        # Methods that sample in any case are measured beside those that need not.
        return composed(method, slots, pairs=options["pairs"] if method.offline else "data")

    methods = [made(get_method(slug)) for slug in slugs]
    problem = _problem(options, given.options)
    console = make_console()
    found: dict[str, Diagnosis] = {}
    with _Progress(console) as progress:
        for method in methods:
            found[method.slug] = diagnose(
                method,
                problem,
                prompts=_positive(options, "prompts"),
                seed=options["seed"],
                seconds=options["seconds"],
                tell=lambda text, slug=method.slug: progress(f"{slug}: {text}"),  # type: ignore[misc]
            )
    title = _title(problem, slots)
    console.print(make_table(found, title))
    console.print(f"[dim]{escape(_footnote(found))}[/dim]", highlight=False)
    report = {
        "problem": {
            "name": problem.name,
            "seed": options["seed"],
            "vocabulary": problem.space.vocabulary,
            "length": problem.space.length,
            "end": problem.space.end,
            "problems": problem.batch,
            "group_sizes": list(problem.group_sizes),
        },
        "slots": slots,
        "methods": {slug: d.as_dict() for slug, d in found.items()},
    }
    for path in targets["json"]:
        write_json(report, str(path))
        console.print(f"[bold]json  [/bold]{escape(str(path))}", highlight=False, soft_wrap=True)
    for path in targets["png"]:
        plot_diagnosis(found, title, path)
        console.print(f"[bold]figure[/bold] {escape(str(path))}", highlight=False, soft_wrap=True)
    return 0


def _targets(options: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Files to write, checked before anything is computed."""
    check_json_path(options["json"])
    png = options["png"]
    if png is not None and (Path(png).is_dir() or not Path(png).absolute().parent.is_dir()):
        raise UsageError(f"--png {png}: name a file in a folder that exists")
    if png is not None and Path(png).suffix.lower() != ".png":
        raise UsageError(f"--png {png}: the figure is a PNG; name a file that ends in .png")
    made: dict[str, list[Path]] = {kind: [Path(options[kind])] if options[kind] else [] for kind in ("json", "png")}
    if options["out"] is not None:
        folder = Path(options["out"])
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--out {folder} is a file; name a folder")
        folder.mkdir(parents=True, exist_ok=True)
        made["json"].append(folder / "diagnosis.json")
        made["png"].append(folder / "diagnosis.png")
    return made


def _positive(options: Mapping[str, Any], name: str) -> int:
    value = int(options[name])
    if value < 1:
        raise UsageError(f"--{name} must be at least 1, got {value}")
    return value


def _problem(options: Mapping[str, Any], given: Mapping[str, Any]) -> Problem:
    from polopt.diagnosis.diagnose import within
    from polopt.policies.exact import SequenceSpace
    from polopt.tasks.problems import options_of, problem

    name, count = options["problem"], _positive(options, "problems")
    more: dict[str, Any] = {}
    if "pass_rate" in options_of(name):
        more["pass_rate"] = options["pass_rate"]
        count = len(options["pass_rate"])
        if given.get("problems", count) != count:
            raise UsageError(f"--problems {given['problems']}, but there are {count} pass rates: one makes one prompt")
    elif "pass_rate" in given:
        raise UsageError(f"--pass-rate: the prompts of problem {name!r} have none")
    own = problem(name).space
    space = SequenceSpace(
        own.vocabulary if options["vocabulary"] is None else options["vocabulary"],
        own.length if options["length"] is None else options["length"],
        options["end"],
    )
    made = problem(name, space=space, batch=count, seed=options["seed"], **more)
    return within(made, None if options["group"] is None else _positive(options, "group"))


def _title(problem: Problem, slots: Mapping[str, str]) -> str:
    space = problem.space
    lengths = f"1 to {space.length}" if space.end else str(space.length)
    sizes = sorted(set(problem.group_sizes))
    where = (
        f"{problem.name}: {problem.batch} prompt{'s' * (problem.batch > 1)}, {space.n_sequences} sequences over "
        f"{space.vocabulary} tokens, length {lengths}, groups of "
    )
    changed = "".join(f", {name} {value}" for name, value in slots.items())
    return where + " or ".join(map(str, sizes)) + changed


class _Progress:
    """A line on the terminal that says what is under way, once it takes longer than `PATIENCE`."""

    def __init__(self, console: Console) -> None:
        self.console, self.started = console, time.monotonic()
        self.status: Status | None = None

    def __enter__(self) -> _Progress:
        return self

    def __call__(self, text: str) -> None:
        if self.status is not None:
            self.status.update(escape(text))
        elif time.monotonic() - self.started > PATIENCE:
            self.status = self.console.status(escape(text))
            self.status.start()

    def __exit__(self, *error: object) -> None:
        if self.status is not None:
            self.status.stop()


# --- the table ------------------------------------------------------------------------------------------------------


def make_table(found: Mapping[str, Diagnosis], title: str) -> Table:
    """Measures in rows, methods in columns."""
    table = Table(title=escape(title), title_justify="left", show_lines=False)
    table.add_column("measure", no_wrap=True)
    for slug in found:
        table.add_column(escape(slug), justify="right")
    for section in _sections(found):
        for name, values in section:
            table.add_row(name, *values)
        table.add_section()
    return table


Rows = list[tuple[str, list[str]]]


def _sections(found: Mapping[str, Diagnosis]) -> list[Rows]:
    every = list(found.values())
    sections: list[Rows] = [
        [("estimated from", [f"{d.draws:,} groups, {_kind(d)}" for d in every])],
        _bias_rows("against grad E\\[r]", [d.bias for d in every]),
    ]
    if any(d.kl_bias for d in every):
        rows = [("beta of the KL to the reference", [_number(d.beta) if d.beta else "-" for d in every])]
        sections.append(rows + _bias_rows("with the KL", [d.kl_bias for d in every])[:2])
    noise: Rows = [
        ("noise scale, trajectories", [_number(d.noise) for d in every]),
        ("signal to noise, per trajectory", [_number(d.signal_to_noise) for d in every]),
        ("effective samples: sequences, steps", [f"{d.ess_sequence:.0%}, {d.ess_step:.0%}" for d in every]),
    ]
    if any(d.kept < 1 for d in every):
        noise.append(("groups that the filter keeps", [f"{d.kept:.1%}" for d in every]))
    sections.append(noise)
    sections.append(
        [
            ("all-right groups: share of gradient", [_signal(d.all_right) for d in every]),
            ("all-wrong groups: share of gradient", [_signal(d.all_wrong) for d in every]),
        ]
    )
    if any(d.curve for d in every):
        sections.append(
            [(f"weight at pass rate {p:g}", [_weight(d, p) for d in every]) for p in (0.02, 0.1, 0.5, 0.9, 0.98)]
        )
    if any(d.fixed_point for d in every):
        sections.append(_fixed_point_rows(every))
    return sections


def _kind(d: Diagnosis) -> str:
    return {"exact": "all", "sampled groups": "sampled", "sampled batches": "sampled in batches"}[d.kind]


def _bias_rows(against: str, found: Sequence[Bias | None]) -> Rows:
    def shown(value: float | None, error: float = 0.0) -> str:
        return "-" if value is None else _number(value) + (f" ± {error:.2g}" if error else "")

    return [
        (
            f"bias {against}: angle",
            [_angle(b) if b else "-" for b in found],
        ),
        ("  norm ratio", [shown(b.norm_ratio, b.norm_error) if b else "-" for b in found]),
        ("  best scale", [shown(b.scale) if b else "-" for b in found]),
        ("  residual at that scale", [f"{b.residual:.1%}" if b and not math.isnan(b.residual) else "-" for b in found]),
    ]


def _angle(bias: Bias) -> str:
    if math.isnan(bias.angle):
        return "no gradient"
    text = f"{bias.angle:.2f}°"
    return text + (f" (noise {bias.angle_floor:.2g}°)" if bias.angle_floor else "")


def _signal(signal: Signal) -> str:
    if math.isnan(signal.share):
        return "no gradient"
    return f"{signal.share:.1%} from {signal.probability:.1%}"


def _weight(d: Diagnosis, rate: float) -> str:
    if d.curve is None or rate not in d.curve.rates:
        return "-"
    place = d.curve.rates.index(rate)
    error = d.curve.error[place]
    return _number(d.curve.weight[place]) + (f" ± {error:.2g}" if error else "")


def _fixed_point_rows(every: Sequence[Diagnosis]) -> Rows:
    points = [d.fixed_point for d in every]

    def row(name: str, text: Any) -> tuple[str, list[str]]:
        return name, ["-" if point is None else text(point) for point in points]

    rows = [
        row("fixed point: expected reward", lambda p: f"{p.reward:.4f}"),
        row("  entropy, nats", lambda p: f"{p.entropy:.4f}"),
        row("  mass on the best sequences", lambda p: f"{p.best:.1%}"),
    ]
    if any(point is not None and point.target_tv is not None for point in points):
        rows.append(row("  total variation to tilted target", lambda p: _optional(p.target_tv)))
        rows.append(row("  KL to tilted target, nats", lambda p: _optional(p.target_kl)))
    rows.append(row("  converged", lambda p: f"{'yes' if p.converged else 'not yet'}, {p.steps} steps"))
    return rows


def _optional(value: float | None) -> str:
    return "-" if value is None else _number(value)


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "0" if abs(value) < 1e-9 else f"{value:.4g}"


def _footnote(found: Mapping[str, Diagnosis]) -> str:
    said = ["Bias: 0° and residual 0% is the true gradient up to a scale. Weight: 1 is that of the true gradient."]
    if any(d.bias.angle_floor for d in found.values()):
        said.append("Noise: the angle that a sample of this size shows without any bias.")
    if any(d.kind == "sampled batches" for d in found.values()):
        said.append("Sampled in batches: what a group teaches depends on the groups beside it.")
    if any(d.fixed_point is not None and not d.fixed_point.exact for d in found.values()):
        said.append("Where gradients are sampled, so are those on the way to the fixed point.")
    return "\n".join(said)
