from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import polopt.cli.main
from polopt.cli.main import COMMANDS, Command
from tests.cli.conftest import Result

ROWS = [{"question": f"{n}+1=", "answer": str(n + 1)} for n in range(20)]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def files(tmp_path: Path) -> None:
    """Input files beside which the command runs."""
    write_rows(tmp_path / "data.jsonl", ROWS)
    write_rows(tmp_path / "blank.jsonl", [*ROWS, {"question": " ", "answer": "3"}])
    (tmp_path / "broken.yaml").write_text("lr: [1", encoding="utf-8")
    (tmp_path / "broken.toml").write_text("lr = = 1", encoding="utf-8")
    (tmp_path / "list.yaml").write_text("- 1", encoding="utf-8")
    (tmp_path / "unknown.yaml").write_text("method: grpo\npromts: 3", encoding="utf-8")
    (tmp_path / "type.yaml").write_text("method: grpo\nprompts: many", encoding="utf-8")
    (tmp_path / "bad.yaml").write_text("method: grpo\n1: 2\nslots: 4", encoding="utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine", encoding="utf-8")


WRONG: list[tuple[str, str]] = [
    ("train gppo", "unknown method 'gppo'; did you mean 'ppo'"),
    ("train", "name a method"),
    ("train grpo --method ppo", "METHOD grpo and --method ppo differ"),
    ("train grpo --promts 3", "unknown option --promts; did you mean --prompts"),
    ("train grpo --objectve.high 1", "unknown slot 'objectve'"),
    ("train grpo --objective.hihg 1", "has no field 'hihg'; it has low, high"),
    ("train grpo --objective.high x", "--objective.high expects float, got 'x'"),
    ("train grpo --advantage nothing", "unknown advantage 'nothing'"),
    ("train grpo --regularizer.beta 1", "the slot is empty; fill it first with --regularizer PART"),
    ("train grpo --models.old.every 1", "there is no 'old'"),
    ("train grpo --schedule.epochs 0", "epochs >= 1"),
    ("train grpo --prompts 0", "--prompts must be at least 1, got 0"),
    ("train grpo --lr 0", "--lr must be above 0"),
    ("train grpo --config broken.yaml", "broken.yaml cannot be read"),
    ("train grpo --config broken.toml", "broken.toml cannot be read"),
    ("train grpo --config list.yaml", "list.yaml must hold settings by name"),
    ("train grpo --config unknown.yaml", "unknown.yaml: unknown setting 'promts'; did you mean 'prompts'"),
    ("train grpo --config type.yaml", "type.yaml: setting 'prompts' cannot be 'many'"),
    ("train grpo --config bad.yaml", "bad.yaml: setting 'slots' cannot be 4"),
    ("train grpo --config absent.yaml", "there is no configuration file absent.yaml"),
    ("train grpo --task chess", "unknown task 'chess': choose one of arithmetic"),
    ("train grpo --level 99", "has no level 99"),
    ("train grpo --task arithmetic --data data.jsonl", "exclude each other"),
    ("train grpo --data absent.jsonl --reward exact-match", "there is no file 'absent.jsonl'"),
    ("train grpo --data data.jsonl --map prompt=query --reward exact-match", "'query'"),
    ("train grpo --data blank.jsonl --map prompt=question --reward exact-match", "has an empty prompt"),
    ("train grpo --data data.jsonl --map prompt=question", "needs a reward"),
    ("train grpo --reward nothing-such", "nothing-such"),
    ("train grpo --model absent/folder/here", "absent/folder/here"),
    ("train grpo --eval-every often", "often"),
    ("train grpo --out full", "full already exists and is not empty"),
    ("train grpo --resume", "--resume needs --out"),
    ("train grpo --resume --out absent", "there is no run to resume in absent"),
    ("train grpo --resume --out full", "there is no run to resume in full"),
    ("train grpo --json absent/summary.json", "there is no folder absent"),
    ("train grpo --json full", "is a folder"),
    ("train grpo --track nowhere", "nowhere"),
    ("eval --data data.jsonl", "needs a reward"),
    ("eval --task chess", "unknown task 'chess'"),
    ("eval --advantage rloo", "unknown option --advantage"),
    ("eval --temperature -1", "temperature is -1"),
    ("trian grpo", "unknown command 'trian'; did you mean 'train'?"),
]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_input_is_one_line_code_2_and_nothing_written(
    line: str, message: str, run: Callable[..., Result], model: str, tmp_path: Path
) -> None:
    arguments = line.split()
    if arguments[0] != "trian" and "--model" not in arguments:
        arguments += ["--model", model]
    before = sorted(tmp_path.rglob("*"))
    result = run(*arguments)
    assert result.code == 2
    assert result.err.startswith("polopt: error: ") and result.err.count("\n") == 1
    assert message in result.err
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "full" / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_value_that_cannot_be_read_is_code_2(run: Callable[..., Result]) -> None:
    result = run("train", "grpo", "--prompts", "many")
    assert result.code == 2
    assert "many" in result.err and "Traceback" not in result.err


def test_help_and_version(run: Callable[..., Result]) -> None:
    for arguments in [(), ("--help",), ("-h",)]:
        shown = run(*arguments)
        assert shown.code == 0
        assert all(name in shown.out for name in COMMANDS)
    assert run("--version").out.startswith("polopt 0.")
    train = run("train", "--help")
    assert train.code == 0
    assert "--eval-prompts" in train.out and "Prompts per iteration." in train.out and "Warning" not in train.err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["eval", "--help"]])
def test_help_waits_for_no_model_library(arguments: list[str]) -> None:
    code = (
        "import sys; from polopt.cli.main import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules); sys.exit(code or 10 * len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "polopt", "no-such-command"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("polopt: error: unknown command 'no-such-command'")


def test_an_interrupt_is_130_and_other_errors_propagate(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: BaseException = KeyboardInterrupt()

    def command(arguments: object) -> int:
        raise raised

    monkeypatch.setattr(polopt.cli.main, "command", command, raising=False)
    monkeypatch.setitem(COMMANDS, "train", Command("polopt.cli.main", "command", ""))
    assert (run("train").code, run("train").err) == (130, "polopt: interrupted\n")
    raised = ZeroDivisionError("a fault of ours")
    with pytest.raises(ZeroDivisionError):
        run("train")
