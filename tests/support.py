"""Random batches for any method, whatever columns it needs, and what the property tests do with them.

The functionals of the current policy ride along as step columns ``now/<name>``, so that whatever is done to a rollout
(select, split, pad, relabel) is done to the evaluation as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from polopt.core.loss import Evaluation
from polopt.core.method import Method
from polopt.core.part import declared
from polopt.core.rollout import Rollout, Source

NOW = "now/"

# The batch of the methods' worked examples: four responses of two prompts, ten steps.
IDS = [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
GROUPS = [0, 0, 1, 1]
REWARDS = [1.0, 0.0, 1.0, 0.5]
OLD = [-0.5, -1.0, -0.2, -0.7, -1.5, -0.3, -2.0, -0.4, -0.9, -1.2]
REF = [-0.6, -0.9, -0.3, -0.7, -1.3, -0.5, -1.8, -0.4, -1.0, -1.1]
DELTA = [0.3, -0.1, 0.05, 0.4, -0.5, 0.0, 0.6, -0.3, 0.1, -0.05]


def f64(values: Any) -> Tensor:
    """Array-likes as float64."""
    return torch.as_tensor(values, dtype=torch.float64)


def worked(groups: Sequence[int] = GROUPS, rewards: Sequence[float] = REWARDS, **step: Any) -> Rollout:
    """The worked examples' batch in float64; ``logp__ref`` adds the step column ``logp/ref``."""
    columns = {"logp": f64(OLD), **{name.replace("__", "/"): f64(value) for name, value in step.items()}}
    return Rollout.from_arrays(IDS, list(groups), step=columns, trajectories={"reward": f64(rewards)})


def now(logp: Any, **others: Any) -> Evaluation:
    """An evaluation whose columns are leaves that collect gradients."""
    columns = {"logp": logp, **others}
    return Evaluation({name: f64(value).detach().clone().requires_grad_() for name, value in columns.items()})


def value_and_gradient(
    method: Method, evaluation: Evaluation, rollout: Rollout, name: str = "logp"
) -> tuple[float, Tensor]:
    """The method's loss of an already credited rollout, and its gradient in one functional of the policy."""
    loss, _ = method.loss(evaluation, rollout)
    (gradient,) = torch.autograd.grad(loss, evaluation[name])
    return float(loss.detach()), gradient


def with_advantage(rollout: Rollout, advantage: Any) -> Rollout:
    """The rollout with an advantage given per trajectory or per step."""
    return rollout.with_columns(step={"advantage": rollout.spread(f64(advantage))})


def close(actual: Any, expected: Any, digits: int = 6) -> None:
    """Equal to this many decimals, as printed on the cards."""
    torch.testing.assert_close(f64(actual), f64(expected), rtol=0, atol=0.51 * 10**-digits)


