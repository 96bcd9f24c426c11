"""A run that is killed at any moment and resumed is the run that was never killed, to the bit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.victim import DEATHS

STEPS = 6
KILLS = 10
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {}),
    # A moving average as part state, a reference model that is refreshed, a coefficient that is controlled.
    "reinforce": (
        "reinforce",
        {
            "advantage.baseline": "moving-average",
            "controller": "adaptive-kl",
            "controller.horizon": 20.0,
            "controller.target": 0.01,
            "models.ref.every": 2,
        },
    ),
    # A critic, a reference, two epochs of two minibatches.
    "ppo": ("ppo", {"schedule.epochs": 2, "schedule.minibatches": 2}),
}

TRIES = 12
"""Moments tried for one kill."""


class Victims:
    """Runs in processes of their own."""

    def __init__(self, root: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.victim"],
            cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.errors: list[str] = []
        threading.Thread(target=self._drain, daemon=True).start()
        assert self._answer() == "ready\n"

    def __call__(
        self, config: dict[str, Any], *, resume: bool = False, after: float | None = None, dies: str | None = None
    ) -> tuple[int, float]:
        """Run to the end, or until killed ``after`` so many seconds; the exit status and the seconds it lived."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"config": config, "resume": resume, "dies": dies}) + "\n")
        self.process.stdin.flush()
        victim = int(self._answer())
        timer = threading.Timer(after or 0.0, self._kill, [victim])
        if after is not None:
            timer.start()
        status, seconds = json.loads(self._answer())
        timer.cancel()
        assert status in (0, -signal.SIGKILL), "".join(self.errors)
        return status, seconds

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        # Anything else that a run prints is not ours.
        while line and line != "ready\n" and line[0] not in "0123456789[":
            line = self.process.stdout.readline()
        assert line, "".join(self.errors)
        return line

    def _drain(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)

    @staticmethod
    def _kill(victim: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(victim, signal.SIGKILL)


@pytest.fixture(scope="module")
def victims() -> Iterator[Victims]:
    found = Victims(Path(__file__).parents[2])
    yield found
    found.close()


@pytest.fixture(scope="module")
def settings(small_run: Any) -> Callable[[str, Path], dict[str, Any]]:
    def make(variant: str, out: Path, **options: Any) -> dict[str, Any]:
        method, slots = VARIANTS[variant]
        defaults = {"steps": STEPS, "save_every": "1", "eval_every": "3"}
        return small_run(out, slots, method=method, **(defaults | options)).as_dict()

    return make


@pytest.fixture(scope="module")
def whole(
    victims: Victims, settings: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, float]]:
    """An uninterrupted run of a variant and how long it takes."""
    known: dict[str, tuple[Path, float]] = {}

    def make(variant: str) -> tuple[Path, float]:
        if variant not in known:
            out = tmp_path_factory.mktemp("whole") / variant
            status, seconds = victims(settings(variant, out))
            assert status == 0
            known[variant] = out, seconds
        return known[variant]

    return make


def same_run(found: Path, expected: Path) -> None:
    assert (found / "log.jsonl").read_bytes() == (expected / "log.jsonl").read_bytes()
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (found, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (found, expected)]
    for summary in summaries:
        for clock in ("seconds", "peak_rss_mb", "run"):
            del summary[clock]
    assert summaries[0] == summaries[1]


def test_the_uninterrupted_run_learns(whole: Any, model_folder: Path) -> None:
    # Else equal weights would say nothing.
    for variant in VARIANTS:
        run, _ = whole(variant)
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
        before, after = (load_file(p / "model.safetensors") for p in (model_folder, run / "model"))
        assert all(not torch.equal(before[name], after[name]) for name in before)
    lines = [json.loads(line) for line in (whole("reinforce")[0] / "log.jsonl").read_text().splitlines()]
    assert len({line["controller/reward.beta"] for line in lines if "loss" in line}) == STEPS


@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_random_kills_change_nothing(
    variant: str, victims: Victims, settings: Any, whole: Any, tmp_path: Path
) -> None:
    expected, seconds = whole(variant)
    draws = random.Random(f"kill {variant}")
    # One moment in each tenth of the run. Where the first kill hits, every other resumption is killed again.
    for index in range(KILLS):
        for attempt in range(TRIES):
            out = tmp_path / f"{index}-{attempt}"
            config = settings(variant, out)
            # A run that ended before its moment was faster than the one that was measured; the next moment is earlier.
            moment = seconds * (index + draws.random()) / KILLS * 0.8**attempt
            status, _ = victims(config, after=moment)
            if status:
                break
            same_run(out, expected)
        assert status == -signal.SIGKILL, f"no run lived until its moment, the last one {moment:.3f} s"
        again: float | None = seconds * draws.uniform(0.1, 0.6) if index % 3 == 2 else None
        while status:
            # Killed before anything was written, there is nothing to resume: the run is started again.
            status, _ = victims(config, resume=(out / "config.yaml").exists(), after=again)
            again = None
        same_run(out, expected)


@pytest.mark.parametrize("death", DEATHS)
def test_a_kill_at_the_worst_moment_changes_nothing(
    death: str, victims: Victims, settings: Any, whole: Any, tmp_path: Path
) -> None:
    expected, _ = whole("reinforce")
    config = settings("reinforce", tmp_path / "run")
    status, _ = victims(config, dies=death)
    assert status == -signal.SIGKILL, "the run was to die"
    settled = (tmp_path / "run" / "config.yaml").exists()
    assert settled == (death != "settling")  # before that there is nothing to resume: the run is started again
    status, _ = victims(config, resume=settled)
    assert status == 0
    same_run(tmp_path / "run", expected)


def test_a_run_without_checkpoints_starts_over(victims: Victims, settings: Any, whole: Any, tmp_path: Path) -> None:
    expected, _ = whole("reinforce")
    config = settings("reinforce", tmp_path / "run", save_every=None)
    assert victims(config, dies="middle_of_the_log")[0] == -signal.SIGKILL
    assert victims(config, resume=True)[0] == 0
    same_run(tmp_path / "run", expected)
