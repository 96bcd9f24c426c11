"""``polopt train``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polopt.cli.main import print_error
from polopt.cli.options import Given, Groups, Option, parse, run_options
from polopt.cli.output import check_json_path, make_console, silence_libraries, write_json
from polopt.core.errors import UsageError
from polopt.training.config import RunConfig, make_config, read_config

DESCRIPTION = """\
Improve a policy by a method; without further options the small policy shipped with polopt, on generated arithmetic.

Every slot of the method and every field of its parts is an option too (`polopt show METHOD` lists them):
  --advantage leave-one-out   the part of that name (`polopt parts`), or the one that the method of that slug has
  --filter none               an empty slot
  --objective.high 0.28       a field of the part in a slot
  --slots.reward clip         a slot that has the name of another option"""

POSITIONAL = Option(
    "slug",
    str | None,
    None,
    "Slug of the method, which `polopt methods` lists, or a file of your own: mine.py.",
    "METHOD",
)

CONTROL = (
    Option("config", str | None, None, "Settings from a TOML or YAML file; options given here win.", "FILE"),
    Option("out", str | None, None, "", "FOLDER"),
    Option("resume", bool, False, "Continue the run in --out from its latest checkpoint, with its own settings."),
    Option("json", str | None, None, "Write the summary of the run to this file.", "FILE"),
    Option("quiet", bool, False, "Print nothing but errors."),
    Option("verbose", bool, False, "Let the libraries below print their notices and progress."),
)

# Settings of a run under the titles of the help; those in none go under "other".
TITLES = {
    "method and problem": (
        *("method", "model", "task", "level", "data", "eval_data", "split", "map"),
        *("reward", "pairs", "on_reward_error", "reward_timeout"),
    ),
    "budget": ("steps", "seconds", "tokens", "rollouts"),
    "batch and optimizer": (
        *("prompts", "group", "stale", "seed", "lr", "lr_schedule", "warmup", "weight_decay", "beta1", "beta2"),
        *("token_budget", "max_rows"),
    ),
    "adapters and machine": ("lora", "lora_alpha", "lora_targets", "precision", "device", "threads"),
    "evaluation and record": (
        *("eval_every", "eval_prompts", "eval_samples", "save_every", "keep", "track", "strict", "profile"),
    ),
}


def train_command(arguments: Sequence[str]) -> int:
    """Train and report; returns the exit code. Raises UsageError before anything is written."""
    given = parse("train", DESCRIPTION, groups(), arguments, POSITIONAL)
    check_json_path(given.options.get("json"))
    if not given.options.get("verbose"):
        silence_libraries()
    config, notice = configure(given)
    quiet = bool(given.options.get("quiet"))
    console = make_console(quiet=quiet)
    if notice:
        console.print(notice, highlight=False, soft_wrap=True, markup=False)

    from polopt.training.build import resolve
    from polopt.training.run import train

    config = resolve(config)
    try:
        summary = train(config, resume=bool(given.options.get("resume")), quiet=quiet, console=console)
    except KeyboardInterrupt:
        print_error(_interrupted(Path(str(config.out))))
        return 130
    if "json" in given.options:
        write_json(summary, given.options["json"])
    return 0


def groups() -> Groups:
    """Every option by the title under which the help shows it."""
    known = dict(run_options())
    known["method"] = dataclasses.replace(known["method"], kind=str | None, default=None)
    out = known.pop("out")
    control = [dataclasses.replace(option, help=out.help) if option.name == "out" else option for option in CONTROL]
    titled = {title: [known.pop(name) for name in names] for title, names in TITLES.items()}
    return {"run": control, **titled, **({"other": list(known.values())} if known else {})}


def configure(given: Given) -> tuple[RunConfig, str]:
    """The configuration of the run, and what to tell its owner about it.

    Options win over the file; a resumed run without a file continues with the settings in its folder. A repeated run
    gets a fresh folder when that of the file holds a finished run. Raises UsageError for settings that contradict each
    other and for a run without a method.
    """
    options = {name: value for name, value in given.options.items() if name in run_options()}
    if given.positional is not None:
        if options.get("method", given.positional) != given.positional:
            raise UsageError(f"METHOD {given.positional} and --method {options['method']} differ; give one of them")
        options["method"] = given.positional
    resume = bool(given.options.get("resume"))
    file = given.options.get("config")
    if resume and file is None:
        if options.get("out") is None:
            raise UsageError("--resume needs --out FOLDER, the folder of the run to continue")
        settled = Path(options["out"]) / "config.yaml"
        if not settled.is_file():
            raise UsageError(f"there is no run to resume in {options['out']}: it has no config.yaml")
        settings = _from_file(settled)
        settings.pop("out")
    else:
        settings = {} if file is None else _from_file(Path(file))
    notice = ""
    earlier = settings.get("out")
    if not resume and "out" not in options and earlier is not None and (Path(earlier) / "model").is_dir():
        del settings["out"]
        notice = f"{earlier} holds a finished run; this one gets a new folder"
    config = make_config(_merged(settings, options, given.slots))
    if "method" not in settings and "method" not in options:
        raise UsageError("name a method: polopt train METHOD; `polopt methods` lists them")
    return config, notice


def _from_file(path: Path) -> dict[str, Any]:
    """Settings of a file, checked, with part settings under ``slots``; those that it leaves out are left out."""
    found = read_config(path)
    try:
        checked = make_config(found).as_dict()
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    names = {str(key).replace("-", "_") for key in found}
    return {name: value for name, value in checked.items() if name in names or name == "slots"}


def _merged(file: Mapping[str, Any], options: Mapping[str, Any], slots: Mapping[str, str]) -> dict[str, Any]:
    settings = dict(file)
    # What to train on is one choice: the command line's replaces the file's.
    for name, other in (("data", "task"), ("task", "data")):
        if options.get(name) is not None and other not in options:
            settings.pop(other, None)
    # Fields of a part that the command line replaces are not the new part's.
    kept = {key: value for key, value in settings.pop("slots", {}).items() if key.partition(".")[0] not in slots}
    return {**settings, **options, "slots": {**kept, **slots}}


def _interrupted(run: Path) -> str:
    from polopt.training.checkpoint import latest_checkpoint

    if latest_checkpoint(run) is not None:
        return f"interrupted; continue with: polopt train --resume --out {run}"
    return "interrupted before the first checkpoint; --save-every 10 makes runs resumable"
