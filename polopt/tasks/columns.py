"""From one row of a dataset to an ``Example``: which column is what.

The layouts are those of TRL (prompt, messages, completion, chosen, rejected, label), of verl's parquet files
(``reward_model``), of GSM8K (question and answer; or several models' solutions, labelled right or wrong), and lists of
answers (``completions``) with a grade each (``labels``). Texts are strings or lists of role/content messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from os.path import commonprefix
from typing import Any

from polopt.core.errors import UsageError
from polopt.core.example import Example, Text
from polopt.tasks.gsm8k import MARKER, solutions, solvers, split_ground_truth, split_solution

FIELDS = (
    *("id", "prompt", "answer", "steps", "completion", "chosen", "rejected", "label", "completions", "labels"),
    "messages",
)
"""What a column can be mapped to: the fields of ``Example``, and ``messages`` for a whole conversation."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """Which column holds which field, for one dataset.

    ``source`` names the dataset in errors. ``column_of`` maps a field to its column. ``gsm8k``: the answer column is a
    worked solution that ends in ``#### answer``. ``verl``: the answer is ``reward_model["ground_truth"]``.
    ``solvers``: columns with the labelled solutions of as many models (`polopt.tasks.gsm8k`).
    """

    source: str
    column_of: Mapping[str, str]
    gsm8k: bool = False
    verl: bool = False
    solvers: tuple[str, ...] = ()


def parse_mapping(items: Sequence[str]) -> dict[str, str]:
    """``["prompt=question", "answer=solution"]`` as ``{"prompt": "question", "answer": "solution"}``.

    Raises:
        UsageError: an item without ``=``, an unknown field, or a field given twice.
    """
    mapping: dict[str, str] = {}
    for item in items:
        name, equals, column = (part.strip() for part in item.partition("="))
        if not equals or not name or not column:
            raise UsageError(f"--map {item!r} is not of the form FIELD=COLUMN, for example prompt=question")
        if name in mapping:
            raise UsageError(f"--map gives {name!r} twice, as column {mapping[name]!r} and as column {column!r}")
        mapping[name] = column
    _check_fields(mapping)
    return mapping


def find_layout(source: str, columns: Sequence[str], first: Row, mapping: Mapping[str, str] | None) -> Layout:
    """The layout of a dataset from its columns, its first row and the user's mapping, which wins.

    A mapping that says where prompt or answer is switches the recognition of GSM8K off: the column is then taken as
    it is. Columns named like a field are that field, except ``label`` without a completion, ``completions`` and
    ``labels`` without each other or that are no lists, and ``steps`` that is not a list of strings, which stay ordinary
    columns.

    Raises:
        UsageError: an unknown field, a mapping to a column that is absent, or no column that could be the prompt.
    """
    mapping = dict(mapping or {})
    _check_fields(mapping)
    for name, column in mapping.items():
        if column not in columns:
            raise UsageError(
                f"dataset {source!r} has no column {column!r} (mapped to {name}): its columns are {', '.join(columns)}"
            )
    column_of = {name: name for name in FIELDS if name in columns} | mapping
    if "label" not in mapping and "completion" not in column_of:
        column_of.pop("label", None)
    if not {"completions", "labels"} & set(mapping):
        if not all(isinstance(first.get(name), list | tuple) for name in ("completions", "labels")):
            column_of.pop("completions", None)
            column_of.pop("labels", None)
    elif not {"completions", "labels"} <= set(column_of):
        given, other = ("completions", "labels") if "completions" in mapping else ("labels", "completions")
        raise UsageError(f"--map {given}={mapping[given]} needs {other} too: each answer of a list has its label")
    if "steps" not in mapping and not _is_list_of_strings(first.get("steps")):
        column_of.pop("steps", None)
    if "messages" not in mapping and "prompt" in column_of:
        column_of.pop("messages", None)

    untouched = "prompt" not in mapping and "answer" not in mapping
    question = first.get("question")
    solution = first.get("answer")
    worked = isinstance(question, str) and isinstance(solution, str) and MARKER in solution
    if worked and untouched and "prompt" not in columns:
        return Layout(source, column_of | {"prompt": "question", "answer": "answer"}, gsm8k=True)
    models = solvers(columns, first)
    if models and untouched and "prompt" not in columns and "completions" not in column_of:
        return Layout(source, column_of | {"prompt": "question"}, solvers=models)
    if not {"prompt", "messages"} & set(column_of) and not {"chosen", "rejected"} <= set(column_of):
        raise UsageError(
            f"dataset {source!r} has no prompt: its columns are {', '.join(columns)}; "
            "say which one is the prompt with --map prompt=COLUMN"
        )
    reward_model = first.get("reward_model")
    verl = "answer" not in column_of and isinstance(reward_model, Mapping) and "ground_truth" in reward_model
    return Layout(source, column_of, verl=verl)


def read_row(row: Row, index: int, identifier: str, layout: Layout) -> Example:
    """One row as an ``Example``.

    ``columns`` keeps every column that is not stored under its own name in the example, so a reward function finds a
    mapped column under the name it has in the dataset.

    Raises:
        UsageError: an empty prompt or a value of the wrong type, naming dataset, row and column.
    """
    reader = _RowReader(row, f"row {index} of dataset {layout.source!r}", layout.column_of)
    prompt, texts = _texts(reader)
    steps, answer = reader.steps(), reader.answer()
    completions, labels = reader.answers(prompt)
    if layout.gsm8k:
        solution = split_solution(reader.value("answer") or "")
        if solution is None:
            raise UsageError(
                f"{reader.where}: column 'answer' does not end in '{MARKER} ANSWER' as the first row's does; "
                "take the column as it is with --map prompt=question --map answer=answer"
            )
        steps, answer = solution
    if layout.solvers:
        try:
            completions, labels = solutions(row, layout.solvers)
        except ValueError as error:
            raise UsageError(
                f"{reader.where}: column {str(error)!r} holds no solution with 'is_correct' as the first row's does"
            ) from None
        steps, answer = split_ground_truth(row.get("ground_truth")) or (steps, answer)
    if layout.verl:
        answer = reader.ground_truth()
    if not _has_content(prompt):
        column = layout.column_of.get("prompt") or layout.column_of.get("messages") or "chosen"
        raise UsageError(f"{reader.where} has an empty prompt (column {column!r})")
    stored = {column for name, column in layout.column_of.items() if name == column and name != "messages"}
    if "id" in stored and str(row.get("id")) != identifier:
        stored.discard("id")
    return Example(
        id=identifier,
        prompt=prompt,
        answer=answer,
        steps=steps,
        completion=texts.get("completion"),
        chosen=texts.get("chosen"),
        rejected=texts.get("rejected"),
        label=reader.label(),
        completions=completions,
        labels=labels,
        columns={name: value for name, value in row.items() if name not in stored},
    )


def _texts(reader: _RowReader) -> tuple[Text, dict[str, Text]]:
    """The prompt, and the texts that continue it."""
    texts = {name: text for name in ("completion", "chosen", "rejected") if (text := reader.text(name)) is not None}
    messages = reader.text("messages")
    if messages is not None:
        if isinstance(messages, str):
            raise reader.wrong_type("messages", messages, "a list of messages")
        if messages and messages[-1].get("role") == "assistant":
            return messages[:-1], {"completion": messages[-1:], **texts}
        return messages, texts

    prompt = reader.text("prompt")
    chosen, rejected = texts.get("chosen"), texts.get("rejected")
    if chosen is not None and rejected is not None:
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise reader.wrong_type("rejected", rejected, "of the same kind as chosen (both text or both messages)")
        # Preference sets often repeat the prompt as plain text beside two whole conversations.
        if prompt is None or (isinstance(prompt, str) and not isinstance(chosen, str)):
            prompt, texts["chosen"], texts["rejected"] = split_shared_prefix(chosen, rejected)
    if prompt is None:
        return "", texts
    for name, text in texts.items():
        if isinstance(text, str) != isinstance(prompt, str):
            raise reader.wrong_type(name, text, "of the same kind as the prompt (both text or both messages)")
    return prompt, texts


def split_shared_prefix(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """The prompt two continuations share, and what each adds to it.

    Conversations share whole messages, texts share whole words (a word keeps the white space before it). Each
    continuation keeps at least its last message or word.
    """
    if isinstance(chosen, str) or isinstance(rejected, str):
        assert isinstance(chosen, str) and isinstance(rejected, str)
        end = len(commonprefix([chosen, rejected]))
        end = min(end, len(chosen.rstrip()) - 1, len(rejected.rstrip()) - 1)
        while end > 0 and not chosen[end].isspace():
            end -= 1
        while end > 0 and chosen[end - 1].isspace():
            end -= 1
        end = max(end, 0)
        return chosen[:end], chosen[end:], rejected[end:]
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    turns = max(0, min(sum(1 for _ in shared), len(chosen) - 1, len(rejected) - 1))
    return chosen[:turns], chosen[turns:], rejected[turns:]


@dataclass(frozen=True)
class _RowReader:
    """Typed access to the fields of one row; every error says where it was."""

    row: Row
    where: str
    column_of: Mapping[str, str]

    def value(self, name: str) -> Any:
        column = self.column_of.get(name)
        return None if column is None else self.row.get(column)

    def wrong_type(self, name: str, value: Any, expected: str) -> UsageError:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return UsageError(
            f"{self.where}: column {self.column_of.get(name, name)!r} must be {expected}, "
            f"but is {type(value).__name__} {shown}"
        )

    def text(self, name: str) -> Text | None:
        return self._text(name, self.value(name))

    def _text(self, name: str, value: Any) -> Text | None:
        if value is None or isinstance(value, str):
            return value
        if _is_number(value):
            return str(value)
        if not isinstance(value, Sequence):
            raise self.wrong_type(name, value, "text or a list of messages")
        return tuple(self._message(name, message) for message in value)

    def answers(self, prompt: Text) -> tuple[tuple[Text, ...], tuple[float, ...]]:
        """The list of answers and their labels; nothing where the row has none."""
        given, labels = self.value("completions"), self.value("labels")
        if given is None and labels is None:
            return (), ()
        if not isinstance(given, list | tuple) or any(answer is None for answer in given):
            raise self.wrong_type("completions", given, "a list of answers")
        texts = tuple(text for answer in given if (text := self._text("completions", answer)) is not None)
        if any(isinstance(text, str) != isinstance(prompt, str) for text in texts):
            raise self.wrong_type("completions", given, "of the same kind as the prompt (all text or all messages)")
        fine = isinstance(labels, list | tuple) and all(isinstance(v, int | float) for v in labels)
        if not fine or len(labels) != len(texts):
            raise self.wrong_type("labels", labels, f"a list of {len(texts)} numbers, one for each of the completions")
        return texts, tuple(float(value) for value in labels)

    def _message(self, name: str, message: Any) -> dict[str, str]:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise self.wrong_type(name, message, "text or a list of messages with 'role' and 'content'")
        # Arrow fills a key that some other message has with None.
        present = {key: value for key, value in message.items() if value is not None}
        if not {"role", "content"} <= set(present) or not all(isinstance(value, str) for value in present.values()):
            raise self.wrong_type(name, message, "a list of messages whose values are text")
        return present

    def answer(self) -> str | None:
        value = self.value("answer")
        if value is None or isinstance(value, str):
            return value
        if _is_number(value) or isinstance(value, bool):
            return str(value)
        raise self.wrong_type("answer", value, "text or a number")

    def ground_truth(self) -> str | None:
        reward_model = self.row.get("reward_model")
        value = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
        if value is None or isinstance(value, str):
            return value
        # verl leaves the shape to the scorer: several accepted answers, a set of test cases.
        return json.dumps(value, ensure_ascii=False, default=str)

    def steps(self) -> tuple[str, ...]:
        value = self.value("steps")
        if value is None:
            return ()
        if isinstance(value, str):
            return tuple(line.strip() for line in value.splitlines() if line.strip())
        if not _is_list_of_strings(value):
            raise self.wrong_type("steps", value, "text or a list of texts")
        return tuple(value)

    def label(self) -> bool | None:
        value = self.value("label")
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int) and value in (0, 1):
            return bool(value)
        raise self.wrong_type("label", value, "true or false")


def _check_fields(mapping: Mapping[str, str]) -> None:
    for name in mapping:
        if name not in FIELDS:
            raise UsageError(
                f"{name!r} is not a field that a column can be mapped to; the fields are {', '.join(FIELDS)}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _has_content(text: Text) -> bool:
    return bool(text.strip()) if isinstance(text, str) else any(message["content"].strip() for message in text)
