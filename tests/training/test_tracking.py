from __future__ import annotations

import json
import math
import random
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polopt.core.errors import UsageError
from polopt.training import metrics_names
from polopt.training.trackers.base import Rows
from polopt.training.tracking import JsonlTracker, Trackers, is_clock, make_trackers, read_jsonl, redact

Metrics = dict[str, float]


def metrics(step: int) -> Metrics:
    rng = random.Random(step)
    return {"reward": rng.random(), "kl": rng.random() * 1e-9, "num_tokens": 17 * step, "step_time": random.random()}


def test_metrics_are_lines_with_the_step_first(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    tracker.start({}, resume=False)
    tracker.log(3, {"reward": 0.1, "num_tokens": 12, "step_time": 0.5, "time/sample": 0.25})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 3, "reward": 0.1, "num_tokens": 12}\n'
    assert (tmp_path / "timing.jsonl").read_text() == '{"step": 3, "step_time": 0.5, "time/sample": 0.25}\n'


@given(value=st.floats())
def test_a_logged_float_is_read_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    run = tmp_path_factory.mktemp("run")
    tracker = JsonlTracker(run)
    tracker.start({}, resume=False)
    tracker.log(1, {"x": value})
    json.loads((run / "log.jsonl").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (line,) = read_jsonl(run / "log.jsonl")
    assert line == {"step": 1, "x": value} or (math.isnan(value) and math.isnan(line["x"]))


def test_numbers_of_any_library_are_logged(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    tracker.start({}, resume=False)
    values: dict[str, Any] = {"a": np.float32(0.5), "b": torch.tensor(0.25), "c": np.int64(3), "d": True}
    tracker.log(1, values)
    assert read_jsonl(tmp_path / "log.jsonl") == [{"step": 1, "a": 0.5, "b": 0.25, "c": 3, "d": 1}]
    with pytest.raises(TypeError, match="'worst'"):
        tracker.log(2, {"worst": "bad"})  # type: ignore[dict-item]


def run_steps(run: Path, first: int, last: int, resume: bool, state: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Log steps and return the state after each; leaves everything open as a kill does."""
    trackers = make_trackers([], run)
    trackers.start({"seed": 0}, resume=resume)
    if state is not None:
        trackers.load_state_dict(state)
    states = []
    for step in range(first, last + 1):
        trackers.log(step, metrics(step))
        if step % 4 == 0:
            trackers.text(step, "samples", [{"prompt": f"{step}?", "reward": float("nan")}])
        states.append(json.loads(json.dumps(trackers.state_dict())))
    return states


@pytest.mark.parametrize("torn", [b"", b'{"step": 99, "rew'])
@pytest.mark.parametrize("checkpoint", [0, 1, 5, 9])
def test_the_log_after_a_kill_and_a_resume_equals_that_of_a_run_never_stopped(
    tmp_path: Path, checkpoint: int, torn: bytes
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_steps(whole, 1, 12, resume=False, state=None)
    states = run_steps(killed, 1, 9, resume=False, state=None)
    for name in ("log.jsonl", "timing.jsonl"):
        with (killed / name).open("ab") as file:
            file.write(torn)
    # Killed before the first checkpoint there is no state: everything is done again.
    run_steps(killed, checkpoint + 1, 12, resume=True, state=states[checkpoint - 1] if checkpoint else None)
    for name in ("log.jsonl", "text.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    timing = read_jsonl(killed / "timing.jsonl")
    assert [line["step"] for line in timing] == list(range(1, 13))


def test_state_may_be_loaded_after_other_lines_were_written(tmp_path: Path) -> None:
    state = run_steps(tmp_path, 1, 3, resume=False, state=None)[-1]
    tracker = make_trackers([], tmp_path)
    tracker.start({}, resume=True)
    tracker.load_state_dict(state)
    tracker.log(4, metrics(4))
    tracker.load_state_dict(state)
    tracker.log(5, metrics(5))
    assert [line["step"] for line in read_jsonl(tmp_path / "log.jsonl")] == [1, 2, 3, 5]


def test_a_log_shorter_than_the_checkpoint_is_refused(tmp_path: Path) -> None:
    state = run_steps(tmp_path, 1, 5, resume=False, state=None)[-1]
    (tmp_path / "log.jsonl").write_bytes((tmp_path / "log.jsonl").read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"log\.jsonl has \d+ bytes"):
        run_steps(tmp_path, 6, 6, resume=True, state=state)


def test_a_new_run_never_overwrites_a_log(tmp_path: Path) -> None:
    run_steps(tmp_path, 1, 2, resume=False, state=None)
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(UsageError, match="already holds a run"):
        run_steps(tmp_path, 1, 2, resume=False, state=None)
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_a_line_cut_by_a_kill_is_left_out_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [line["step"] for line in read_jsonl(path)] == [1, 2]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UsageError, match="line 2"):
        read_jsonl(path)
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_clock_metrics_are_told_apart() -> None:
    clocks = ["step_time", "seconds", "tokens_per_second", "eval/seconds", "time/sample", "memory/peak_gib"]
    assert all(map(is_clock, clocks))
    assert not any(map(is_clock, ["reward", "num_tokens", "eval/accuracy", "rewards/time/mean"]))


def test_names_agree_with_trl_where_both_log_the_same_thing() -> None:
    trainer = pytest.importorskip("importlib.util").find_spec("trl")
    if trainer is None:
        pytest.skip("trl is not installed")
    folder = Path(trainer.submodule_search_locations[0]) / "trainer"
    source = "".join((folder / f"{name}_trainer.py").read_text() for name in ("grpo", "dpo"))
    ours = {"NUM_ROLLOUTS", "SECONDS", "TOKENS_PER_SECOND", "EVAL", "ACCURACY", "ACCURACY_LOW", "ACCURACY_HIGH"}
    inherited = {"GRAD_NORM", "LEARNING_RATE", "LOSS"}  # logged by the transformers Trainer below it
    constants = {name: value for name, value in vars(metrics_names).items() if name.isupper()}
    assert len(constants) > 20
    for name, value in constants.items():
        if name not in ours | inherited:
            assert f'"{value}"' in source, name
    assert 'f"rewards/{reward_func_name}/mean"' in source and metrics_names.reward_mean("x") == "rewards/x/mean"
    assert 'f"rewards/{reward_func_name}/std"' in source and metrics_names.reward_std("x") == "rewards/x/std"


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trackers = make_trackers(["tensorboard"], tmp_path)
    trackers.start({"method": "grpo", "hf_token": "abc123"}, resume=False)
    for step in (1, 2, 3, 4):
        trackers.log(step, {"reward": step / 10})
        if step == 2:
            state = trackers.state_dict()
    trackers.state_dict()  # what a kill leaves on disk: four steps
    resumed = make_trackers(["tensorboard"], tmp_path)
    resumed.start({}, resume=True)
    resumed.load_state_dict(state)
    for step in (3, 4, 5):
        resumed.log(step, {"reward": step / 10 + 1})
    resumed.text(5, "samples", [{"prompt": "a|b", "reward": 1.0}])
    resumed.finish({"accuracy": 0.5})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = {event.step: round(event.value, 6) for event in events.Scalars("reward")}
    assert [event.step for event in events.Scalars("reward")] == [1, 2, 3, 4, 5]
    assert scalars == {1: 0.1, 2: 0.2, 3: 1.3, 4: 1.4, 5: 1.5}
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert '"method": "grpo"' in texts["config/text_summary"] and "abc123" not in texts["config/text_summary"]
    assert "a\\|b" in texts["samples/text_summary"]


# --- hosted services, with recorders in place of their packages -------------------------------------------------------


class Recorder(types.ModuleType):
    """A module on which any function can be called; keeps the calls."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="run-7"), summary={}, finish=lambda: None)
            run.log = lambda metrics, step: self.calls.append(("log", (metrics,), {"step": step}))
            return run

        return call

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


CONFIG = {"method": "grpo", "model": {"hf_token": "s3cret"}, "steps": 10}


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_hosted_tracker_gets_metrics_and_settings_but_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    package = Recorder(name)
    monkeypatch.setitem(sys.modules, name, package)
    trackers = make_trackers([name], tmp_path / "run")
    trackers.start(CONFIG, resume=False)
    assert package.calls == []  # nothing is opened before there is something to say
    trackers.log(1, {"reward": 0.5, "eval/pass@8": 0.25})
    trackers.text(1, "samples", [{"prompt": "1+1", "completion": "2"}])
    state = json.loads(json.dumps(trackers.state_dict()))
    trackers.finish({"accuracy": 1.0})
    assert trackers.names == ("jsonl", name)
    everything = repr(package.calls)
    assert "s3cret" not in everything and "grpo" in everything

    again = Recorder(name)
    monkeypatch.setitem(sys.modules, name, again)
    resumed = make_trackers([name], tmp_path / "run")
    resumed.start(CONFIG, resume=True)
    resumed.load_state_dict(state)
    resumed.log(2, {"reward": 0.75})
    if name == "mlflow":
        assert package.named("log_metrics")[0] == (({"reward": 0.5, "eval/pass_at_8": 0.25},), {"step": 1})
        assert again.named("start_run")[0][1]["run_id"] == "run-7"
        assert again.named("log_params") == []  # MLflow refuses to log a parameter twice
    else:
        assert package.named("log")[0] == (({"reward": 0.5, "eval/pass@8": 0.25},), {"step": 1})
        key = "id" if name == "wandb" else "name"
        assert again.named("init")[0][1][key] == package.named("init")[0][1][key]
        assert again.named("init")[0][1]["resume"] == "allow"


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio", "tensorboard"])
def test_an_absent_package_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=rf"install polopt\[{name}\]"):
        make_trackers([name], tmp_path)


def test_an_unknown_tracker_is_answered_with_the_list(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'wandbb'.*jsonl, tensorboard, wandb, mlflow, trackio"):
        make_trackers(["wandbb"], tmp_path)


class Failing:
    def start(self, config: object, resume: bool) -> None: ...

    def log(self, step: int, metrics: object) -> None:
        if step == 2:
            raise ConnectionError("no route to host")

    def text(self, step: int, name: str, rows: Rows) -> None: ...

    def finish(self, summary: object) -> None:
        raise AssertionError("was dropped before")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: object) -> None: ...


def test_a_service_that_fails_is_dropped_and_the_log_stays_complete(tmp_path: Path) -> None:
    trackers = Trackers({"service": Failing(), "jsonl": JsonlTracker(tmp_path)})
    trackers.start({}, resume=False)
    trackers.log(1, {"reward": 1.0})
    with pytest.warns(UserWarning, match="'service' stopped at step 2 .*no route to host"):
        trackers.log(2, {"reward": 2.0})
    trackers.log(3, {"reward": 3.0})
    trackers.finish({"reward": math.inf, "api_key": "s3cret"})
    assert [line["step"] for line in read_jsonl(tmp_path / "log.jsonl")] == [1, 2, 3]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"reward": "Infinity", "api_key": "[redacted]"}


def test_a_log_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    trackers = make_trackers([], tmp_path)
    trackers.start({}, resume=False)
    with pytest.raises(TypeError):
        trackers.log(1, {"reward": object()})  # type: ignore[dict-item]


def test_redaction_keeps_settings_and_drops_secrets() -> None:
    config = {
        "hf_token": "abc",
        "token": "abc",
        "nested": [{"api_key": "abc", "Password": "abc", "AWS_SECRET_ACCESS_KEY": "abc"}],
        "url": "https://user:pa55@host/x",
        "note": "uses hf_" + "A" * 34,
        "max_tokens": 128,
        "eos_token": "</s>",
        "tokenizer": "gpt2",
        "num_tokens": "10",
        "path": Path("a/b"),
        "off": None,
    }
    clean = redact(config)
    assert "abc" not in repr(clean) and "pa55" not in repr(clean) and "AAAA" not in repr(clean)
    assert clean["url"] == "https://[redacted]@host/x"
    kept = ("max_tokens", "eos_token", "tokenizer", "num_tokens", "off")
    assert {key: clean[key] for key in kept} == {key: config[key] for key in kept}
    assert clean["path"] == "a/b"
