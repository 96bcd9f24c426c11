"""The picture is drawn whatever was measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from polopt.diagnosis.diagnose import diagnose
from polopt.diagnosis.plot import plot_diagnosis
from polopt.methods import get_method
from polopt.policies.exact import SequenceSpace
from polopt.tasks.problems import problem


@pytest.mark.parametrize("size", [1, 2])
def test_one_method_many_methods_and_methods_without_gradient(size: int, tmp_path: Path) -> None:
    made = problem("binary-verifier", space=SequenceSpace(2, 1), pass_rate=0.3)
    made = dataclasses.replace(made, group_sizes=(size,))
    found = diagnose(get_method("dapo"), made, seconds=0.1)
    plot_diagnosis({"dapo": found}, "one", tmp_path / "one.png")
    bare = dataclasses.replace(found, curve=None, fixed_point=None)
    plot_diagnosis({f"method {i}": bare for i in range(9)}, "many", tmp_path / "deep" / "many.png")
    for path in (tmp_path / "one.png", tmp_path / "deep" / "many.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
