from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from polopt.training.profile import Profiler


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_nested_phases_are_exclusive_and_add_up() -> None:
    clock = Clock()
    profiler = Profiler(clock=clock)
    with profiler.phase("update"):
        clock.now += 1
        with profiler.phase("evaluate"):
            clock.now += 10
            with profiler.phase("reward"):
                clock.now += 100
        clock.now += 2
        with profiler.phase("evaluate"):
            clock.now += 20
    clock.now += 1000
    assert profiler.seconds() == {"reward": 100, "evaluate": 30, "update": 3, "other": 1000}


Tree = list[tuple[str, Any]]
trees: st.SearchStrategy[Tree] = st.recursive(
    st.just([]), lambda inner: st.lists(st.tuples(st.sampled_from("abc"), inner), max_size=3)
)


@given(tree=trees)
def test_every_second_is_charged_once_to_the_innermost_phase(tree: Tree) -> None:
    clock, charged = Clock(), {"a": 0.0, "b": 0.0, "c": 0.0, "other": 0.0}
    profiler = Profiler(clock=clock)

    def play(name: str, children: Tree) -> None:
        clock.now += 1
        charged[name] += 1
        for child, grandchildren in children:
            with profiler.phase(child):
                play(child, grandchildren)
            clock.now += 1
            charged[name] += 1

    play("other", tree)
    assert profiler.seconds() == pytest.approx({name: s for name, s in charged.items() if s})


def test_a_phase_that_raises_is_closed() -> None:
    clock = Clock()
    profiler = Profiler(clock=clock)
    with pytest.raises(KeyError), profiler.phase("sample"), profiler.phase("reward"):
        clock.now += 2
        raise KeyError
    with profiler.phase("update"):
        clock.now += 3
    assert profiler.seconds() == {"sample": 0, "reward": 2, "update": 3, "other": 0}


def test_the_device_is_waited_for_at_both_ends() -> None:
    clock = Clock()

    def synchronize() -> None:
        clock.now += 5

    profiler = Profiler(clock=clock, synchronize=synchronize)
    with profiler.phase("sample"):
        clock.now += 1
    assert profiler.seconds() == {"sample": 6, "other": 5}


def test_off_it_records_nothing_and_costs_next_to_nothing(tmp_path: Path) -> None:
    profiler = Profiler(enabled=False)
    begin = time.perf_counter()
    for _ in range(10_000):
        with profiler.phase("sample"):
            pass
    assert (time.perf_counter() - begin) / 10_000 < 1e-5
    assert profiler.seconds() == {} and profiler.write(tmp_path) is None and list(tmp_path.iterdir()) == []


def test_files_and_table(tmp_path: Path) -> None:
    clock = Clock()
    profiler = Profiler(trace=True, clock=clock)
    clock.now += 0.25
    with profiler.phase("sample"):
        clock.now += 1
        with profiler.phase("reward"):
            clock.now += 0.5
    clock.now += 0.25
    profiler.write(tmp_path)
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert profile["total_seconds"] == pytest.approx(2.0)
    assert profile["seconds"] == pytest.approx({"sample": 1.0, "reward": 0.5, "other": 0.5})
    assert profile["calls"] == {"reward": 1, "sample": 1}
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    shown = [(e["name"], e["ph"], round(e["ts"]), round(e["dur"])) for e in events]
    assert shown == [("sample", "X", 250_000, 1_500_000), ("reward", "X", 1_250_000, 500_000)]
    assert all({"pid", "tid"} <= set(event) for event in events)
    console = Console(width=80, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    console.print(profiler.table())
    text = console.export_text()
    assert "sample" in text and "50%" in text and text.count("25%") == 2
