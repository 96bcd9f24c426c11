"""The reward model: its loss against a loop and against TRL's own, what it writes, and what reads it again."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from benchmarks.trl_loss import OneProcess
from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.override import override
from polopt.core.policy import Request
from polopt.core.rollout import Rollout
from polopt.methods import get_method
from polopt.methods.preference.reward_model import BradleyTerry
from polopt.policies.causal_lm.policy import CausalLM
from polopt.rewards import parse_reward
from polopt.rewards.models import Options, RewardModel
from polopt.rewards.uncertainty import information_gain, pair_uncertainty
from polopt.training.config import RunConfig
from polopt.training.run import train
from tests.policies.causal_lm.models import EOS, SIZES, byte_tokenizer, tiny
from tests.support import close, f64, now, same

METHOD = get_method("reward-model")
IDS = [0, 0, 0, 1, 1, 2, 2, 2, 3, 4]
GROUP = [0, 0, 1, 1, 1]
LABEL = [0.0, 1.0, 3.0, 1.0, 2.0]
VALUE = [9.0, -7.0, 0.4, 9.0, 1.1, 5.0, 0.3, 8.0, -0.2, 0.9]
MASK = [1, 1, 1, 1, 1, 1, 1, 0, 1, 1]
# The value at the last step that trains.
REWARD = [0.4, 1.1, 0.3, -0.2, 0.9]


def batch(**columns: Any) -> Rollout:
    return Rollout.from_arrays(
        IDS,
        GROUP,
        step={"mask": torch.tensor(MASK).bool()},
        trajectories={"label": f64(LABEL), **{name: f64(value) for name, value in columns.items()}},
    )


def oracle(reward: list[float], margin: list[float] | None = None, centring: float = 0.0) -> float:
    groups = []
    for g in sorted(set(GROUP)):
        members = [i for i in range(len(GROUP)) if GROUP[i] == g]
        terms = [
            math.log1p(math.exp(-(reward[w] - reward[loser] - (margin[w] if margin else 0.0))))
            + centring * (reward[w] + reward[loser]) ** 2
            for w in members
            for loser in members
            if LABEL[w] > LABEL[loser]
        ]
        groups.append(sum(terms) / len(terms))
    return sum(groups) / len(groups)


@pytest.mark.parametrize(("centring", "margin"), [(0.0, None), (0.05, None), (0.01, [0.0, 0.5, 0.3, 0.0, -0.2])])
def test_the_loss_is_that_of_a_loop_over_pairs(centring: float, margin: list[float] | None) -> None:
    method = METHOD | {"objective": BradleyTerry(margin=None if margin is None else "gap", centring=centring)}
    rollout = batch() if margin is None else batch(gap=margin)
    loss, metrics = method.loss(now([0.0] * 10, value=VALUE), rollout)
    same(loss, oracle(REWARD, margin, centring), rtol=1e-6)
    # 1 over 0 leads; of the list only 4 over 3 and 2 over 3 do, 2 over 4 does not.
    close(metrics["rewards/accuracies"], (1 + 2 / 3) / 2)
    close(metrics["rewards/margins"], (0.7 + ((0.3 + 0.2) + (0.3 - 0.9) + (0.9 + 0.2)) / 3) / 2)


def test_only_the_last_trainable_step_of_an_answer_has_a_gradient() -> None:
    evaluation = now([0.0] * 10, value=VALUE)
    loss, _ = METHOD.loss(evaluation, batch())
    (gradient,) = torch.autograd.grad(loss, evaluation["value"])
    # d/dr of log(1 + exp(-gap)) is -sigma(-gap), half a batch each.
    expected = torch.zeros(10, dtype=torch.float64)
    expected[2], expected[4] = 0.5 / (1 + math.exp(0.7)), -0.5 / (1 + math.exp(0.7))
    same(gradient[:5], expected[:5], rtol=1e-6)
    assert (gradient != 0).nonzero().flatten().tolist() == [2, 4, 6, 8, 9]


def test_equal_labels_teach_nothing() -> None:
    evaluation = now([0.0] * 10, value=VALUE)
    loss, _ = METHOD.loss(evaluation, batch().with_columns(trajectory={"label": torch.ones(5)}))
    assert float(loss.detach()) == 0.0


def test_heads_are_averaged() -> None:
    method = METHOD | {"objective": BradleyTerry(heads=2)}
    other = [-v for v in VALUE]
    loss, metrics = method.loss(now([0.0] * 10, **{"value/1": VALUE, "value/2": other}), batch())
    same(loss, (oracle(REWARD) + oracle([-r for r in REWARD])) / 2, rtol=1e-6)
    # Two opposite heads lead nowhere.
    assert float(metrics["rewards/accuracies"]) == 0.0
    with pytest.raises(UsageError, match="at least one head"):
        BradleyTerry(heads=0)


# --- TRL --------------------------------------------------------------------------------------------------------------


PAIRS = [("1+2=", "3", "four"), ("a longer prompt: ", "yes, it is", "no"), ("?", "!!!!!!!", "??")]


@pytest.mark.parametrize("margins", [None, [0.3, 0.0, 1.5]])
@pytest.mark.parametrize("centring", [None, 0.02])
def test_loss_and_gradient_are_those_of_trl(margins: list[float] | None, centring: float | None) -> None:
    trainer = pytest.importorskip(
        "trl.trainer.reward_trainer", reason="the parity test compares with TRL"
    ).RewardTrainer
    policy = CausalLM(tiny().double(), byte_tokenizer())
    policy.add_critic()
    assert policy.critic is not None
    torch.manual_seed(1)
    torch.nn.init.normal_(policy.critic.linear.weight, std=0.3)
    # TRL's kind of model, with the same trunk and head (its own has no bias).
    config = transformers.Qwen3Config(**{**SIZES, "num_labels": 1})
    theirs = transformers.Qwen3ForSequenceClassification(config).eval()
    theirs.model.load_state_dict(policy.model.model.state_dict())
    theirs.score.weight.data.copy_(policy.critic.linear.weight.data)

    made: Any = object.__new__(trainer)
    made.model, made.accelerator, made.loss_is_scaled_for_ga = theirs, OneProcess(), False
    made.args = SimpleNamespace(center_rewards_coefficient=centring)
    made._metrics, made._total_train_tokens, made._tp_size = (
        {"train": defaultdict(list), "eval": defaultdict(list)},
        0,
        1,
    )
    sides = [[[*policy.tokenizer(x + pair[side])["input_ids"]] for x, *pair in PAIRS] for side in (0, 1)]
    rows = [torch.tensor(ids) for side in sides for ids in side]
    inputs: dict[str, Tensor] = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=EOS),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True),
    }
    if margins is not None:
        inputs["margin"] = torch.tensor(margins)
    expected = trainer.compute_loss(made, theirs, inputs)
    expected.backward()

    examples = [
        Example(str(i), x, chosen=chosen, rejected=rejected, columns={"margin": margins[i]} if margins else {})
        for i, (x, chosen, rejected) in enumerate(PAIRS)
    ]
    method = METHOD | {"objective": BradleyTerry(margin=margins and "margin", centring=centring or 0.0)}  # type: ignore[arg-type]
    if margins is not None:
        method = override(method, {"reward": "example-columns", "reward.names": "margin"})
    rollout = method.rollout(policy, [Request(e, 2) for e in examples], limit=64, seed=0)
    rollout = method.shape_reward(rollout)
    loss, metrics = method.loss(policy.evaluate(rollout, method.evaluates), rollout)
    loss.backward()

    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(metrics["rewards/accuracies"]) == pytest.approx(made._metrics["eval"]["accuracy"][0])
    assert float(metrics["rewards/margins"]) == pytest.approx(made._metrics["eval"]["margin"][0], rel=1e-5)
    own = dict(policy.model.model.named_parameters())
    errors = {
        name: float((own[name].grad - p.grad).norm() / p.grad.norm()) for name, p in theirs.model.named_parameters()
    }
    errors["score"] = float(
        (policy.critic.linear.weight.grad - theirs.score.weight.grad).norm() / theirs.score.weight.grad.norm()
    )
    assert max(errors.values()) < 1e-5, errors


# --- the trained model as a reward ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A reward model of two heads with a scale."""
    policy = CausalLM(tiny(), byte_tokenizer())
    policy.add_critic(heads=2)
    policy.save(tmp_path / "rm")
    (tmp_path / "rm" / "reward.json").write_text(json.dumps({"mean": [0.5, -1.0], "std": [2.0, 0.25]}))
    return tmp_path / "rm"


