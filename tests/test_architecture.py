"""Dependencies point one way; core and parts know no models; a method's file names its paper."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

import pytest

import polopt
from polopt.methods import PARTS, methods

ROOT = Path(polopt.__file__).parent
LAYERS = [
    {"core"},
    {"policies", "tasks", "assets", *PARTS},
    {"methods"},
    {"training"},
    {"engines", "compare", "claims", "diagnosis"},
    {"cli"},
]
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT)


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_points_back(path: Path) -> None:
    here = RANK[room(path)]
    for name in imports(path):
        if name.startswith("polopt."):
            there = RANK[name.split(".")[1]]
            assert there <= here, f"{path} imports {name}, which lies further out"


@pytest.mark.parametrize("path", [p for p in FILES if room(p) in {"core", *PARTS, "methods"}], ids=lambda p: p.stem)
def test_core_parts_and_methods_know_no_models(path: Path) -> None:
    for name in imports(path):
        assert name.split(".")[0] not in {"transformers", "peft", "datasets", "tokenizers"}, f"{path} imports {name}"


def test_no_file_outside_its_own_branches_on_a_method_name() -> None:
    slugs = set(methods())
    for path in FILES:
        if room(path) == "methods":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                names = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
                assert not names & slugs, f"{path}:{node.lineno} compares with a method's slug"


@pytest.mark.parametrize("family", sorted({method.family for method in methods().values()}))
def test_method_files_are_short(family: str) -> None:
    files = (ROOT / "methods" / family.replace("-", "_")).glob("[!_]*.py")
    assert statistics.median(len(p.read_text(encoding="utf-8").splitlines()) for p in files) <= 80


def test_every_method_has_its_test_and_cites_its_paper() -> None:
    tests = Path(__file__).parent / "methods"
    for slug, method in methods().items():
        assert (tests / f"test_{slug.replace('-', '_')}.py").is_file(), f"{slug} has no test file"
        assert method.paper, f"{slug} names no paper"
        assert method.paper.removeprefix("arXiv:").split()[-1] in method.doc, (
            f"{slug}'s docstring does not cite {method.paper}"
        )
