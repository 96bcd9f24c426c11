"""Every registered claim: where its file is, and that its code runs."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

import polopt
from polopt.assets import base_policy_path
from polopt.claims import claims, claims_of
from polopt.claims.claim import Claim
from polopt.core.errors import UsageError
from polopt.methods import methods

ROOT = Path(polopt.__file__).parent
ALL = [claim for members in claims().values() for claim in members]
MEASURES = list(dict.fromkeys((claim.slug, claim.world, claim.measure) for claim in ALL if claim.measure))


def test_claims_mirror_methods() -> None:
    files = sorted(p.relative_to(ROOT / "claims") for p in (ROOT / "claims").glob("*/[!_]*.py"))
    for file in files:
        assert (ROOT / "methods" / file).is_file(), f"claims/{file} has no method beside it"
    assert {p.stem.replace("_", "-") for p in files} == set(claims())
    for slug, members in claims().items():
        assert members and slug in methods()


def test_every_base_method_has_its_claims() -> None:
    assert {slug for slug, method in methods().items() if method.family == "base"} <= set(claims())


@pytest.mark.parametrize("slug", list(claims()))
def test_the_design_is_written_down(slug: str) -> None:
    family = methods()[slug].family
    doc = importlib.import_module(f"polopt.claims.{family.replace('-', '_')}.{slug.replace('-', '_')}").__doc__ or ""
    paper = methods()[slug].paper.removeprefix("arXiv:").split()[-1]
    assert paper in doc and "Design, fixed before the first run" in doc


@pytest.mark.parametrize("claim", ALL, ids=lambda c: f"{c.slug}/{c.name}")
def test_a_statement_is_a_sentence_and_a_name_a_word(claim: Claim) -> None:
    assert claim.statement.endswith(".") and ". " not in claim.statement.replace("Dr. ", "")
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", claim.name)
    assert claim.baseline and claim.metric


def test_an_unknown_slug_is_named() -> None:
    with pytest.raises(UsageError, match="no claim of 'grpoo'; did you mean 'grpo'"):
        claims_of("grpoo")


@pytest.mark.parametrize(
    ("slug", "world", "measure"), MEASURES, ids=[f"{slug}/{m.__name__}" for slug, _, m in MEASURES]
)
def test_every_measure_runs(slug: str, world: str, measure: object) -> None:
    if world == "small" and not (base_policy_path() / "model.safetensors").is_file():
        pytest.skip("the base policy is not built")
    assert callable(measure)
    found: Mapping[str, float] = measure(0, True)
    assert all(math.isfinite(value) for value in found.values())
    for claim in claims_of(slug):
        if claim.measure is measure:
            assert claim.treatment in found
            assert claim.control is None or claim.control in found
    if world == "exact":
        assert dict(measure(0, True)) == found, "a measure is a function of its seed"


def test_the_documented_claim_runs() -> None:
    page = (ROOT.parent / "docs" / "claims.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict[str, object] = {}
    exec(compile(code, "documented", "exec"), found)
    (outcome,) = found["outcomes"]  # type: ignore[misc]
    assert outcome.seeds == 2 and outcome.effect == outcome.treatment - outcome.control