def by_hand(folder: Path, prompt: str, answer: str, mask: Tensor | None = None) -> list[float]:
    """The heads on the final hidden state at the last token of prompt and answer."""
    policy = CausalLM.load(folder, device="cpu")
    policy.load_critic(folder)
    ids = policy.tokenizer(prompt + answer)["input_ids"]
    with torch.no_grad():
        hidden = policy.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        assert policy.critic is not None
        found: list[float] = policy.critic.linear(hidden if mask is None else hidden * mask).tolist()
    return found


def test_an_answer_is_scored_at_its_last_token(folder: Path) -> None:
    prompts, answers = ["1+1=", "a long question? ", "x"], ["2", "", "a much longer answer"]
    model = RewardModel.load(folder, device="cpu")
    found = model.scores(prompts, answers, Options(normalize=False))
    expected = f64([by_hand(folder, p, a) for p, a in zip(prompts, answers, strict=True)]).T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    scaled = model.scores(prompts, answers)
    torch.testing.assert_close(scaled, (expected - f64([[0.5], [-1.0]])) / f64([[2.0], [0.25]]), rtol=1e-4, atol=1e-4)


def test_an_ensemble_reduces_its_rewards(folder: Path, tmp_path: Path) -> None:
    policy = CausalLM(tiny(seed=1), byte_tokenizer())
    policy.add_critic(heads=2)
    policy.save(tmp_path / "other")
    spec = f"model:{folder}+{tmp_path / 'other'}"
    prompts, answers = ["1+1=", "?"], ["2", "maybe"]
    rows = torch.cat(
        [
            (f64([by_hand(folder, *pair) for pair in zip(prompts, answers, strict=True)]).T - f64([[0.5], [-1.0]]))
            / f64([[2.0], [0.25]]),
            f64([by_hand(tmp_path / "other", *pair) for pair in zip(prompts, answers, strict=True)]).T,
        ]
    )
    for options, expected in {
        "": rows.mean(0),
        ",reduce=min": rows.amin(0),
        ",reduce=pessimistic,k=0.5": rows.mean(0) - 0.5 * (rows - rows.mean(0)).square().mean(0).sqrt(),
    }.items():
        reward = parse_reward(spec + options + "@0.5", device="cpu")
        assert reward.weight == 0.5
        found = reward.function(prompts=prompts, completions=answers)
        torch.testing.assert_close(f64(found), expected, rtol=1e-4, atol=1e-4)


