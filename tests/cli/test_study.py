from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import polopt.claims
from polopt.claims.claim import Claim
from polopt.claims.study import Curves, Effects, Study
from tests.cli.conftest import Result


def counted(seed: int, quick: bool) -> Mapping[str, float]:
    return {"new": 1.0 + seed / 100, "old": 0.5, "later": 2.0}


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that costs nothing, in the place of the claims of GRPO."""
    members = (
        Claim("grpo", "helps", "It helps [a lot].", "exact", "nothing", "use", "higher", "new", "old", measure=counted),
        Claim("grpo", "far", "It helps <far>.", "exact", "nothing", "use", "higher", untestable="it is far away"),
    )
    study = Study(
        "A study of [it]",
        "Does it help & how?",
        (
            Curves("Curve", "x", "use", counted, {"ours": [(1, "new"), (2, "later")]}),
            Effects("Effects", "use", counted, {"later - old": ("later", "old")}),
        ),
    )
    monkeypatch.setattr(polopt.claims, "claims", lambda: {"grpo": members})
    monkeypatch.setattr(polopt.claims, "studies", lambda: {"grpo": study})


def test_studies_are_listed(run: Callable[..., Result]) -> None:
    result = run("study")
    assert result.code == 0
    for slug in polopt.claims.studies():
        assert slug in result.out


@pytest.mark.usefixtures("one")
def test_a_study_writes_its_page_figure_and_numbers(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("study", "grpo", "--out", "found")
    assert result.code == 0, result.err
    assert "It helps [a lot]." in result.out and "reproduced" in result.out and "later - old" in result.out
    assert {p.name for p in (tmp_path / "found").iterdir()} == {"index.html", "study.png", "study.json"}
    page = (tmp_path / "found" / "index.html").read_text()
    for text in ("It helps &lt;far&gt;.", "it is far away", "Does it help &amp; how?", "data:image/png", "+1.500"):
        assert text in page, text
    assert "Design, fixed before the first run" in page and "polopt study grpo" in page
    numbers = json.loads((tmp_path / "found" / "study.json").read_text())
    assert [claim["verdict"] for claim in numbers["claims"]] == ["reproduced", "not testable here"]
    assert len(numbers["measurements"]["counted"]) == 12 and numbers["command"] == "polopt study grpo"
    assert not (tmp_path / "claims").exists()


@pytest.mark.usefixtures("one")
def test_quick_judges_nothing(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("study", "grpo", "--quick")
    assert result.code == 0 and "not judged" in result.out and "reproduced" not in result.out
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("study-grpo-") and "reproduced<" not in (folder / "index.html").read_text()


@pytest.mark.usefixtures("one")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "there is no study 'nonsense'; there are grpo"),
        (("grpo", "--seeds", 3), "needs at least 10 seeds, got --seeds 3"),
        (("grpo", "--seeds", 0), "--seeds must be at least 1, got 0"),
        (("grpo", "--sedes", 3), "unknown option --sedes; did you mean --seeds"),
        (("grpo", "--out", "file"), "--out file is a file; name a folder"),
    ],
)
def test_wrong_input_is_one_line_and_measures_nothing(
    run: Callable[..., Result], arguments: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    result = run("study", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err and len(result.err.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("one")
def test_a_study_of_one_world(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def other(seed: int, quick: bool) -> Mapping[str, float]:
        raise AssertionError("the small world was not asked for")

    away = Claim("grpo", "small", "In the small one.", "small", "nothing", "use", "higher", "new", "old", measure=other)
    members = (*polopt.claims.claims_of("grpo"), away)
    monkeypatch.setattr(polopt.claims, "claims", lambda: {"grpo": members})
    result = run("study", "grpo", "--world", "exact", "--out", "found")
    assert result.code == 0, result.err
    assert "It helps [a lot]." in result.out and "In the small one." not in result.out
    result = run("study", "grpo", "--world", "large", "--out", "large")
    assert result.code == 2 and "the worlds are exact and small" in result.err and not Path("large").exists()
