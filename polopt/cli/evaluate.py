"""``polopt eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polopt.cli.options import Groups as OptionGroups
from polopt.cli.options import Option, parse, run_options
from polopt.cli.output import check_json_path, make_console, silence_libraries, write_json
from polopt.training.config import RunConfig, make_config

DESCRIPTION = "Measure a policy on held-out prompts: accuracy with its 95% interval, pass@k, length, entropy."

PROBLEM = (
    *("model", "task", "level", "data", "eval_data", "split", "map"),
    *("reward", "on_reward_error", "reward_timeout", "eval_prompts"),
)
MACHINE = ("precision", "device", "threads", "max_rows")
SAMPLING = (
    Option("temperature", float, 1.0, "Divides the logits; 0 is greedy.", "X"),
    Option("top_p", float, 1.0, "Smallest set of tokens with this probability.", "X"),
    Option("max_new_tokens", int | None, None, "Longest completion; that of the task, or 256, when left out.", "N"),
    Option("environment", str | None, None, "What answers the policy: calculator, or file.py:function.", "NAME"),
)
OUTPUT = (
    Option("json", str | None, None, "Write the metrics to this file.", "FILE"),
    Option("verbose", bool, False, "Let the libraries below print their notices and progress."),
)


def groups() -> OptionGroups:
    """Every option by the title under which the help shows it."""
    known = run_options()
    samples = (
        Option("eval_samples", int, 1, known["eval_samples"].help, "N"),
        Option("seed", int, 0, "Of the sampling; the prompts do not depend on it.", "N"),
    )
    return {
        "output": OUTPUT,
        "policy and problem": [known[name] for name in PROBLEM],
        "sampling": (*samples, *SAMPLING),
        "machine": [known[name] for name in MACHINE],
    }


def eval_command(arguments: Sequence[str]) -> int:
    """Evaluate and print; returns the exit code.

    Raises UsageError for wrong input.
    """
    given = dict(parse("eval", DESCRIPTION, groups(), arguments).options)
    path = given.pop("json", None)
    check_json_path(path)
    if not given.pop("verbose", False):
        silence_libraries()
    sampling = {option.name: given.pop(option.name) for option in SAMPLING if option.name in given}
    config = make_config({**given, "model": model_of(given.get("model"))})
    console = make_console()
    with console.status("loading") as status:
        name, metrics = evaluate(config, sampling, status.update)
    print_metrics(console, f"{config.model or 'the shipped policy'} on {name}", metrics)
    if path is not None:
        write_json({"model": config.model, "problem": name, **metrics}, path)
    return 0


def model_of(path: str | None) -> str | None:
    """A run's folder stands for the model in it."""
    if path is not None and (Path(path) / "config.yaml").is_file() and (Path(path) / "model").is_dir():
        return str(Path(path) / "model")
    return path


def evaluate(
    config: RunConfig, sampling: Mapping[str, Any], tell: Any = lambda text: None
) -> tuple[str, dict[str, float]]:
    """Name of the problem, and metrics by name without their prefix. The prompts are those that training holds out."""
    import torch

    from polopt.rewards.scoring import Scorer
    from polopt.rollouts.groups import Groups
    from polopt.rollouts.turns import Turns
    from polopt.training.build import make_held_out, make_policy
    from polopt.training.evaluation import Evaluator
    from polopt.training.metrics_names import EVAL

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    problem = make_held_out(config)
    draw = Turns(**sampling) if sampling.get("environment") else Groups(**sampling)
    policy = make_policy(config, draw.max_new_tokens or problem.limit)
    scorer = Scorer(problem.rewards, config.on_reward_error, config.reward_timeout)
    evaluator = Evaluator(problem.held_out, scorer, draw, problem.limit, config.eval_samples, config.seed)
    metrics, _ = evaluator(policy, progress=lambda done, total: tell(f"sampling {done}/{total}"))
    return problem.name, {name.removeprefix(EVAL): value for name, value in metrics.items()}


def print_metrics(console: Console, title: str, metrics: Mapping[str, float]) -> None:
    """A table of metrics; a metric's bounds are in its own line."""
    table = Table("metric", "value", "95% interval", title=escape(title))
    for name, value in metrics.items():
        if name.endswith(("/low", "/high")):
            continue
        low, high = metrics.get(f"{name}/low"), metrics.get(f"{name}/high")
        interval = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
        table.add_row(escape(name), f"{value:.0f}" if name == "prompts" else f"{value:.4f}", interval)
    console.print(table)
