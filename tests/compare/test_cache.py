from __future__ import annotations

from pathlib import Path

import pytest

from polopt.compare import cache
from polopt.compare.cache import Cache, Key, code_version, described, key_of
from polopt.compare.plan import Plan, make_worlds, parse_contender
from polopt.methods import get_method
from tests.compare.worlds import exact_job, result


def small_job(**settings: object) -> object:
    plan = Plan((parse_contender("grpo"),), make_worlds(("arithmetic",), (), None), "rollouts", 8, settings=settings)
    return plan.job(plan.contenders[0], plan.worlds[0], 0, None)


def test_whatever_decides_a_result_is_in_its_key() -> None:
    jobs = {
        "same": exact_job(),
        "seed": exact_job(seed=1),
        "lr": exact_job(lr=0.5),
        "budget": exact_job(rollouts=64),
        "points": exact_job(points=3),
        "method": exact_job("gspo"),
        "part": exact_job("grpo+advantage=leave-one-out"),
        "field": exact_job("grpo+objective.high=0.3"),
        "problem": exact_job(problem="several-modes"),
        "option": exact_job(problem="sparse-rewards:winners=2"),
        "problems": exact_job(problem="sparse-rewards:problems=2"),
        "group": exact_job(settings={"group": 4}),
    }
    keys = {name: key_of(job).choice for name, job in jobs.items()}
    assert len(set(keys.values())) == len(keys)
    assert key_of(exact_job()) == key_of(exact_job())


def test_a_method_is_its_parts_whatever_it_is_called() -> None:
    assert key_of(exact_job("grpo+objective.high=0.2")) == key_of(exact_job("grpo --objective.high 0.2"))
    assert key_of(exact_job("grpo+objective.high=0.2")) == key_of(exact_job("grpo"))
    # An option that states the default is the default.
    assert key_of(exact_job(problem="sparse-rewards:problems=8")) == key_of(exact_job())


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    reward = tmp_path / "mine.py"
    reward.write_text("def one(completions, **_):\n    return [1.0 for _ in completions]\n")
    keys = set()
    for text in ("1.0", "2.0", "1.0"):
        reward.write_text(f"def one(completions, **_):\n    return [{text} for _ in completions]\n")
        cache._hash_path.cache_clear()
        keys.add(key_of(small_job(reward=(f"{reward}:one",))).choice)  # type: ignore[arg-type]
    assert len(keys) == 2


def test_seconds_depend_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def keys() -> tuple[str, str]:
        plan = Plan((parse_contender("grpo"),), make_worlds((), ("sparse-rewards",), None), "seconds", 1)
        timed = plan.job(plan.contenders[0], plan.worlds[0], 0, None)
        return key_of(timed).choice, key_of(exact_job()).choice

    here = keys()
    monkeypatch.setattr("polopt.compare.cache.platform.node", lambda: "elsewhere")
    assert keys()[0] != here[0] and keys()[1] == here[1]


def sources(contender: str) -> set[str]:
    job = exact_job(contender)
    return set(cache._closure(frozenset({cache.ENTRY, *cache._part_modules(job.method)})))


def test_the_code_of_a_run_is_what_it_imports_and_its_own_parts() -> None:
    ours = sources("gspo")
    for needed in (
        "polopt.methods.base.gspo",
        "polopt.advantages.group",
        "polopt.training.trainer",
        "polopt.training.collect",
        "polopt.core.segments",
        "polopt.policies.exact.tree",
        "polopt.tasks.problems",
        "polopt.rewards.reward",
    ):
        assert needed in ours
    # Adding or changing another method runs nothing again.
    assert not any(name.startswith("polopt.methods") for name in sources("grpo"))
    assert not {"polopt.methods.base.dapo", "polopt.training.report", "polopt.cli.main"} & ours


def test_another_version_of_a_part_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: code_version(exact_job(name)) for name in ("grpo", "gspo")}
    original = cache._hash_code

    def changed(path: Path) -> str:
        return original(path) + ("changed" if path.name == "gspo.py" else "")

    monkeypatch.setattr(cache, "_hash_code", changed)
    assert code_version(exact_job("grpo")) == before["grpo"]
    assert code_version(exact_job("gspo")) != before["gspo"]


def test_comments_and_docstrings_are_not_code(tmp_path: Path) -> None:
    texts = (
        '"""One."""\n\ndef f(x):\n    """Two."""\n    return x + 1\n',
        '"""Other."""\n\n\ndef f(x):\n    # why\n    return (x + 1)\n',
        '"""One."""\n\ndef f(x):\n    """Two."""\n    return x + 2\n',
    )
    hashes = []
    for index, text in enumerate(texts):
        path = tmp_path / f"{index}.py"
        path.write_text(text)
        hashes.append(cache._hash_code(path))
    assert hashes[0] == hashes[1] != hashes[2]


def test_parts_are_described_with_every_field() -> None:
    parts = {str(slot): described(value) for slot, value in get_method("dapo").slots().items()}
    assert parts["objective"] == {
        "class": "polopt.objectives.clipped_surrogate.ClippedSurrogate",
        "low": 0.2,
        "high": 0.28,
    } | {k: v for k, v in parts["objective"].items() if k not in ("class", "low", "high")}
    assert parts["filter"]["rounds"] == 8 and parts["filter"]["column"] == "score"
    assert "order" not in parts["curriculum"]  # state of a run


def test_results_come_back_whole_or_not_at_all(tmp_path: Path) -> None:
    kept, key = Cache(tmp_path / "cache"), Key("a" * 32, "b" * 16)
    assert kept.get(key) is None
    kept.put(key, exact_job(), result((0.1, 0.9), (0, 8)))
    assert kept.get(key) == result((0.1, 0.9), (0, 8))
    assert kept.get(Key("a" * 32, "c" * 16)) is None
    (path,) = kept.folder.iterdir()
    path.write_text(path.read_text()[:100])
    assert kept.get(key) is None
    path.write_text("[]")
    assert kept.get(key) is None


def test_results_of_other_code_are_taken_only_when_asked(tmp_path: Path) -> None:
    Cache(tmp_path).put(Key("a" * 32, "old"), exact_job(), result((0.1, 0.9), (0, 8)))
    new = Key("a" * 32, "new")
    assert Cache(tmp_path).get(new) is None
    assert Cache(tmp_path, any_version=True).get(new) == result((0.1, 0.9), (0, 8))
    assert Cache(tmp_path, any_version=True).get(Key("d" * 32, "new")) is None
