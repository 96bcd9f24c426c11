"""A policy of a few thousand random weights, a small pool, and a reward that such a policy can earn and miss."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.core.example import Example
from polopt.core.loss import Evaluation
from polopt.core.method import Method
from polopt.core.rollout import Rollout
from polopt.methods import get_method
from polopt.policies.causal_lm.payload import TokenPayload
from polopt.policies.causal_lm.policy import CausalLM
from polopt.rewards import NamedReward
from polopt.rewards.scoring import Scorer
from polopt.tasks.answers import with_answers
from polopt.tasks.registry import get_task
from polopt.training.budget import Budget
from polopt.training.build import check_needs
from polopt.training.collect import Collector
from polopt.training.optimizer import make_optimizer
from polopt.training.profile import Profiler
from polopt.training.tracking import make_trackers
from polopt.training.trainer import Optimization, Trainer
from polopt.training.update import BatchStep
from tests.policies.causal_lm.models import byte_tokenizer, tiny

LIMIT = 10
ENDS = tuple(range(0, 256, 7))
"""Tokens that end a completion, so that lengths differ."""
TASK = get_task("arithmetic")
POOL: Sequence[Example] = tuple(with_answers(TASK, TASK.examples(12, seed=0), seed=0))


def even_share(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Share of even tokens."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


EVEN = NamedReward("even", even_share)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of `evaluate`."""

    rows: int
    names: frozenset[str]
    gradient: bool


class CountingPolicy(CausalLM):
    """A language model that notes what it was asked to evaluate and to sample."""

    calls: list[Call]
    sampled: int

    def evaluate(self, rollout: Rollout, names: frozenset[str]) -> Evaluation:
        self.calls.append(Call(rollout.n_trajectories, names, torch.is_grad_enabled()))
        return super().evaluate(rollout, names)

    def sample(self, *args: Any, **options: Any) -> Rollout:
        self.sampled += 1
        return super().sample(*args, **options)


def make_tiny(seed: int = 0) -> CountingPolicy:
    """A fresh policy, the same for the same seed."""
    policy = CountingPolicy(tiny(seed=seed), byte_tokenizer(), default_max_new_tokens=LIMIT)
    policy.calls, policy.sampled = [], 0
    return policy


def short(slug: str, **slots: Any) -> Method:
    """A registered method whose completions end early at some tokens, with its own state and other slots replaced."""
    method = get_method(slug)
    # Of what a window cuts something is long enough to be right; what a data set holds is as long as it is.
    options: dict[str, Any] = {"window": 7} if hasattr(method.rollout, "window") else {}
    options |= {"stop_ids": ENDS} if hasattr(method.rollout, "stop_ids") else {}
    return (method | {"rollout": dataclasses.replace(method.rollout, **options), **slots}).clone()


def make_collector(policy: CausalLM, reward: NamedReward = EVEN, **changes: Any) -> Collector:
    """4 prompts of 4 trajectories at a time."""
    defaults: dict[str, Any] = {"prompts": 4, "group": 4, "limit": LIMIT, "token_budget": 10_000}
    return Collector(policy, POOL, Scorer((reward,), "skip"), profiler=Profiler(enabled=False), **(defaults | changes))


def collected(method: Method, policy: CausalLM, seed: int = 0) -> Rollout:
    """One batch of the method, credited."""
    check_needs(method, policy, (EVEN,))
    kept = make_collector(policy)(method, torch.Generator().manual_seed(seed)).kept
    assert kept is not None
    return method.credit(kept)


def nudge(policy: CausalLM, scale: float = 0.03) -> None:
    """Move every weight a little, as an update would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    policy.version += 1


def make_step(policy: CausalLM, method: Method, batch: Rollout, token_budget: int) -> BatchStep:
    """An update whose rejections fail the test."""

    def on_reject(reason: str, batch: Rollout) -> None:
        raise AssertionError(reason)

    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    return BatchStep(policy, method, batch, optimizer, token_budget, on_reject)


def gradients(policy: CausalLM) -> list[Tensor]:
    """The gradient of each parameter, zeros where it has none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.parameters()]


def same_gradients(found: Sequence[Tensor], expected: Sequence[Tensor], rel: float = 1e-4) -> None:
    """Equal up to ``rel`` of the norm of the whole gradient."""
    whole = torch.cat([g.flatten() for g in expected])
    difference = torch.cat([g.flatten() for g in found]) - whole
    assert float(whole.norm()) > 0
    assert float(difference.norm()) <= rel * float(whole.norm())


