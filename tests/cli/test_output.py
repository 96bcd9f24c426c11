from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from polopt.cli.output import check_json_path, write_json
from polopt.core.errors import UsageError


def test_json_has_null_where_json_has_no_number(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json({"x": float("nan"), "y": [1.5, float("inf")], "z": (None, {"w": True})}, str(path))
    assert json.loads(path.read_text(encoding="utf-8")) == {"x": None, "y": [1.5, None], "z": [None, {"w": True}]}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(TypeError):
        write_json({"x": object()}, str(path))
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_readable_as_any_new_file_is(tmp_path: Path) -> None:
    write_json({}, str(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text("", encoding="utf-8")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.json", "b.json")}
    assert len(modes) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_a_link_or_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target.json", tmp_path / "link.json", tmp_path / "pipe"
    target.write_text("a longer text that was there before", encoding="utf-8")
    link.symlink_to(target)
    write_json({"x": 1}, str(link))
    assert link.is_symlink()
    assert json.loads(target.read_text(encoding="utf-8")) == {"x": 1}

    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_json({"x": 2}, str(pipe))
        assert json.loads(os.read(reader, 1000)) == {"x": 2}
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_where_json_cannot_go(tmp_path: Path) -> None:
    check_json_path(None)
    check_json_path(str(tmp_path / "new.json"))
    with pytest.raises(UsageError, match="is a folder"):
        check_json_path(str(tmp_path))
    with pytest.raises(UsageError, match="there is no folder"):
        check_json_path(str(tmp_path / "no" / "a.json"))
