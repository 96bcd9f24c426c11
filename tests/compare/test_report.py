from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from polopt.compare import figure
from polopt.compare.figure import apart, plot_report
from polopt.compare.leaderboard import PROBLEMS, TASKS, fitting, make_page, ordered
from polopt.compare.page import write_page
from polopt.compare.plan import make_worlds
from polopt.compare.report import Report, as_dict, curve, has_collapsed, make_report
from polopt.compare.words import duration, edges, headline, lines, title_of
from polopt.methods import get_method, methods
from tests.compare.worlds import comparison, exact_plan, result

FINALS = {"grpo": (0.5, 0.6, 0.7, 0.8), "gspo": (0.7, 0.82, 0.9, 0.98), "dapo": (0.5, 0.63, 0.69, 0.8)}


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report(comparison(exact_plan("grpo", "gspo", "dapo", seeds=4), FINALS))


def test_scores_and_differences(report: Report) -> None:
    grpo, gspo, dapo = report.entries
    assert grpo.mean.mean == pytest.approx(0.65) and grpo.versus is None
    assert gspo.iqm.mean == pytest.approx((0.82 + 0.9) / 2)
    assert gspo.versus is not None and dapo.versus is not None
    oracle = stats.ttest_rel(FINALS["gspo"], FINALS["grpo"]).confidence_interval(0.95)
    assert gspo.versus.difference.mean == pytest.approx(0.2)
    assert (gspo.versus.difference.low, gspo.versus.difference.high) == pytest.approx((oracle.low, oracle.high))
    assert (gspo.versus.verdict, dapo.versus.verdict) == ("better", "unclear")
    wins = [(x > y) + 0.5 * (x == y) for x in FINALS["gspo"] for y in FINALS["grpo"]]
    assert gspo.versus.improvement.mean == pytest.approx(np.mean(wins))
    assert report.before == {"sparse-rewards": pytest.approx(0.2)}


def test_a_method_that_is_worse_is_called_worse() -> None:
    made = make_report(comparison(exact_plan("gspo", "grpo", seeds=4), {k: FINALS[k] for k in ("gspo", "grpo")}))
    assert made.entries[1].versus is not None and made.entries[1].versus.verdict == "worse"
    assert headline(made).startswith("grpo (-0.200")


def test_area_and_rollouts_to_the_baselines_final_score(report: Report) -> None:
    grpo, gspo, _ = report.entries
    # Straight from 0.2 to the final score: the mean height is half way.
    assert gspo.area.mean == pytest.approx((0.2 + 0.85) / 2)
    # The target is 0.65; a run that rises by d in 128 rollouts is there after 128 * 0.45 / d.
    assert gspo.to_target.rollouts == pytest.approx(np.median([128 * 0.45 / (x - 0.2) for x in FINALS["gspo"]]))
    assert (gspo.to_target.reached, gspo.to_target.runs) == (4, 4)
    assert (grpo.to_target.reached, grpo.to_target.runs) == (2, 4)


def test_a_target_may_be_given() -> None:
    made = make_report(comparison(exact_plan("grpo", "gspo", seeds=4), FINALS), target=0.95)
    assert made.entries[0].to_target.reached == 0 and made.entries[0].to_target.rollouts == math.inf
    assert made.entries[1].to_target.reached == 1


def test_what_a_run_spends_beyond_its_budget_does_not_count_for_the_area() -> None:
    plan = exact_plan("grpo", "gspo", seeds=1)
    made = comparison(plan, {"grpo": (0.5,), "gspo": (0.5,)})
    beyond = result((0.0, 1.0, 3.0), (0, 64, 192))
    made = type(made)(plan, {**made.results, ("gspo", "sparse-rewards"): [beyond]}, made.rates)
    # At 128 rollouts the curve is at 2.
    assert make_report(made).entries[1].area.mean == pytest.approx((0.5 * 64 + 1.5 * 64) / 128)


def test_curves_are_means_over_seeds_at_equal_shares_of_the_budget() -> None:
    found = curve([result((0.0, 1.0), (0, 100)), result((0.0, 0.2, 1.0), (0, 100, 200))], "score", 0.95)
    assert found.x == (0, 75, 150)
    assert found.mean == pytest.approx((0.0, 0.35, 1.0))
    assert all(low <= mean <= high for low, mean, high in zip(found.low, found.mean, found.high, strict=True))


