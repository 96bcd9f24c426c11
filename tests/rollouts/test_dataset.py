"""The data set as a rollout: what becomes of pairs, lists, singles and demonstrations, as text and as numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.example import Example, answers_of, from_plain, plain
from polopt.core.policy import Request
from polopt.core.rollout import Rollout, Source
from polopt.methods.preference.kto import Mismatched
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.rollouts.dataset import Dataset
from tests.training.conftest import make_tiny

PAIR = Example("pair", "1+1=?\n", chosen="#2", rejected="#11")
LIST = Example("list", "2+2=?\n", completions=("#4", "2+2=4;#4", "#22"), labels=(0.5, 1.0, 0.0))
RATED = Example("rated", "1+2=?\n", completions=("#3", "#12", "1+2=3;#3"), labels=(1, 0, 1))
GOOD = Example("good", "1+3=?\n", completion="#4", label=True)
BAD = Example("bad", "1+3=?\n", completion="#13", label=False)
SHOWN = Example("shown", "1+4=?\n", completion="1+4=5;#5")
END = "<end>"


def collect(part: Dataset, *examples: Example, **request: Any) -> Rollout:
    return part(make_tiny(), [Request(e, 1, **request) for e in examples], limit=10, seed=0)


def written(rollout: Rollout) -> list[list[tuple[str, float]]]:
    """Completions and labels by group, without what ends them."""
    payload: Any = rollout.payload
    groups: list[list[tuple[str, float]]] = [[] for _ in range(rollout.n_groups)]
    for group, text, label in zip(rollout.group.tolist(), payload.completions, rollout["label"].tolist(), strict=True):
        groups[group].append((text, label))
    return groups


def tokens(*texts: str) -> list[int]:
    """Tokens of the texts one after the other; `END` is the token that ends a sequence."""
    tokenizer = make_tiny().tokenizer
    found: list[int] = []
    for text in texts:
        found += [tokenizer.eos_token_id] if text == END else tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def test_every_form() -> None:
    assert written(collect(Dataset(), PAIR, LIST)) == [
        [("#2", 1.0), ("#11", 0.0)],
        [("2+2=4;#4", 1.0), ("#22", 0.0)],
    ]
    assert written(collect(Dataset(form="lists"), PAIR, LIST)) == [
        [("#2", 1.0), ("#11", 0.0)],
        [("#4", 0.5), ("2+2=4;#4", 1.0), ("#22", 0.0)],
    ]
    assert written(collect(Dataset(form="singles"), PAIR, GOOD, BAD, RATED, LIST, SHOWN)) == [
        *([("#2", 1.0)], [("#11", 0.0)]),
        *([("#4", 1.0)], [("#13", 0.0)]),
        *([("#3", 1.0)], [("#12", 0.0)], [("1+2=3;#3", 1.0)]),
        *([("2+2=4;#4", 1.0)], [("#22", 0.0)]),
        [("1+4=5;#5", 1.0)],
    ]
    shown = collect(Dataset(form="demonstrations"), PAIR, LIST, GOOD, SHOWN)
    assert written(shown) == [[("#2", 1.0)], [("2+2=4;#4", 1.0)], [("#4", 1.0)], [("1+4=5;#5", 1.0)]]
    assert bool((shown["source"] == Source.DEMONSTRATION).all())


def test_columns() -> None:
    rollout = collect(Dataset(form="lists"), PAIR, LIST, columns={"weighted": 2.5})
    assert bool((rollout["source"] == Source.DATASET).all()) and "logp" not in rollout
    assert rollout["limit"].tolist() == [10] * 5
    assert rollout["weighted"].tolist() == [2.5] * 5
    chosen = rollout.spread(torch.tensor([True, False, False, True, False]))
    assert torch.equal(rollout["mask/chosen"], chosen)
    assert rollout.examples[2].id == "list"


def test_an_answer_ends_with_the_end_of_the_sequence() -> None:
    ended, bare = collect(Dataset(), PAIR), collect(Dataset(end=False), PAIR)
    assert ended["action"].tolist() == tokens("#2", END, "#11", END)
    assert bare["action"].tolist() == tokens("#2", "#11")


def test_a_request_for_nothing_gets_nothing() -> None:
    rollout = Dataset()(make_tiny(), [Request(PAIR, 0), Request(LIST, 3)], limit=10, seed=0)
    assert {example.id for example in rollout.examples} == {"list"} and rollout.n_trajectories == 2


@pytest.mark.parametrize(
    ("form", "example", "message"),
    [
        ("pairs", SHOWN, "'shown' brings no pair"),
        ("pairs", Example("none", "1\n"), "--pairs on-policy"),
        ("lists", GOOD, "'good' brings no list"),
        ("singles", Example("none", "1\n"), "'none' brings no labelled single"),
        ("demonstrations", BAD, "'bad' brings no demonstration"),
        ("pairs", dataclasses.replace(PAIR, rejected="#2"), "equal answers"),
        ("pairs", dataclasses.replace(LIST, labels=(1.0, 1.0, 1.0)), "prefers none"),
        ("lists", dataclasses.replace(LIST, labels=(1.0, math.nan, 0.0)), "not a finite number"),
        ("pairs", dataclasses.replace(PAIR, rejected=""), "'pair' is empty"),
        ("pairs", dataclasses.replace(PAIR, chosen="#" * 5000), "does not fit"),
    ],
)
def test_what_cannot_be_used_is_named_and_can_be_left_out(form: Any, example: Example, message: str) -> None:
    part = Dataset(form=form)
    with pytest.raises(UsageError, match=message):
        collect(part, LIST, example)
    lenient = dataclasses.replace(part, unusable="drop")
    assert {e.id for e in collect(lenient, dataclasses.replace(LIST, id="kept"), example).examples} == {"kept"}
    with pytest.raises(UsageError, match=message):
        collect(lenient, example)


def test_the_pool_is_checked_before_training() -> None:
    Dataset().check([PAIR, LIST])
    with pytest.raises(UsageError, match="'shown' brings no pair"):
        Dataset().check([PAIR, SHOWN])
    Dataset(unusable="drop").check([SHOWN, PAIR])
    with pytest.raises(UsageError, match="'shown' brings no pair"):
        Dataset(unusable="drop").check([SHOWN])


def test_a_chat_is_written_as_the_template_writes_it() -> None:
    policy = make_tiny()
    policy.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    user = ({"role": "user", "content": "Hi"},)
    example = Example(
        "chat",
        user,
        chosen=({"role": "assistant", "content": "Hello"},),
        rejected=({"role": "assistant", "content": "No"},),
    )
    rollout = Dataset()(policy, [Request(example, 1)], limit=10, seed=0)
    payload: Any = rollout.payload
    assert list(payload.prompts[0]) == tokens("<u>Hi<a>")
    # The line break that the template puts behind the end is nothing that the policy would write.
    assert rollout["action"].tolist() == tokens("Hello", END, "No", END)
    plain_answers = dataclasses.replace(example, chosen="Hello", rejected="No")
    again = Dataset()(policy, [Request(plain_answers, 1)], limit=10, seed=0)
    assert torch.equal(again["action"], rollout["action"])
    other = dataclasses.replace(example, chosen=(*user, *example.chosen))  # type: ignore[misc]
    with pytest.raises(UsageError, match="role 'user'"):
        Dataset()(policy, [Request(other, 1)], limit=10, seed=0)
    with pytest.raises(UsageError, match="its prompt is plain text"):
        Dataset()(policy, [Request(dataclasses.replace(example, prompt="Hi"), 1)], limit=10, seed=0)


@pytest.mark.parametrize("end", [True, False])
def test_the_exact_world_writes_numbers(end: bool) -> None:
    policy = ExactPolicy(SequenceSpace(3, 3, end=True), 2)
    example = Example("a", "problem 1", chosen="0 1", rejected="1 0 2", columns={"problem": 1})
    rollout = Dataset(end=end)(policy, [Request(example, 1)], limit=3, seed=0)
    assert rollout["action"].tolist() == ([0, 1, 2] if end else [0, 1]) + [1, 0, 2]
    payload: Any = rollout.payload
    assert payload.problem.tolist() == [1, 1]
    # The nodes are those that sampling would visit.
    sequence = policy.space.sequence_of(payload.nodes[[-1]], payload.ids[[-1]])
    again = policy.rollout(torch.tensor([1]), sequence, torch.tensor([0]))
    again_payload: Any = again.payload
    assert torch.equal(again_payload.nodes, payload.nodes[-3:])


def test_what_does_not_fit_the_exact_space() -> None:
    policy = ExactPolicy(SequenceSpace(3, 2), 1)
    for text in ("0 1 2", "0 3", ""):
        with pytest.raises(UsageError):
            policy.write([Request(Example("0", "p", columns={"problem": 0}), 1)], [text])


def test_answers_of_an_example_and_back_from_a_checkpoint() -> None:
    assert answers_of(LIST) == (("#4", 0.5), ("2+2=4;#4", 1.0), ("#22", 0.0))
    assert answers_of(Example("x", "p")) == ()
    assert from_plain(plain([LIST, PAIR])) == (LIST, PAIR)


def test_mismatched_answers_go_to_other_prompts() -> None:
    rollout = collect(Mismatched(), PAIR, RATED, GOOD)
    probe = rollout["source"] == Source.PROBE
    assert int(probe.sum()) == 6 and bool(rollout["label"][probe].isnan().all())
    payload: Any = rollout.payload
    own = {(payload.prompt_texts[i], payload.completions[i]) for i in (~probe).nonzero().flatten().tolist()}
    moved = [(payload.prompt_texts[i], payload.completions[i]) for i in probe.nonzero().flatten().tolist()]
    assert not own & set(moved)
    # Every answer and every prompt once more.
    assert sorted(text for _, text in moved) == sorted(text for _, text in own)
    assert not bool(rollout["mask/chosen"][rollout.spread(probe)].any())
    assert "source" in rollout and not bool((collect(Mismatched(), PAIR)["source"] == Source.PROBE).any())
