"""GSM8K's file of model solutions as lists, pairs and labels, and a reward model that learns from it."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from polopt.core.errors import UsageError
from polopt.core.statistics import accuracy_interval, clustered_mean_interval
from polopt.rewards.models import RewardModel
from polopt.rollouts.dataset import groups_of
from polopt.tasks.datasets import load_examples
from polopt.training.config import RunConfig
from polopt.training.run import train

FILE = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k" / "example_model_solutions.jsonl"
real_data = pytest.mark.skipif(not FILE.is_file(), reason=f"the data set {FILE.name} is not beside the repository")

ROWS: list[dict[str, Any]] = [
    {
        "question": "How many eggs are left of 16 after 3 and 4?",
        "ground_truth": "There are 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nA: 9",
        "small": {"is_correct": False, "solution": "16 - 3 = <<16-3=13>>13\nA: 13"},
        "large": {"is_correct": True, "solution": "16 - 7 = <<16-7=9>>9\nA: 9"},
    },
    {
        "question": "What is 1 + 1?",
        "ground_truth": "1 + 1 = 2\nA: 2",
        "small": {"is_correct": True, "solution": "A: 2"},
        "large": {"is_correct": True, "solution": "It is 2.\nA: 2"},
    },
]


def written(rows: Sequence[Mapping[str, Any]], path: Path) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return str(path)


def test_solutions_are_read_as_labelled_answers(tmp_path: Path) -> None:
    first, second = load_examples(written(ROWS, tmp_path / "s.jsonl"))
    assert first.prompt == ROWS[0]["question"] and first.id == "s/0"
    assert first.completions == (ROWS[0]["small"]["solution"], ROWS[0]["large"]["solution"])
    assert first.labels == (0.0, 1.0) and second.labels == (1.0, 1.0)
    assert first.answer == "9" and first.steps == ("There are 16 - 3 - 4 = 9 eggs.",)
    right, wrong = ROWS[0]["large"]["solution"], ROWS[0]["small"]["solution"]
    assert groups_of(first, "pairs") == [((right, 1.0), (wrong, 0.0))]
    assert groups_of(first, "lists") == [((wrong, 0.0), (right, 1.0))]
    assert groups_of(first, "singles") == [((wrong, 0.0),), ((right, 1.0),)]
    assert groups_of(first, "demonstrations") == [((right, 1.0),)]
    assert groups_of(second, "singles") == [(("A: 2", 1.0),), (("It is 2.\nA: 2", 1.0),)]
    for form in ("pairs", "lists"):
        with pytest.raises(UsageError, match="prefers none"):
            groups_of(second, form)


@pytest.mark.parametrize("broken", [{"solution": "A: 2"}, {"is_correct": True, "solution": " "}, None, "A: 2"])
def test_a_row_without_a_solution_is_named(tmp_path: Path, broken: Any) -> None:
    rows = [ROWS[0], {**ROWS[1], "large": broken}]
    with pytest.raises(UsageError, match=r"row 1 .*'large'"):
        load_examples(written(rows, tmp_path / "s.jsonl"))


def test_a_mapping_takes_the_columns_as_they_are(tmp_path: Path) -> None:
    (example, _) = load_examples(written(ROWS, tmp_path / "s.jsonl"), mapping={"prompt": "question"})
    assert example.completions == () and example.columns["large"]["is_correct"] is True


@real_data
def test_the_real_file_is_read_whole() -> None:
    examples = load_examples(str(FILE))
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    assert len(examples) == len(rows) == 1319
    assert len({example.prompt for example in examples}) == 1319, "a problem in two rows could be trained and held out"
    assert all(example.answer and len(example.completions) == 4 for example in examples)
    right = sum(row[name]["is_correct"] for row in rows for name in row if isinstance(row[name], dict))
    assert sum(sum(example.labels) for example in examples) == right == 2001
    assert sum(len(set(example.labels)) > 1 for example in examples) == 731


# --- a Bradley-Terry model on real solutions --------------------------------------------------------------------------

HELD_OUT, VOCABULARY, HIDDEN = 330, 1000, 64


def small_model(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """A random model of 64 hidden units and two layers, and a tokenizer made from the training rows."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for row in rows for text in (row["question"], *(said["solution"] for said in of_models(row)))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    config = transformers.Qwen3Config(
        vocab_size=len(fast),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HIDDEN // 4,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def of_models(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [value for value in row.values() if isinstance(value, dict)]


@real_data
def test_a_reward_model_of_real_solutions_is_above_chance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained on 989 problems, 731 - 189 of which have right and wrong solutions; judged on the 330 others.

    The settings were fixed before the held-out problems were looked at.
    """
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    held, rest = [rows[i] for i in order[:HELD_OUT]], [rows[i] for i in order[HELD_OUT:]]
    assert not {row["question"] for row in held} & {row["question"] for row in rest}
    small_model(rest, tmp_path / "start")
    summary = train(
        RunConfig(
            method="reward-model",
            model=str(tmp_path / "start"),
            data=written(rest, tmp_path / "train.jsonl"),
            eval_data=written(held, tmp_path / "held.jsonl"),
            steps=60,
            prompts=16,
            lr=2e-3,
            lr_schedule="cosine",
            device="cpu",
            threads=1,
            track=("none",),
            out=str(tmp_path / "run"),
            slots={"rollout.form": "lists", "rollout.unusable": "drop"},
        ),
        quiet=True,
    )
    model = RewardModel.load(tmp_path / "run", device="cpu")
    examples = [e for e in load_examples(str(tmp_path / "held.jsonl")) if len(set(e.labels)) > 1]
    scores = model.scores(
        [e.prompt for e in examples for _ in e.completions], [text for e in examples for text in e.completions]
    )[0].view(len(examples), 4)
    leads: list[list[bool]] = []
    longer: list[float] = []
    for e, score in zip(examples, scores.tolist(), strict=True):
        pairs = [(w, i) for w in range(4) for i in range(4) if e.labels[w] > e.labels[i]]
        leads.append([score[w] > score[i] for w, i in pairs])
        sizes = [len(text) for text in e.completions]
        longer += [(sizes[w] > sizes[i]) + (sizes[w] == sizes[i]) / 2 for w, i in pairs]
    every = [lead for members in leads for lead in members]
    low, high = accuracy_interval(sum(every), len(every))
    problems = torch.tensor([sum(members) / len(members) for members in leads])
    fair = clustered_mean_interval(problems, torch.arange(len(problems)))
    with capsys.disabled():
        print(
            f"\nheld-out pairs {len(every)} of {len(leads)} problems: accuracy {sum(every) / len(every):.3f} "
            f"[{low:.3f}, {high:.3f}], mean over problems {fair.mean:.3f} [{fair.low:.3f}, {fair.high:.3f}]; "
            f"the longer wins {sum(longer) / len(longer):.3f}"
        )
    # What the run reports is the mean over all held-out problems that have a pair.
    assert summary["accuracy_after"] == pytest.approx(fair.mean, abs=5e-3)
    assert low > 0.5
    # Pairs of one problem are not independent: problems are.
    assert fair.low > 0.5
    # The scale of the trained rewards was stored, so that those of training answers have mean 0 and variance 1.
    assert model.std is not None and abs(float(scores.mean())) < 0.5 and 0.3 < float(scores.std()) < 3
