"""``polopt pairs``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape

from polopt.cli.evaluate import MACHINE, model_of
from polopt.cli.options import Groups as OptionGroups
from polopt.cli.options import Option, parse, run_options
from polopt.cli.output import check_json_path, make_console, silence_libraries, write_json
from polopt.core.errors import UsageError
from polopt.training.config import RunConfig, make_config

DESCRIPTION = """\
Make a preference data set: sample a policy, judge its answers by a reward, write them in rows for --data.

  polopt pairs --task arithmetic --prompts 512 --out pairs.jsonl
  polopt train dpo --data pairs.jsonl"""

WHAT = (
    Option("out", str | None, None, "File to write, ending in .jsonl; it must not exist.", "FILE"),
    Option(
        "form",
        Literal["pairs", "lists", "labels"],
        "pairs",
        "Best against worst answer; all different answers with their scores; each answer with right or wrong.",
    ),
    Option("prompts", int | None, None, "Prompts to answer; 1024 of a task, all of the data when left out.", "N"),
    Option("group", int, 8, "Answers to each prompt.", "N"),
    Option("seed", int, 0, "Of the prompts of a task, and of the sampling.", "N"),
)
PROBLEM = ("model", "task", "level", "data", "split", "map", "reward", "on_reward_error", "reward_timeout")
SAMPLING = (
    Option("temperature", float, 1.0, "Divides the logits.", "X"),
    Option("top_p", float, 1.0, "Smallest set of tokens with this probability.", "X"),
    Option("max_new_tokens", int | None, None, "Longest answer; that of the task, or 256, when left out.", "N"),
)
OUTPUT = (
    Option("json", str | None, None, "Write what was made to this file.", "FILE"),
    Option("quiet", bool, False, "Print nothing but errors."),
    Option("verbose", bool, False, "Let the libraries below print their notices and progress."),
)
PROMPTS = 1024


def groups() -> OptionGroups:
    """Every option by the title under which the help shows it."""
    known = run_options()
    return {
        "data set": WHAT,
        "policy and problem": [known[name] for name in PROBLEM],
        "sampling": SAMPLING,
        "machine": [known[name] for name in MACHINE],
        "output": OUTPUT,
    }


def pairs_command(arguments: Sequence[str]) -> int:
    """Sample, judge, write; returns the exit code.

    Raises UsageError for wrong input.
    """
    given = dict(parse("pairs", DESCRIPTION, groups(), arguments).options)
    out = _target(given.pop("out", None))
    path, quiet = given.pop("json", None), bool(given.pop("quiet", False))
    check_json_path(path)
    if not given.pop("verbose", False):
        silence_libraries()
    form = given.pop("form", "pairs")
    prompts = given.pop("prompts", None)
    if prompts is not None and prompts < 1:
        raise UsageError(f"--prompts must be at least 1, got {prompts}")
    sampling = {option.name: given.pop(option.name) for option in SAMPLING if option.name in given}
    config = make_config({**given, "model": model_of(given.get("model"))})
    console = make_console(quiet=quiet)
    with console.status("loading") as status:
        made = write_pairs(config, sampling, out, form=form, prompts=prompts, tell=status.update)
    console.print(
        f"{made['rows']} rows of {made['prompts']} prompts: [bold]{escape(str(out))}[/bold]",
        highlight=False,
        soft_wrap=True,
    )
    if path is not None:
        write_json(made, path)
    return 0


def write_pairs(
    config: RunConfig,
    sampling: Mapping[str, Any],
    out: Path,
    *,
    form: Literal["pairs", "lists", "labels"] = "pairs",
    prompts: int | None = None,
    tell: Any = lambda text: None,
) -> dict[str, Any]:
    """Write the data set, whole or not at all, and say what is in it. Raises UsageError where it would be empty."""
    import torch

    from polopt.rewards.scoring import Scorer
    from polopt.rollouts.groups import Groups
    from polopt.training.build import make_asked, make_policy
    from polopt.training.pairs import answer_rows

    if config.group < 2 and form != "labels":
        raise UsageError(f"--group must be at least 2, so that answers can be compared, got {config.group}")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    problem = make_asked(config, PROMPTS if prompts is None and config.data is None else prompts)
    draw = Groups(**sampling)
    limit = draw.max_new_tokens or problem.limit
    policy = make_policy(config, limit)
    policy.check_prompts(problem.train)
    scorer = Scorer(problem.rewards, config.on_reward_error, config.reward_timeout)
    temporary = out.with_name(f".tmp-{out.name}")
    rows = 0

    def progress(done: int, total: int) -> None:
        tell(f"answered {done}/{total} prompts, {rows} rows")

    try:
        with temporary.open("w", encoding="utf-8") as file:
            for row in answer_rows(
                policy,  # type: ignore[arg-type]
                problem.train,
                scorer,
                draw,
                group=config.group,
                form=form,
                limit=limit,
                seed=config.seed,
                progress=progress,
            ):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                rows += 1
        if not rows:
            raise UsageError(
                f"no row to write: the {config.group} answers to each of {len(problem.train)} prompts were equally good"
            )
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return {"out": str(out), "form": form, "rows": rows, "prompts": len(problem.train), "group": config.group}


def _target(out: str | None) -> Path:
    if out is None:
        raise UsageError("name the file to write: polopt pairs --out pairs.jsonl")
    path = Path(out)
    if path.suffix != ".jsonl":
        raise UsageError(f"--out {out}: a data set is written as .jsonl, one row per line")
    if path.exists():
        raise UsageError(f"--out {out} exists; choose another file")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {path.parent}")
    return path