def test_the_numbers_are_json(report: Report) -> None:
    found = json.loads(json.dumps(as_dict(report, command="polopt compare grpo gspo dapo")))
    assert [entry["verdict"] for entry in found["contenders"]] == [None, "better", "unclear"]
    assert len(found["runs"]) == 12 and found["runs"][5]["contender"] == "gspo" and found["runs"][5]["seed"] == 1
    assert found["cost"] == {"runs": 4, "reused": 2, "seconds": 65.0, "run_seconds": 36.0}
    assert found["contenders"][0]["parts"]["advantage"].startswith("group-zscore(")


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("problems", [("sparse-rewards",), ("sparse-rewards", "binary-verifier")])
def test_the_page_needs_nothing_else_and_says_everything(tmp_path: Path, problems: tuple[str, ...]) -> None:
    contender = "grpo+objective.high=0.28"
    finals = {"grpo": FINALS["grpo"], contender: FINALS["gspo"]}
    made = make_report(comparison(exact_plan(*finals, seeds=4, problems=problems), finals), target=0.6)
    plot_report(made, title_of(made), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = tmp_path / "index.html"
    command = "polopt compare grpo 'grpo --objective.high 0.28' <&>"
    write_page(made, page, figure=tmp_path / "curves.png", command=command, settings={"group": 8}, made={"torch": "2"})
    parser = Links()
    parser.feed(page.read_text())
    assert len(parser.addresses) == 1 and parser.addresses[0].startswith("data:image/png;base64,")
    assert not parser.open
    for said in (command, contender, "+0.200", "better", "[0.", "high=0.28", "rollouts to 0.6", "the same"):
        assert said in parser.text
    assert ("World by world" in parser.text) == (len(problems) > 1)


def test_words(report: Report) -> None:
    assert title_of(report) == "grpo, gspo, dapo on sparse-rewards: 128 rollouts, 4 seeds"
    assert headline(report).startswith("gspo (+0.200 [0.")
    assert "No clear difference to grpo: dapo (+0.005 [" in headline(report)
    assert edges(report) == ""
    assert lines("grpo+advantage=rloo+objective.high=1") == "grpo\n+advantage=rloo\n+objective.high=1"
    assert [duration(s) for s in (4.25, 42, 200, 3900, math.nan)] == ["4.2 s", "42 s", "3 min 20 s", "1 h 5 min", "?"]


def test_one_seed_says_that_it_tells_nothing() -> None:
    made = make_report(comparison(exact_plan("grpo", "gspo", seeds=1), {"grpo": (0.5,), "gspo": (0.9,)}))
    assert made.entries[1].versus is not None and made.entries[1].versus.verdict == "unclear"
    assert headline(made).startswith("1 seed cannot tell a difference from chance")


def test_two_seeds_call_nothing_even_where_their_differences_are_equal() -> None:
    finals = {"grpo": (0.5, 0.6), "gspo": (0.6, 0.7)}
    versus = make_report(comparison(exact_plan("grpo", "gspo", seeds=2), finals)).entries[1].versus
    assert versus is not None and versus.difference.low == pytest.approx(0.1) and versus.verdict == "unclear"
    three = {label: (*scores, scores[0]) for label, scores in finals.items()}
    versus = make_report(comparison(exact_plan("grpo", "gspo", seeds=3), three)).entries[1].versus
    assert versus is not None and versus.verdict == "better"


def test_rates_at_the_edge_of_what_was_tried_are_said() -> None:
    plan = exact_plan("grpo", "gspo", seeds=4, tune=(0.01, 0.03))
    assert "smallest or largest tried for grpo, gspo" in edges(make_report(comparison(plan, FINALS)))
    wider = exact_plan("grpo", "gspo", seeds=4, tune=(0.01, 0.03, 0.1))
    assert edges(make_report(comparison(wider, FINALS))) == ""


def test_the_leaderboard_is_one_table_with_its_command(report: Report) -> None:
    text = make_page(report, report, command="polopt leaderboard", made={"polopt": "1"}, left_out={"dpo": "why"})
    assert "```bash\npolopt leaderboard\n```" in text and "`dpo`" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    for table in tables:
        assert len({row.count("|") for row in table.splitlines()}) == 1
    rows = [row.split("|")[1].strip() for row in tables[0].splitlines()[2:]]
    assert rows == ["`gspo`", "`dapo`", "`grpo`"] == [f"`{label}`" for label in ordered(report, None)]
    assert "**+0.200 [" in tables[0] and "| +0.005 [" in tables[0]
    assert "| small world | 128 rollouts | 4 seeds | 0.03 | 12 | 1,536 | 36 s |" in text
    alone = make_page(None, report, command="x", made={}, left_out={})
    assert "Small world" not in alone


def test_every_method_that_can_be_compared_is_on_the_leaderboard() -> None:
    fit, others = fitting()
    assert {label.partition("+")[0] for label in fit} | set(others) == set(methods()) and "grpo" in fit
    assert all(get_method(label).offline is False for label in fit if "+" not in label)
    assert "dpo+pairs=on-policy" in fit and "no policy" in others["reward-model"]
    assert len(TASKS) == 3 and len(PROBLEMS) >= 3


# --- staleness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "collapsed"),
    [
        ((0.2, 0.8, 0.49), True),
        ((0.2, 0.8, 0.51), False),
        ((0.2, 0.8, 0.1), True),
        ((0.2, 0.24, 0.1), False),  # nothing to lose
        ((0.2, 0.1, 0.0), False),
        ((0.2, 0.5, 0.9), False),
        ((0.2,), False),
    ],
)
def test_a_run_collapsed_where_it_lost_half_of_its_gain(scores: tuple[float, ...], collapsed: bool) -> None:
    assert has_collapsed(result(scores, range(len(scores)))) is collapsed


