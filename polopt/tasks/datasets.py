"""Datasets of prompts, demonstrations and preferences, from a file or the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.tasks.columns import Layout, Row, find_layout, parse_mapping, read_row

__all__ = ["load_examples", "parse_mapping"]

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")


def load_examples(
    source: str,
    *,
    mapping: Mapping[str, str] | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> list[Example]:
    """The rows of a dataset as examples, in order.

    ``source`` is a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, a directory written by
    ``datasets.save_to_disk``, or a name on the hub, with an optional configuration: ``openai/gsm8k:main``. No code of
    a dataset runs. ``mapping`` says which column is which field of ``Example`` where names differ,
    ``{"prompt": "question"}``; the other layouts are recognised (see ``polopt.tasks.columns``). ``split`` defaults to
    ``train``, or to the only one; a file has none. ``limit`` keeps the first rows.

    The id of an example is the row's ``id`` if no two rows share one, otherwise ``<source>/<index>``: ``train/12`` for
    ``train.jsonl``, ``gsm8k/12`` for ``openai/gsm8k``. Neither depends on ``limit``.

    Raises:
        UsageError: the source or split is absent or unreadable, a column is missing, a row is malformed.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, but is {limit}")
    rows, columns, stem = _open(source, mapping or {}, split)
    if len(rows) == 0:
        raise UsageError(f"dataset {source!r} is empty")
    layout = find_layout(source, columns, rows[0], mapping)
    ids = _ids(rows, columns, layout, stem, explicit="id" in (mapping or {}))
    count = len(rows) if limit is None else min(limit, len(rows))
    return [read_row(rows[index], index, ids[index], layout) for index in range(count)]


def _ids(rows: Any, columns: Sequence[str], layout: Layout, stem: str, *, explicit: bool) -> list[str]:
    by_position = [f"{stem}/{index}" for index in range(len(rows))]
    column = layout.column_of.get("id")
    if column is None:
        return by_position
    # A `datasets` table reads one column without decoding the others.
    values = [row.get(column) for row in rows] if isinstance(rows, list) else list(rows[column])
    first_with: dict[str, int] = {}
    for index, value in enumerate(values):
        other = first_with.setdefault(str(value), index)
        if value is None or isinstance(value, list | dict) or other != index:
            if explicit:
                reason = f"rows {other} and {index} share {value!r}" if other != index else f"row {index} has {value!r}"
                raise UsageError(f"column {column!r} of dataset {layout.source!r} cannot be the id: {reason}")
            return by_position
    return [str(value) for value in values]


def _open(source: str, mapping: Mapping[str, str], split: str | None) -> tuple[Any, list[str], str]:
    """Rows by index (a list or a ``datasets.Dataset``), the columns, and the stem of ids."""
    path = Path(source).expanduser()
    if path.is_dir():
        table = _choose_split(_load_saved(source, path), source, split)
        return table, list(table.column_names), path.resolve().name
    if not path.exists() and path.suffix not in EXTENSIONS and _looks_like_hub_name(source):
        name, _, configuration = source.partition(":")
        table = _choose_split(_load_hub(source, name, configuration or None), source, split)
        return table, list(table.column_names), name.rpartition("/")[2]
    if not path.exists():
        raise UsageError(f"there is no file {source!r}")
    if path.suffix not in EXTENSIONS:
        raise UsageError(f"file {source!r} has the extension {path.suffix!r}; readable are {', '.join(EXTENSIONS)}")
    if split is not None:
        raise UsageError(f"file {source!r} has no splits, but the split {split!r} was asked for; name its file instead")
    if path.stat().st_size == 0:
        raise UsageError(f"dataset {source!r} is empty")
    if path.suffix in (".jsonl", ".json"):
        rows = _read_json_lines(source, path) if path.suffix == ".jsonl" else _read_json(source, path)
        return rows, list(dict.fromkeys(name for row in rows for name in row)), path.stem
    table = _load_table(source, path, "csv" if path.suffix == ".csv" else "parquet", mapping)
    return table, list(table.column_names), path.stem


def _read_json_lines(source: str, path: Path) -> list[Row]:
    # Arrow's JSON reader turns text that looks like a date into a timestamp, so an answer "2024-01-01" would change,
    # and it names no line in its errors; the standard library does neither.
    rows: list[Row] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UsageError(f"line {number} of {source!r} is not valid JSON: {error}") from error
                rows.append(_as_row(row, f"line {number} of {source!r}"))
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(source, error) from error
    return rows


def _read_json(source: str, path: Path) -> list[Row]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{source!r} is not valid JSON: {error}; with one object per line, name it .jsonl") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(source, error) from error
    if not isinstance(content, list):
        raise UsageError(f"{source!r} must hold a list of objects, but holds {_json_kind(content)}")
    return [_as_row(row, f"item {index} of {source!r}") for index, row in enumerate(content)]


def _as_row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise UsageError(f"{where} must be an object with named columns, but is {_json_kind(value)}")
    return value


def _json_kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _load_table(source: str, path: Path, kind: Literal["csv", "parquet"], mapping: Mapping[str, str]) -> Any:
    import datasets  # here, because it takes longer to import than everything else

    options: dict[str, Any] = {}
    if kind == "csv":
        # Texts must not be guessed into numbers or nulls: "007" and "NA" are answers.
        texts = {"id", "prompt", "question", "answer", "completion", "chosen", "rejected", *mapping.values()}
        texts.discard(mapping.get("label", ""))
        options = {"converters": dict.fromkeys(sorted(texts), _cell), "keep_default_na": False, "na_values": [""]}
    try:
        return datasets.load_dataset(kind, data_files=str(path), split="train", **options)
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise UsageError(f"dataset {source!r} is empty") from error
        raise _unreadable(source, error) from error


def _cell(text: str) -> str | None:
    return text or None


def _load_saved(source: str, path: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise UsageError(
            f"directory {source!r} does not hold a dataset saved by `datasets`; name a file of type "
            f"{', '.join(EXTENSIONS)} instead"
        ) from error
    except Exception as error:
        raise _unreadable(source, error) from error


def _load_hub(source: str, name: str, configuration: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, configuration)
    except Exception as error:
        raise UsageError(f"{source!r} is not a file here, and the hub gave no such dataset: {_cause(error)}") from error


def _choose_split(table: Any, source: str, split: str | None) -> Any:
    if not isinstance(table, Mapping):
        if split is not None:
            raise UsageError(f"dataset {source!r} has no splits, but the split {split!r} was asked for")
        return table
    names = list(table)
    if split is None:
        split = "train" if "train" in names else names[0] if len(names) == 1 else None
    if split is None:
        raise UsageError(f"dataset {source!r} has several splits, {', '.join(names)}; choose one with --split")
    if split not in names:
        raise UsageError(f"dataset {source!r} has no split {split!r}: its splits are {', '.join(names)}")
    return table[split]


def _looks_like_hub_name(source: str) -> bool:
    name = source.partition(":")[0]
    return not name.startswith(("/", ".", "~")) and name.count("/") <= 1


def _unreadable(source: str, error: Exception) -> UsageError:
    return UsageError(f"dataset {source!r} cannot be read: {_cause(error)}")


def _cause(error: BaseException) -> str:
    """The innermost error as one line: `datasets` wraps what went wrong in a sentence that does not say it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