def same(actual: Any, expected: Any, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Equal to rounding of float64."""
    torch.testing.assert_close(f64(actual), f64(expected), rtol=rtol, atol=atol)


# --- random batches ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which steps and trajectories a random batch has."""

    lengths: tuple[int, ...]
    groups: tuple[int, ...]
    masked: tuple[int, ...] = ()
    """Steps that do not train."""
    invalid: tuple[int, ...] = ()
    """Trajectories whose reward could not be computed."""
    equal: bool = False
    """Every reward is the same."""


# Unequal groups, in no order; a group of one (2); a trajectory without trainable step (3); masked steps at the start,
# inside and at the end of others.
MIXED = Layout((3, 2, 4, 2, 1, 5, 3, 2), (1, 0, 1, 1, 2, 0, 0, 1), masked=(0, 6, 9, 10, 16, 19))

LAYOUTS = {
    "mixed": MIXED,
    "invalid rewards": dataclasses.replace(MIXED, invalid=(1, 2, 4)),
    "all rewards invalid": Layout((2, 3, 1), (0, 0, 1), invalid=(0, 1, 2)),
    "equal rewards": dataclasses.replace(MIXED, equal=True),
    "one step each": Layout((1,) * 6, (0, 0, 1, 1, 1, 2), masked=(3,)),
    "a single trajectory": Layout((4,), (0,)),
    "groups of one": Layout((2, 3, 1), (0, 1, 2)),
    "nothing trains": Layout((2, 1), (0, 0), masked=(0, 1, 2)),
}


def make_column(name: str, layout: Layout, generator: torch.Generator) -> tuple[str, Tensor]:
    """The level and random values of a column with this name; a step column where the name means nothing special."""
    steps, count = sum(layout.lengths), len(layout.lengths)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    match name.partition("/")[0].partition("@")[0]:
        case "logp" | "masked_logp":
            return "step", -0.05 - 2 * torch.rand(steps, generator=generator, dtype=torch.float64)
        case "value" | "return" | "step_reward":
            return "step", torch.randn(steps, generator=generator, dtype=torch.float64)
        case "action":
            return "step", torch.randint(3, (steps,), generator=generator)
        case "hidden":
            return "step", torch.randn(steps, 4, generator=generator, dtype=torch.float64)
        case "top_id":
            return "step", torch.rand(steps, 5, generator=generator).argsort(1)[:, :3]
        case "top_logp":
            chance = torch.randn(steps, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
            return "step", -0.1 + chance.sort(1, descending=True).values
        case "mask":
            mask = torch.ones(steps, dtype=torch.bool)
            mask[list(layout.masked)] = False
            return "step", mask
        case "reward":
            reward = torch.full_like(uniform, 0.7) if layout.equal else uniform
            reward[list(layout.invalid)] = torch.nan
            return "trajectory", reward
        case "score":
            return "trajectory", (uniform > 0.5).double()
        case "limit":
            return "trajectory", torch.full((count,), max(layout.lengths) + 1)
        case "baseline" | "score_norm":
            return "trajectory", 0.1 + uniform
        case "role":
            return "trajectory", (5 * uniform).long()
        case "smoothing":
            return "trajectory", uniform / 2
        case "truncated" | "unfinished" | "opponent" | "gold":
            return "trajectory", uniform > 0.6
        case "label":
            # Grades with ties: lists, some of them with equal best answers.
            return "trajectory", (3 * uniform).floor() / 2
        case "draft":
            return "trajectory", (3 * uniform).long() - 1
        case "answer":
            return "trajectory", (2 * uniform).long()
        case "turn":
            return "step", torch.cat([torch.arange(length) // 2 for length in layout.lengths])
        case "segment":
            return "step", _forest(layout)[0 if name == "segment/start" else 1]
        case "state":
            return "trajectory", _forest(layout)[2]
        case "hellinger":
            return "step", torch.rand(steps, generator=generator, dtype=torch.float64)
        case "max_entropy":
            return "step", torch.full((steps,), 2.0, dtype=torch.float64)
        case "version":
            return "trajectory", torch.zeros(count, dtype=torch.int64)
        case "source":
            return "trajectory", torch.where(uniform > 0.6, int(Source.TEMPERED), int(Source.POLICY))
        case _:
            return "step", 0.1 + torch.rand(steps, generator=generator, dtype=torch.float64)


def _forest(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """A tree per group: node below which each step lies, node to which it leads, leaf of each trajectory.

    The first half of a trajectory's trainable steps leads to one of two nodes below the root, which its group shares.
    Every segment has a trainable step, so that what trailing masked steps hold is nothing new.
    """
    start, end, leaves = [], [], []
    place = 0
    for i, (length, group) in enumerate(zip(layout.lengths, layout.groups, strict=True)):
        root, middle, leaf = group, 1000 + 2 * group + i % 2, 2000 + i
        active = [place + t not in layout.masked for t in range(length)]
        half = sum(active) // 2
        for t in range(length):
            first = min(sum(active[:t]), sum(active) - 1) < half
            start.append(root if first or not half else middle)
            end.append(middle if first else leaf)
        leaves.append(leaf)
        place += length
    return torch.tensor(start), torch.tensor(end), torch.tensor(leaves)


def needed(method: Method) -> frozenset[str]:
    """Every column that must exist before the method's reward part runs, and what its filter would add."""
    given = (declared(part, "gives") for part in (method.curriculum, method.rollout, method.filter))
    return method.needs.union(*given)


def batch(method: Method, layout: Layout = MIXED, seed: int = 0, *, on_policy: bool = False) -> Rollout:
    """A random float64 rollout with every column that the method needs and everything that it evaluates.

    The current policy has moved by 0.2 per step (in log-prob) from the one that sampled, not at all ``on_policy``.
    """
    generator = torch.Generator().manual_seed(seed)
    names = {
        f"{name[:-1]}{kind}" if name.endswith("/*") else name
        for name in needed(method) | {"mask", "logp", "reward"}
        for kind in (("first", "second") if name.endswith("/*") else ("",))
    }
    levels: dict[str, dict[str, Tensor]] = {"step": {}, "trajectory": {}}
    for name in sorted(names):
        level, value = make_column(name, layout, generator)
        levels[level][name] = value
    step = levels["step"]
    for name in sorted(method.evaluates):
        moved = step.get(name, make_column(name, layout, generator)[1])
        if not on_policy:
            moved = moved + 0.2 * torch.randn(moved.shape, generator=generator, dtype=torch.float64)
        step[NOW + name] = moved.clamp(max=-1e-3) if name.startswith("logp") else moved
    lengths = torch.tensor(layout.lengths)
    trajectory = torch.arange(len(lengths)).repeat_interleave(lengths)
    return Rollout.from_arrays(trajectory, layout.groups, step=step, trajectories=levels["trajectory"])


def flow(method: Method, rollout: Rollout) -> Rollout:
    """The rollout after the method's reward, advantage and weight parts, with fresh state."""
    fresh = method.clone()
    return fresh.credit(fresh.shape_reward(rollout))


def live(rollout: Rollout) -> tuple[Rollout, dict[str, Tensor]]:
    """The rollout with its ``now/`` columns as leaves that collect gradients, and the leaves."""
    leaves = {name: rollout[name].detach().clone().requires_grad_() for name in rollout.names() if name.startswith(NOW)}
    return rollout.with_columns(step=leaves), leaves


def evaluated(rollout: Rollout) -> Evaluation:
    """The ``now/`` columns as what a policy's `evaluate` returns."""
    return Evaluation({n.removeprefix(NOW): rollout[n] for n in rollout.names() if n.startswith(NOW)})


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Loss, gradient in every ``now/`` column, metrics."""

    loss: Tensor
    gradient: dict[str, Tensor]
    metrics: dict[str, Tensor]


def outcome(method: Method, rollout: Rollout, pieces: Sequence[Any] | None = None) -> Outcome:
    """Loss, gradient and metrics of a credited rollout, or the sum of those of its pieces (index tensors)."""
    rollout, leaves = live(rollout)
    parts = [rollout] if pieces is None else [rollout.piece(torch.as_tensor(p)) for p in pieces]
    results = [method.loss(evaluated(part), part) for part in parts]
    loss = torch.stack([r[0] for r in results]).sum()
    gradient = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    metrics = {name: torch.stack([r[1][name] for r in results]).sum() for name in results[0][1]}
    return Outcome(loss.detach(), dict(zip(leaves, gradient, strict=True)), metrics)


# --- stop-gradients -------------------------------------------------------------------------------------------------


class _StopGradients(TorchFunctionMode):
    """Notes what leaves the graph, in call order, or hands out what was noted before."""

    def __init__(self, tape: list[Tensor], replay: bool) -> None:
        super().__init__()
        self.tape, self.replay, self.place = tape, replay, 0
        self.without_grad = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = func in (Tensor.detach, torch.detach, Tensor.data.__get__) or self.without_grad  # type: ignore[attr-defined]
        if not leaves or not isinstance(result, Tensor):
            return result
        if not self.replay:
            self.tape.append(result.clone())
            return result
        self.place += 1
        return self.tape[self.place - 1]


@contextmanager
def stop_gradients(tape: list[Tensor], *, replay: bool) -> Iterator[None]:
    """Record everything that code computes outside autograd (`detach`, `no_grad`), or hold it at the recorded values.

    A loss with stop-gradients is no primitive of its gradient. With what is stopped held fixed it is, so that finite
    differences apply to every objective alike.
    """
    mode = _StopGradients(tape, replay)
    enter, leave = torch.no_grad.__enter__, torch.no_grad.__exit__

    def entered(self: Any) -> None:
        mode.without_grad += 1
        enter(self)

    def left(self: Any, *error: Any) -> None:
        mode.without_grad -= 1
        leave(self, *error)

    with pytest.MonkeyPatch.context() as patch, mode:
        patch.setattr(torch.no_grad, "__enter__", entered)
        patch.setattr(torch.no_grad, "__exit__", left)
        yield
    if replay and mode.place != len(tape):
        raise AssertionError("the loss takes another path when the policy moves by 1e-6: it has a jump here")