def test_the_staleness_figure_shows_every_method_and_who_collapsed(tmp_path: Path) -> None:
    plan = dataclasses.replace(
        exact_plan("grpo", "gspo", seeds=2),
        worlds=make_worlds((), ("sparse-rewards",), None, stale=(0, 4, 16)),
    )
    made = comparison(plan, {"grpo": (0.6, 0.7), "gspo": (0.8, 0.9)})
    fallen = [result((0.2, 0.7, 0.3), (0, 64, 128)), result((0.2, 0.8, 0.9), (0, 64, 128))]
    made = dataclasses.replace(made, results={**made.results, ("grpo", "sparse-rewards stale 16"): fallen})
    report = make_report(made)
    grpo, gspo = report.entries
    assert list(grpo.collapsed.values()) == [0, 0, 1] and list(gspo.collapsed.values()) == [0, 0, 0]
    assert title_of(report).startswith("grpo, gspo on sparse-rewards 0 / 4 / 16 updates stale: ")

    axis = Figure().add_subplot()
    figure._staleness(axis, report, "sparse-rewards", figure.colour_of(report))
    assert [text.get_text() for text in axis.texts] == ["before training", "grpo", "gspo"]
    courses = [list(line.get_ydata()) for line in axis.lines if line.get_marker() == "o"]
    assert courses == [pytest.approx([0.65, 0.65, 0.6]), pytest.approx([0.85, 0.85, 0.85])]
    crosses = [(list(x.get_xdata()), list(x.get_ydata())) for x in axis.lines if x.get_marker() == "X"]
    assert crosses == [([2], [pytest.approx(0.6)]), ([], [])]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "4", "16"]

    plot_report(report, title_of(report), tmp_path / "stale.png")
    write_page(report, tmp_path / "page.html", figure=tmp_path / "stale.png", command="", settings={}, made={})
    page = (tmp_path / "page.html").read_text()
    assert page.count("1 collapsed") == 1


def test_names_beside_lines_keep_apart() -> None:
    assert apart([0.5, 0.1, 0.9], 0.2) == pytest.approx([0.5, 0.1, 0.9])
    assert apart([0.5, 0.45, 0.55], 0.1) == pytest.approx([0.5, 0.4, 0.6])
    assert apart([1.0, 0.99], 0.2) == pytest.approx([1.0, 0.8])
    assert apart([0.0, 0.0], 0.3) == pytest.approx([0.0, 0.3])


def test_every_contender_has_a_colour_of_its_own() -> None:
    assert len(set(figure.COLOURS)) == len(figure.COLOURS) >= 16
