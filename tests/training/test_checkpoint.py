from __future__ import annotations

import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polopt.core.errors import UsageError
from polopt.training import checkpoint as module
from polopt.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool]


def same(a: Any, b: Any) -> bool:
    """Equality of type, order and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        raw = [t.contiguous().view(-1).view(torch.uint8) if t.numel() else t for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | tensors()
keys = (
    st.text(max_size=4) | st.integers(-3, 3) | st.sampled_from(["$tensor", "$float", "$items", "__metadata__", "a/b"])
)
states = st.dictionaries(
    keys,
    st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(keys, inner, max_size=3)
            | st.lists(inner, max_size=2).map(tuple)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


@settings(deadline=None, max_examples=100)
@given(state=states)
def test_any_state_comes_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, state: dict[Any, Any]) -> None:
    path = save_checkpoint(tmp_path_factory.mktemp("run"), 3, state)
    assert same(load_checkpoint(path), state)


def test_the_json_is_standard_and_versioned(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 12, {"best": math.inf, "kl": math.nan, "rate": 0.1})
    assert path == tmp_path / "checkpoints" / "step-00000012"

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    document = json.loads((path / "state.json").read_text(), parse_constant=refuse)
    assert document["format_version"] == 1
    assert document["step"] == 12
    assert document["state"]["rate"] == 0.1


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    expanded = torch.ones(1).expand(5)
    state = {"weight": weight, "tied": weight, "row": weight[1], "transposed": weight.T, "expanded": expanded}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 0, state))
    assert same(loaded, state)
    assert loaded["tied"] is loaded["weight"]
    loaded["row"].zero_()
    assert torch.equal(loaded["weight"], weight)


def test_saving_leaves_the_state_alone_and_drops_the_graph(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    loaded = load_checkpoint(save_checkpoint(tmp_path, 0, {"p": parameter}))["p"]
    assert parameter.requires_grad
    assert not loaded.requires_grad and type(loaded) is torch.Tensor


def test_an_optimizer_goes_on_as_if_never_saved(tmp_path: Path) -> None:
    def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, n: int) -> None:
        for i in range(n):
            optimizer.zero_grad()
            (model(torch.full((1, 3), float(i + 1))) ** 2).sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    steps(model, optimizer, 3)
    path = save_checkpoint(tmp_path, 3, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other = torch.nn.Linear(3, 2)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.5)
    state = load_checkpoint(path)
    other.load_state_dict(state["model"])
    other_optimizer.load_state_dict(state["optimizer"])
    steps(model, optimizer, 3)
    steps(other, other_optimizer, 3)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)


@pytest.mark.parametrize(
    ("state", "path"),
    [
        ({"a": {"b": [1, {2, 3}]}}, "state/a/b/1"),
        ({"a": np.int64(3)}, "state/a"),
        ({"a": torch.ones(2).to_sparse()}, "state/a"),
        ({"a": {(1, 2): 3}}, "state/a"),
    ],
)
def test_what_cannot_be_saved_is_named_and_leaves_no_trace(tmp_path: Path, state: dict[str, Any], path: str) -> None:
    with pytest.raises(TypeError, match=path):
        save_checkpoint(tmp_path, 1, state)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(("step", "keep"), [(-1, 2), (3, 0)])
def test_impossible_arguments(tmp_path: Path, step: int, keep: int) -> None:
    with pytest.raises(UsageError):
        save_checkpoint(tmp_path, step, {}, keep=keep)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_older_checkpoints_beyond_keep_are_removed(tmp_path: Path) -> None:
    for step in (5, 100_000_000, 10, 15):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000015", "step-100000000"]
    latest = latest_checkpoint(tmp_path)
    assert latest is not None and load_checkpoint(latest) == {"step": 100_000_000}


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4, {"value": "old"}, keep=1)
    path = save_checkpoint(tmp_path, 4, {"value": "new"}, keep=1)
    assert load_checkpoint(path) == {"value": "new"}
    assert names(tmp_path) == ["step-00000004"]


def test_latest_ignores_unfinished_and_foreign_folders(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    path = save_checkpoint(tmp_path, 4, {})
    folder = tmp_path / "checkpoints"
    for name in (".tmp-step-00000009", "step-9", "notes"):
        (folder / name).mkdir()
    (folder / "step-00000007").write_text("a file")
    assert latest_checkpoint(tmp_path) == path


def test_of_two_checkpoints_of_one_step_the_new_one_counts(tmp_path: Path) -> None:
    new = save_checkpoint(tmp_path, 4, {"value": "new"})
    shutil.copytree(new, new.with_name("step-00000004.replaced"))  # a kill between the rename and the clean-up
    assert latest_checkpoint(tmp_path) == new
    new.rename(tmp_path / "elsewhere")  # a kill before the rename
    assert latest_checkpoint(tmp_path) == new.with_name("step-00000004.replaced")


def test_a_failed_write_keeps_the_old_checkpoint_and_removes_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save_checkpoint(tmp_path, 1, {"value": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 2, {"value": 2})
    assert names(tmp_path) == ["step-00000001"]
    assert load_checkpoint(old) == {"value": 1}


STATE = {"weights": torch.arange(50.0), "step": 7, "nested": {"x": [1.5, None]}}


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "alter", "remove", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = save_checkpoint(tmp_path, 7, STATE)
    file = path / name
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        # In the manifest, whatever is altered must be something that is checked: the first digit of a hash.
        at = content.index(b'sha256": "') + 10 if name == "manifest.json" else len(content) * 3 // 4
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    blamed = "sha256 in the manifest" if (name, damage) == ("manifest.json", "alter") else name
    with pytest.raises(UsageError, match=blamed) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value) and "delete" in str(caught.value)


def test_every_truncation_of_every_file_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 7, STATE)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        # Without its final newline the manifest still says everything.
        for length in range(0, len(content.rstrip()), 7):
            file.write_bytes(content[:length])
            with pytest.raises(UsageError, match=file.name):
                load_checkpoint(path)
        file.write_bytes(content)
    assert same(load_checkpoint(path), STATE)


def test_a_newer_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 7, {})
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(UsageError, match=r"format_version 2.*upgrade"):
        load_checkpoint(path)


def test_no_checkpoint_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "checkpoints" / "step-00000001")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("second_step", [1, 2])
def test_a_kill_at_every_single_change_of_the_disk_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second_step: int
) -> None:
    # keep=1 and the same step twice is the hardest case: the old one must go, and both want one name.
    outcomes = set()
    real: dict[str, Any] = {"sync": module._sync, "rename": Path.rename, "rmtree": shutil.rmtree, "mkdir": Path.mkdir}
    for survive in range(100):
        run = tmp_path / f"{second_step}-{survive}"
        save_checkpoint(run, 1, {"value": "old"}, keep=1)
        lives = iter(range(survive))

        def step(name: str, lives: Iterator[int] = lives) -> Any:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                if next(lives, None) is None:  # a killed process runs no clean-up either
                    raise Killed
                return real[name](*args, **kwargs)

            return wrapped

        with monkeypatch.context() as patch:
            patch.setattr(module, "_sync", step("sync"))
            patch.setattr(shutil, "rmtree", step("rmtree"))
            patch.setattr(Path, "rename", step("rename"))
            patch.setattr(Path, "mkdir", step("mkdir"))
            try:
                save_checkpoint(run, second_step, {"value": "new"}, keep=1)
                killed = False
            except Killed:
                killed = True
        latest = latest_checkpoint(run)
        assert latest is not None
        outcomes.add(load_checkpoint(latest)["value"])
        save_checkpoint(run, 3, {"value": "next"}, keep=1)
        assert names(run) == ["step-00000003"]
        if not killed:
            break
    else:
        pytest.fail("the save never finished")
    assert survive > 8
    assert outcomes == {"old", "new"}


# One interpreter forks all writers, so that torch is imported once.
WRITERS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from polopt.training.checkpoint import save_checkpoint

def write(run):
    step = 0
    with (run / "reported").open("w") as reported:
        while True:
            step += 1
            save_checkpoint(run, step, {"step": step, "w": torch.full((400_000,), float(step))}, keep=1)
            reported.write(f"{step}\\n")
            reported.flush()

rng = random.Random(0)
for run in map(Path, sys.argv[1:]):
    run.mkdir()
    writer = os.fork()
    if not writer:
        write(run)
    while not ((run / "reported").exists() and (run / "reported").read_text()):
        time.sleep(0.005)
    time.sleep(rng.uniform(0.0, 0.1))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
"""


def test_sigkill_at_random_moments_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    runs = [tmp_path / f"run{i}" for i in range(10)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", WRITERS, *map(str, runs)], check=True, env=environment, timeout=60)
    unfinished = 0
    for run in runs:
        reported = int((run / "reported").read_text().split("\n")[-2])
        latest = latest_checkpoint(run)
        assert latest is not None
        state = load_checkpoint(latest)
        assert state["step"] in (reported, reported + 1)
        assert torch.equal(state["w"], torch.full((400_000,), float(state["step"])))
        unfinished += any(name.startswith(".tmp-") for name in names(run))
    assert unfinished > 0, "no kill fell into the middle of a save; the test shows nothing"


def draws() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
    ]


def test_random_draws_repeat_after_a_round_trip_through_a_checkpoint(tmp_path: Path) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    draws()  # leaves half of a Gaussian pair in both Python's and NumPy's generator
    path = save_checkpoint(tmp_path, 0, {"random": random_state()})
    expected = [draws() for _ in range(3)]
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    restore_random_state(load_checkpoint(path)["random"])
    assert [draws() for _ in range(3)] == expected
