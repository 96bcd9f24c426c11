"""Datasets: every layout as literal rows, GSM8K against a reading of its own, every mistake as a sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from polopt.core.errors import UsageError
from polopt.tasks.columns import split_shared_prefix
from polopt.tasks.datasets import load_examples, parse_mapping

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
USER = {"role": "user", "content": "Hi"}
GOOD = {"role": "assistant", "content": "Hello!"}
BAD = {"role": "assistant", "content": "Go away."}
NATALIA = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips altogether.\n#### 72"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: list[Any]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        datasets.Dataset.from_list(rows).to_csv(str(path))
    return str(path)


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "parquet"])
def test_every_file_type_gives_the_same_examples(tmp_path: Path, extension: str) -> None:
    rows = [{"prompt": f"{n}+1?", "answer": str(n + 1), "level": n} for n in range(3)]
    examples = load_examples(write(tmp_path / f"sums.{extension}", rows))
    assert [(e.id, e.prompt, e.answer, dict(e.columns)) for e in examples] == [
        (f"sums/{n}", f"{n}+1?", str(n + 1), {"level": n}) for n in range(3)
    ]


def test_saved_directories_and_splits(tmp_path: Path) -> None:
    train = datasets.Dataset.from_list([{"prompt": "a"}])
    test = datasets.Dataset.from_list([{"prompt": "b"}])
    train.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=train, test=test).save_to_disk(str(tmp_path / "both"))
    datasets.DatasetDict(dev=train, test=test).save_to_disk(str(tmp_path / "neither"))
    assert [(e.id, e.prompt) for e in load_examples(str(tmp_path / "one"))] == [("one/0", "a")]
    assert [e.prompt for e in load_examples(str(tmp_path / "both"))] == ["a"]
    assert [e.prompt for e in load_examples(str(tmp_path / "both"), split="test")] == ["b"]
    with pytest.raises(UsageError, match="several splits, dev, test; choose one with --split"):
        load_examples(str(tmp_path / "neither"))
    with pytest.raises(UsageError, match="no split 'nope': its splits are train, test"):
        load_examples(str(tmp_path / "both"), split="nope")
    with pytest.raises(UsageError, match="has no splits"):
        load_examples(str(tmp_path / "one"), split="train")


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a"}, {"prompt": "a"}),
        ({"prompt": [USER]}, {"prompt": (USER,)}),
        ({"messages": [USER, BAD, USER, GOOD]}, {"prompt": (USER, BAD, USER), "completion": (GOOD,)}),
        ({"messages": [USER]}, {"prompt": (USER,), "completion": None}),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
        ({"prompt": [USER], "completion": [GOOD]}, {"prompt": (USER,), "completion": (GOOD,)}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "c"}),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
            {"prompt": (USER,), "chosen": (GOOD,), "rejected": (BAD,)},
        ),
        (
            {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            {"prompt": (USER,), "chosen": (GOOD,), "rejected": (BAD,)},
        ),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is brown."},
            {"prompt": "The sky is", "chosen": " blue.", "rejected": " brown."},
        ),
        (
            {"prompt": "a", "completion": "b", "label": False},
            {"prompt": "a", "completion": "b", "label": False},
        ),
        ({"prompt": "a", "label": 4}, {"prompt": "a", "label": None, "columns": {"label": 4}}),
        ({"prompt": "a", "steps": ["one", "two"]}, {"prompt": "a", "steps": ("one", "two"), "columns": {}}),
        ({"prompt": "a", "steps": 3}, {"prompt": "a", "steps": (), "columns": {"steps": 3}}),
    ],
)
def test_layouts_of_preferences_and_demonstrations(
    tmp_path: Path, row: dict[str, Any], expected: dict[str, Any], extension: str
) -> None:
    (example,) = load_examples(write(tmp_path / f"x.{extension}", [row]))
    assert {name: getattr(example, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("same text", "same text", ("same", " text", " text")),
        ("one", "one two", ("", "one", "one two")),
        ("a b", "c d", ("", "a b", "c d")),
        ((USER, GOOD), (USER, GOOD), ((USER,), (GOOD,), (GOOD,))),
        ((USER, GOOD), (USER, GOOD, USER, BAD), ((USER,), (GOOD,), (GOOD, USER, BAD))),
        ((GOOD,), (BAD,), ((), (GOOD,), (BAD,))),
    ],
)
def test_shared_prefix_loses_nothing(chosen: Any, rejected: Any, expected: Any) -> None:
    prompt, kept, other = split_shared_prefix(chosen, rejected)
    assert (prompt, kept, other) == expected
    assert (*prompt, *kept) == tuple(chosen)
    assert (*prompt, *other) == tuple(rejected)


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_verl_layout(tmp_path: Path, extension: str) -> None:
    row = {
        "data_source": "gsm8k",
        "prompt": [USER],
        "reward_model": {"style": "rule", "ground_truth": "72"},
        "extra_info": {"index": 3},
    }
    (example,) = load_examples(write(tmp_path / f"train.{extension}", [row]))
    assert (example.prompt, example.answer) == ((USER,), "72")
    assert example.columns == {key: row[key] for key in ("data_source", "reward_model", "extra_info")}


def test_verl_ground_truth_that_is_not_text_becomes_json(tmp_path: Path) -> None:
    row = {"prompt": "q", "reward_model": {"ground_truth": {"target": ["a", "b"]}}}
    (example,) = load_examples(write(tmp_path / "x.jsonl", [row]))
    assert json.loads(example.answer or "") == {"target": ["a", "b"]}


def test_gsm8k_is_recognised(tmp_path: Path) -> None:
    source = write(tmp_path / "train.jsonl", [{"question": "How many?", "answer": NATALIA}])
    (example,) = load_examples(source)
    assert (example.id, example.prompt, example.answer) == ("train/0", "How many?", "72")
    assert example.steps == ("Natalia sold 48/2 = 24 clips in May.", "She sold 48+24 = 72 clips altogether.")


def test_a_mapping_takes_the_column_as_it_is(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", [{"question": "How many?", "answer": NATALIA}])
    (example,) = load_examples(source, mapping={"prompt": "question", "answer": "answer"})
    assert (example.answer, example.steps) == (NATALIA, ())


def test_mapped_columns_keep_their_own_name(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", [{"problem": "1+1?", "solution": 2, "answer": "ignored"}])
    (example,) = load_examples(source, mapping=parse_mapping(["prompt=problem", "answer=solution"]))
    assert (example.prompt, example.answer) == ("1+1?", "2")
    assert example.columns == {"problem": "1+1?", "solution": 2, "answer": "ignored"}


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the GSM8K files are not beside the repository")
def test_all_of_gsm8k() -> None:
    source = GSM8K / "train.jsonl"
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    examples = load_examples(str(source))
    assert len(examples) == len(rows) == 7473
    assert len({example.id for example in examples}) == len(examples)
    for row, example in zip(rows, examples, strict=True):
        answer = re.search(r"#### (.+)$", row["answer"])
        assert answer and example.answer == answer[1]
        assert example.prompt == row["question"]
        without_marks = re.sub(r"<<.*?>>", "", row["answer"][: answer.start()])
        assert " ".join(example.steps).split() == without_marks.split()
        assert not any("<<" in step or "####" in step or not step for step in example.steps)


@pytest.mark.parametrize("extension", ["jsonl", "csv", "parquet"])
def test_ids_come_from_a_unique_id_column(tmp_path: Path, extension: str) -> None:
    unique = write(tmp_path / f"u.{extension}", [{"id": f"k{n}", "prompt": "a"} for n in range(3)])
    shared = write(tmp_path / f"s.{extension}", [{"id": "k", "prompt": "a"} for n in range(3)])
    assert [e.id for e in load_examples(unique, limit=2)] == ["k0", "k1"]
    # Uniqueness is a matter of the whole file, or ids would change with the limit.
    (first,) = load_examples(shared, limit=1)
    assert (first.id, first.columns) == ("s/0", {"id": "k"})
    with pytest.raises(UsageError, match=r"column 'id' of dataset .* cannot be the id: rows 0 and 1 share 'k'"):
        load_examples(shared, mapping={"id": "id"})


def test_json_text_that_looks_like_a_date_stays_text(tmp_path: Path) -> None:
    (example,) = load_examples(write(tmp_path / "x.jsonl", [{"prompt": "When?", "answer": "2024-01-01"}]))
    assert example.answer == "2024-01-01"


def test_csv_texts_are_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("q,answer,n\nwho,007,1\nNA,None,\nx,,3\n")
    examples = load_examples(str(tmp_path / "x.csv"), mapping={"prompt": "q"})
    assert [(e.prompt, e.answer, e.columns["n"]) for e in examples] == [
        ("who", "007", 1.0),
        ("NA", "None", None),
        ("x", None, 3.0),
    ]


def test_a_key_absent_from_some_messages_is_dropped(tmp_path: Path) -> None:
    rows = [{"prompt": [{**USER, "name": "Ann"}, USER]}]
    (example,) = load_examples(write(tmp_path / "x.parquet", rows))
    assert example.prompt == ({**USER, "name": "Ann"}, USER)


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        rows = [{"question": "How many?", "answer": NATALIA}]
        return datasets.DatasetDict(train=datasets.Dataset.from_list(rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (example,) = load_examples("openai/gsm8k:main")
    assert (example.id, example.answer) == ("gsm8k/0", "72")
    assert asked == [(("openai/gsm8k", "main"), {})]


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*arguments: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UsageError, match=r"'openai/gsm8k' is not a file here.*Couldn't reach 'openai/gsm8k' on the Hub$"
    ):
        load_examples("openai/gsm8k")


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("x.jsonl", '{"a": 1, "b": 2}\n', {}, r"has no prompt: its columns are a, b; say which .* --map prompt=COLUMN"),
        ("x.jsonl", '{"a": 1}\n', {"mapping": {"prompt": "z"}}, r"no column 'z' \(mapped to prompt\).*columns are a"),
        ("x.jsonl", '{"a": 1}\n', {"mapping": {"promt": "a"}}, r"'promt' is not a field .* id, prompt, answer"),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n', {}, r"row 1 of dataset .*x\.jsonl' has an empty prompt"),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', {}, r"row 1 of dataset .* empty prompt \(column 'prompt'\)"),
        ("x.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', {}, r"line 3 of .*x\.jsonl' is not valid JSON"),
        ("x.jsonl", '{"prompt": "a"}\n[1]\n', {}, r"line 2 of .* must be an object .* but is a list"),
        ("x.jsonl", "", {}, r"dataset .*x\.jsonl' is empty"),
        ("x.jsonl", "\n\n", {}, r"dataset .*x\.jsonl' is empty"),
        ("x.jsonl", b"\xff\xfe", {}, r"cannot be read: UnicodeDecodeError"),
        ("x.json", "[]", {}, r"dataset .* is empty"),
        ("x.json", '{"prompt": "a"}', {}, r"must hold a list of objects, but holds an object"),
        ("x.json", '{"prompt": "a"}\n{"prompt": "b"}', {}, r"with one object per line, name it \.jsonl"),
        ("x.csv", "prompt,answer\n", {}, r"dataset .* is empty"),
        ("x.csv", 'prompt,answer\n"x\n', {}, r"cannot be read: ParserError"),
        ("x.parquet", "not parquet", {}, r"cannot be read"),
        ("x.txt", "a", {}, r"has the extension '\.txt'; readable are \.jsonl, \.json, \.csv, \.parquet"),
        ("x.jsonl", '{"prompt": "a"}\n', {"split": "test"}, r"has no splits, but the split 'test' was asked for"),
        ("x.jsonl", '{"prompt": "a"}\n', {"limit": 0}, r"limit must be at least 1, but is 0"),
        ("x.jsonl", '{"prompt": {"a": 1}}\n', {}, r"row 0 .* column 'prompt' must be text or a list of messages"),
        ("x.jsonl", '{"prompt": [{"from": "human"}]}\n', {}, r"column 'prompt' must be .* with 'role' and 'content'"),
        (
            "x.jsonl",
            '{"prompt": [{"role": "user", "content": ["image"]}]}\n',
            {},
            r"column 'prompt' must be a list of messages whose values are text",
        ),
        ("x.jsonl", '{"prompt": "a", "answer": ["b"]}\n', {}, r"column 'answer' must be text or a number, but is list"),
        (
            "x.jsonl",
            '{"prompt": "a", "completion": "b", "label": "yes"}\n',
            {},
            r"column 'label' must be true or false",
        ),
        (
            "x.jsonl",
            '{"prompt": "a", "s": [1]}\n',
            {"mapping": {"steps": "s"}},
            r"column 's' must be text or a list of",
        ),
        ("x.jsonl", '{"messages": "a"}\n', {}, r"column 'messages' must be a list of messages"),
        (
            "x.jsonl",
            '{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}\n',
            {},
            r"column 'completion' must be of the same kind as the prompt",
        ),
        (
            "x.jsonl",
            '{"chosen": "a", "rejected": [{"role": "assistant", "content": "b"}]}\n',
            {},
            r"column 'rejected' must be of the same kind as chosen",
        ),
        ("x.jsonl", '{"chosen": "a", "rejected": "b"}\n', {}, r"empty prompt \(column 'chosen'\)"),
        (
            "x.jsonl",
            '{"question": "a", "answer": "b #### 1"}\n{"question": "a", "answer": "2"}\n',
            {},
            r"row 1 .* column 'answer' does not end in '#### ANSWER'",
        ),
    ],
)
def test_mistakes_are_sentences(
    tmp_path: Path, name: str, content: str | bytes, options: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message) as caught:
        load_examples(str(tmp_path / name), **options)
    assert "\n" not in str(caught.value)


def test_lists_of_answers(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "1+1?", "completions": ["2", "3", "11"], "labels": [1, 0.5, -2]},
        {"prompt": "2+2?", "completions": ["4", "5"], "labels": [True, False], "source": "me"},
        {"prompt": "3+3?"},
    ]
    for extension in ("jsonl", "json"):
        first, second, third = load_examples(write(tmp_path / f"lists.{extension}", rows))
        assert (first.completions, first.labels) == (("2", "3", "11"), (1.0, 0.5, -2.0))
        assert (second.completions, second.labels, second.columns["source"]) == (("4", "5"), (1.0, 0.0), "me")
        assert third.completions == third.labels == () and "completions" not in first.columns
    chats = [{"prompt": [USER], "completions": [[GOOD], [BAD]], "labels": [1.0, 0.0]}]
    (chat,) = load_examples(write(tmp_path / "chats.jsonl", chats))
    assert chat.completions == ((GOOD,), (BAD,))
    mapped = [{"question": "1+1?", "answers": ["2", "3"], "scores": [9, 3]}]
    mapping = {"prompt": "question", "completions": "answers", "labels": "scores"}
    (example,) = load_examples(write(tmp_path / "mapped.jsonl", mapped), mapping=mapping)
    assert (example.completions, example.labels) == (("2", "3"), (9.0, 3.0))
    # A column of that name that is no list, or alone, is a column like any other.
    plain = [{"prompt": "1+1?", "labels": "easy"}]
    (example,) = load_examples(write(tmp_path / "plain.jsonl", plain))
    assert example.labels == () and example.columns["labels"] == "easy"


@pytest.mark.parametrize(
    ("row", "mapping", "message"),
    [
        ({"completions": ["2"], "labels": [1, 0]}, {}, "list of 1 numbers"),
        ({"completions": ["2", "3"], "labels": [1, "good"]}, {}, "list of 2 numbers"),
        ({"completions": ["2", None], "labels": [1, 0]}, {}, "a list of answers"),
        ({"completions": [[GOOD], [BAD]], "labels": [1, 0]}, {}, "same kind as the prompt"),
        ({"completions": ["2", "3"]}, {"completions": "completions"}, "needs labels too"),
    ],
)
def test_mistakes_in_lists_of_answers(tmp_path: Path, row: dict[str, Any], mapping: Any, message: str) -> None:
    path = write(tmp_path / "lists.jsonl", [{"prompt": "1+1?", **row}])
    with pytest.raises(UsageError, match=message):
        load_examples(path, mapping=mapping)


def test_absent_sources(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file .*nope\.jsonl'"):
        load_examples(str(tmp_path / "nope.jsonl"))
    with pytest.raises(UsageError, match=r"there is no file 'data/nope\.csv'"):
        load_examples("data/nope.csv")
    with pytest.raises(UsageError, match="does not hold a dataset saved by `datasets`"):
        load_examples(str(tmp_path))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["prompt"], "'prompt' is not of the form FIELD=COLUMN"),
        (["=x"], "'=x' is not of the form"),
        (["prompt="], "'prompt=' is not of the form"),
        (["prompt=a", "prompt=b"], "gives 'prompt' twice, as column 'a' and as column 'b'"),
        (["promt=a"], "'promt' is not a field"),
    ],
)
def test_mistakes_in_a_mapping(items: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_mapping(items)


def test_mapping_items() -> None:
    assert parse_mapping([]) == {}
    assert parse_mapping(["prompt=question", "answer = a=b"]) == {"prompt": "question", "answer": "a=b"}
