"""Code in the documentation runs, and links lead somewhere."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from polopt.core import registry
from polopt.core.part import named_parts

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def run(code: str) -> dict[str, Any]:
    module = sys.modules["documented"] = types.ModuleType("documented")
    exec(compile(code, "documented", "exec"), module.__dict__)
    return module.__dict__


def test_the_readme_s_mathematics_runs_in_any_trainer() -> None:
    torch.manual_seed(0)
    found = run(next(code for code in blocks(ROOT / "README.md") if "from_padded" in code))
    slope = found["logp"].grad
    # GSPO at ratio 1 is -A_i / (M |y_i|); the z-score of (1, 0) is +-1/sqrt(2), and the padding gets nothing.
    assert torch.allclose(slope[0], torch.full((3,), -(0.5**0.5) / 6), atol=1e-4)
    assert torch.allclose(slope[1], torch.tensor([0.5**0.5 / 4, 0.5**0.5 / 4, 0.0]), atol=1e-4)


def test_the_documented_method_is_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    try:
        found = run(blocks(ROOT / "docs" / "methods.md")[0])
        assert found["max_baseline"].advantage.scale == 1.0
    finally:
        named_parts("advantage").pop("max-baseline", None)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_files_exist(page: Path) -> None:
    for name in re.findall(r"`(polopt/[\w/.]+\.py)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), f"{page.name} names {name}, which does not exist"
