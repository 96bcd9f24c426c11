"""Figures of the methods' diagnosis, drawn when the site is built and kept until what they show changes."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polopt.cli.main import COMMANDS, main
from polopt.core.method import Method
from polopt.core.part import flatten

ROOT = Path(__file__).parents[2]
ROOMS = ("core", "diagnosis", "policies/exact")


def arguments(method: Method) -> list[str]:
    """The command line that draws a method, beside GRPO for scale."""
    # What learns from a data set is drawn on pairs of the policy's own answers.
    own = ["--pairs", "on-policy"] if method.offline else []
    return ["diagnose", *dict.fromkeys([method.slug, "grpo"]), *own]


def draw(method: Method, folder: Path) -> tuple[Path | None, str]:
    """The picture of a method in ``folder``, drawn unless it is there, or the reason why there is none."""
    if "diagnose" not in COMMANDS:
        return None, "this version has no `polopt diagnose`."
    folder.mkdir(parents=True, exist_ok=True)
    key = fingerprint(method)
    picture, refusal = folder / f"{method.slug}-{key}.png", folder / f"{method.slug}-{key}.txt"
    if picture.is_file():
        return picture, ""
    if refusal.is_file():
        return None, refusal.read_text(encoding="utf-8")
    for stale in folder.glob(f"{method.slug}-{'[0-9a-f]' * 16}.*"):
        stale.unlink()
    said = io.StringIO()
    unfinished = folder / f"{method.slug}-unfinished.png"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        failed = main([*arguments(method), "--png", str(unfinished)])
    if failed:
        reason = said.getvalue().strip().removeprefix("polopt: ").removeprefix("error: ") or "the command failed"
        refusal.write_text(reason, encoding="utf-8")
        return None, reason
    unfinished.replace(picture)
    return picture, ""


def fingerprint(method: Method) -> str:
    """Of everything that the figure depends on: the method's parts, their files, and the rooms that measure."""
    digest = hashlib.sha256(repr((arguments(method), method.slots())).encode())
    for path in sorted({*_files(method), *(p for room in ROOMS for p in (ROOT / "polopt" / room).glob("*.py"))}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _files(method: Method) -> Iterator[Path]:
    for value in method.slots().values():
        for member in _members(value):
            if file := inspect.getsourcefile(member if inspect.isfunction(member) else type(member)):
                yield Path(file)


def _members(value: Any) -> tuple[Any, ...]:
    return tuple(value.values()) if isinstance(value, Mapping) else flatten(value)