def plain_evaluation(policy: CausalLM, batch: Rollout) -> Evaluation:
    """``logp``, ``entropy``, values by one padded forward pass of the Hugging Face model, for all rows at once."""
    payload = batch.payload
    assert isinstance(payload, TokenPayload)
    prompts = [payload.prompts[i] for i in payload.prompt_of.tolist()]
    rows = [[*p, *ids.tolist()] for p, ids in zip(prompts, payload.ids.split(payload.lengths.tolist()), strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    attention = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    out = policy.model(input_ids=ids, attention_mask=attention, output_hidden_states=True)
    places = [(i, t) for i, (p, row) in enumerate(zip(prompts, rows, strict=True)) for t in range(len(p), len(row))]
    row, time = torch.tensor(places).T
    probabilities = out.logits[row, time - 1].float().log_softmax(-1)
    columns = {
        "logp": probabilities.gather(1, ids[row, time][:, None])[:, 0],
        "entropy": -(probabilities.exp() * probabilities).sum(-1),
    }
    if "kept" in batch:
        bits = np.unpackbits(batch["kept"].numpy(), axis=1, count=probabilities.shape[1], bitorder="little")
        inside = (probabilities.exp() * torch.from_numpy(bits)).sum(-1)
        columns["masked_logp"] = columns["logp"] - inside.log()
    if policy.critic is not None:
        hidden = out.hidden_states[-1][row, time - 1]
        heads = {f"value/{k}": policy.critic(hidden, k) for k in range(1, policy.critic.heads + 1)}
        columns |= heads | {"value": heads["value/1"]}
    return Evaluation(columns)


def make_trainer(run: Path, method: Method, policy: CausalLM | None = None, **changes: Any) -> Trainer:
    """A trainer of the tiny policy, without a command line around it."""
    policy = policy or make_tiny()
    check_needs(method, policy, (changes.get("reward", EVEN),))
    run.mkdir(parents=True, exist_ok=True)
    collector = make_collector(policy, changes.pop("reward", EVEN), prompts=changes.pop("prompts", 4))
    settings: dict[str, Any] = {"budget": Budget(steps=3), "seed": 0, "optimization": Optimization(1e-2)}
    trackers = make_trackers([], run)
    trackers.start({}, resume=False)
    return Trainer(
        policy=policy,
        method=method,
        collect=collector,
        optimizer=make_optimizer(policy.parameters(), 1e-2, weight_decay=0.0, betas=(0.9, 0.999)),
        run=run,
        trackers=trackers,
        **(settings | changes),
    )


@pytest.fixture
def policy() -> CountingPolicy:
    """A fresh tiny policy."""
    return make_tiny()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny policy as a user would have it on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny().save(folder)
    return folder


@pytest.fixture(scope="session")
def even_spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`even_share` as a user's own reward file."""
    path = tmp_path_factory.mktemp("rewards") / "even.py"
    path.write_text(
        "def even_share(completion_ids, **_):\n"
        "    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]\n",
        encoding="utf-8",
    )
    return f"{path}:even_share"


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty prompts with answers as a user's own data, of which the last four are held out."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    examples = get_task("arithmetic").examples(40, seed=1)
    path.write_text("".join(json.dumps({"prompt": e.prompt, "answer": e.answer}) + "\n" for e in examples))
    return path


@pytest.fixture(scope="session")
def small_run(model_folder: Path, even_spec: str, rows: Path) -> Callable[..., Any]:
    """A configuration of a run that takes half a second; options replace or add settings."""
    from polopt.training.config import RunConfig

    def make(out: Path, slots: Mapping[str, Any] | None = None, **options: Any) -> RunConfig:
        settings: dict[str, Any] = {
            "model": str(model_folder),
            "data": str(rows),
            "reward": (even_spec,),
            "prompts": 2,
            "group": 4,
            "lr": 1e-2,
            "eval_prompts": 4,
            "steps": 3,
            "track": ("none",),
            "device": "cpu",
            "threads": 1,
            "out": str(out),
        }
        return RunConfig(
            **(settings | options),
            slots={"rollout.max_new_tokens": LIMIT, "rollout.stop_ids": ENDS, **(slots or {})},
        )

    return make