def test_dropout_draws_once_for_all_answers_of_a_pass(folder: Path) -> None:
    model = RewardModel.load(folder, device="cpu")
    options = Options(normalize=False, dropout=0.25, passes=400, seed=3)
    prompts, answers = ["1+1=", "1+1=", "?"], ["2", "2", "maybe"]
    found = model.scores(prompts, answers, options).view(400, 2, 3)
    torch.testing.assert_close(found[..., 0], found[..., 1], rtol=1e-4, atol=1e-5)
    assert torch.equal(found, model.scores(prompts, answers, options).view(400, 2, 3))
    # Unbiased: the mean over passes is the reward without dropout, up to its own standard error.
    plain = f64([by_hand(folder, p, a) for p, a in zip(prompts, answers, strict=True)]).T
    error = found.std(0) / 400**0.5
    assert bool((found.std(0) > 0).all())
    assert bool(((found.mean(0) - plain).abs() < 4 * error).all())
    gain = pair_uncertainty(found[:, 0], torch.tensor([0, 0]), torch.tensor([1, 2]))
    assert float(gain[0]) == pytest.approx(0.0, abs=1e-6) and float(gain[1]) > 1e-6


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("model", "model:FOLDER"),
        ("model:nowhere", "holds no reward model"),
        ("model:{folder},reduce=max", "reduced by mean, min, pessimistic"),
        ("model:{folder},size=3", "has no option 'size=3'"),
        ("model:{folder},k=nan", "cannot be 'nan'"),
        ("model:{folder},passes=3", "several passes dropout"),
    ],
)
def test_a_wrong_specification_says_why(folder: Path, given: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_reward(given.format(folder=folder), device="cpu")


def test_a_damaged_scale_is_no_scale(folder: Path) -> None:
    (folder / "reward.json").write_text(json.dumps({"mean": [0.0], "std": [1.0]}))
    with pytest.raises(UsageError, match="each of 2 heads"):
        RewardModel.load(folder, device="cpu")


def test_a_trained_model_scores_the_answers_of_a_policy(tmp_path: Path) -> None:
    """From pairs to a reward model to a policy, as the command line does it."""
    rows = [{"prompt": f"{i}=", "chosen": "a" * (1 + i % 3), "rejected": "b" * (1 + i % 2)} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    CausalLM(tiny(initializer_range=0.1), byte_tokenizer()).save(tmp_path / "start")
    common: dict[str, Any] = {
        "model": str(tmp_path / "start"),
        "data": str(tmp_path / "pairs.jsonl"),
        "prompts": 8,
        "group": 2,
        "track": ("none",),
        "device": "cpu",
        "strict": True,
    }
    summary = train(RunConfig(method="reward-model", steps=30, lr=3e-3, out=str(tmp_path / "rm"), **common), quiet=True)
    # Two rows were held out; a is better than b in all.
    assert (summary["prompts"], summary["accuracy_after"]) == (2.0, 1.0)
    model = RewardModel.load(tmp_path / "rm", device="cpu")
    training = rows[:18]
    scores = model.scores(
        [r["prompt"] for r in training for _ in "ab"], [r[side] for r in training for side in ("chosen", "rejected")]
    )[0]
    same([scores.mean(), scores.std()], [0.0, 1.0], rtol=1e-4, atol=1e-4)
    assert bool((scores[::2] > scores[1::2]).all())
    reward = f"model:{tmp_path / 'rm'}"
    # Bytes that are no text are three bytes each when they are read again.
    short = {"rollout.max_new_tokens": 8}
    out = str(tmp_path / "run")
    train(RunConfig(method="grpo", steps=1, reward=(reward,), out=out, slots=short, **common), quiet=True)
    logged = (tmp_path / "run" / "before.json").read_text()
    assert math.isfinite(json.loads(logged)["eval/reward"])


# --- uncertainty: the worked example of arXiv:2409.11212's card -------------------------------------------------------


def test_information_gain_is_that_of_the_worked_example() -> None:
    chance = f64(
        [
            [[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]],
            [[0.8, 0.2], [0.1, 0.9], [0.3, 0.7]],
            [[0.95, 0.05], [0.7, 0.3], [0.6, 0.4]],
        ]
    )
    close(information_gain(chance), [0.01889697, 0.15460366, 0.06239830], 8)
    same(information_gain(chance.flip(2)), information_gain(chance))
    same(information_gain(chance[[2, 0, 1]]), information_gain(chance))
    same(information_gain(chance[:1].expand(5, 3, 2)), [0.0] * 3)
    same(information_gain(f64([[[1.0, 0.0]], [[0.0, 1.0]]])), [math.log(2)])
