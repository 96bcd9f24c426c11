"""Trajectories in turns: the policy writes until it asks something, an environment answers, the policy goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from polopt.core.environment import Environment
from polopt.core.errors import UsageError
from polopt.core.part import part
from polopt.core.policy import Policy, Request
from polopt.core.rollout import Rollout
from polopt.rewards.scoring import transcripts
from polopt.rollouts.environments import get_environment
from polopt.rollouts.groups import Groups
from polopt.rollouts.states import actions, another_seed


@part("rollout", "turns")
@dataclass(frozen=True)
class Turns(Groups):
    """Groups of trajectories in which the environment answers whenever the policy writes one of its stop strings.

    Answers are steps with ``mask`` off and 0 for what the policy says about them: the policy did not choose them. Step
    column ``turn`` [N]: answers before the step (those of an answer belong to the turn that it opens). The environment
    is asked at most ``most`` times per trajectory, then the policy goes on alone. All that is written counts against
    the completion budget; a trajectory that an answer leaves no room to go on is truncated. ``environment`` is a name
    (`polopt.rollouts.environments`), ``file.py:function``, or an object. A trajectory depends on the weights, its
    prompt, ``seed``, the index of its request and its place in it alone.
    """

    environment: str | Environment = "calculator"
    most: int = 16

    gives = Groups.gives | {"turn"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most < 1:
            raise UsageError(f"most is {self.most}; the environment must be asked at least once")

    def __call__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        limit: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        environment = get_environment(self.environment)
        budget = self.max_new_tokens or limit
        alone = Groups(**{name: getattr(self, name) for name in Groups.__dataclass_fields__})
        asking = replace(alone, stop=(*self.stop, *environment.stop))
        whole = asking(policy, requests, limit=limit, seed=seed, progress=progress)
        whole = whole.with_columns(step={"turn": torch.zeros_like(whole["action"])})
        each = [replace(request, count=1) for request in requests for _ in range(request.count)]
        active = torch.arange(whole.n_trajectories)
        for turn in range(1, self.most + 1):
            active, answers = self._asked(policy, environment, whole, active)
            whole, active = _write(policy, each, whole, active, answers, budget)
            if not len(active):
                break
            sampler = asking if turn < self.most else alone
            # Everyone stays in the list, so that nobody's randomness depends on who else goes on.
            left = (budget - whole.lengths).tolist()
            going = set(active.tolist())
            asked = [
                replace(request, prefix=ids, limit=room) if index in going else replace(request, count=0)
                for index, (request, ids, room) in enumerate(zip(each, actions(whole), left, strict=True))
            ]
            more = sampler(policy, asked, limit=budget, seed=another_seed(seed, turn))
            whole = _continued(whole, active, more)
        return whole

    def held_out(self) -> Turns:
        """Held-out answers are drawn in the same environment."""
        return self

    def _asked(
        self, policy: Policy, environment: Environment, whole: Rollout, active: Int[Tensor, " active"]
    ) -> tuple[Int[Tensor, " asked"], list[str]]:
        """Which of these trajectories wait for the environment, and what it says to each."""
        last = whole["action"][whole.lengths.cumsum(0) - 1]
        over = whole["truncated"].bool() | torch.isin(last, last.new_tensor([*policy.end_ids, *self.stop_ids]))
        # Where nothing can follow, a trajectory is whole.
        over |= torch.tensor(policy.room(whole), device=over.device) < 1
        found, answers = [], []
        read = transcripts(whole)
        for index in active[~over[active].cpu()].tolist():
            completion = read[index].completion
            # What ends by a string of the user's own is over.
            if self.stop and completion.endswith(self.stop):
                continue
            said = environment.reply(read[index].example, completion)
            if said is not None:
                found.append(index)
                answers.append(said)
        return torch.tensor(found, dtype=torch.int64), answers


def _write(
    policy: Policy,
    each: Sequence[Request],
    whole: Rollout,
    active: Int[Tensor, " active"],
    answers: Sequence[str],
    budget: int,
) -> tuple[Rollout, Int[Tensor, " going"]]:
    """The rollout with the answers written behind their trajectories, and those that may go on."""
    # No token is shorter than a byte, so that what fits in bytes fits in tokens.
    room = torch.minimum(torch.tensor(policy.room(whole)), budget - whole.lengths.cpu())
    need = torch.tensor([len(said.encode()) for said in answers])
    fits = room[active] > need if len(active) else torch.zeros(0, dtype=torch.bool)
    if not bool(fits.all()):
        truncated = whole["truncated"].clone()
        truncated[active[~fits].to(truncated.device)] = True
        whole = whole.with_columns(trajectory={"truncated": truncated})
    speaking = fits & (need > 0) if len(active) else fits
    told = active[speaking]
    if len(told):
        taken = actions(whole)
        asked = [replace(each[index], prefix=taken[index]) for index in told.tolist()]
        texts = [said for said, speaks in zip(answers, speaking.tolist(), strict=True) if speaks]
        written = policy.write(asked, texts).with_columns(trajectory={"source": whole["source"][told]})
        ends = (whole.lengths.cumsum(0) - 1)[told]
        silent = {name: value.new_zeros(written.n_steps) for name, value in whole.columns["step"].items()}
        turn = written.spread(whole["turn"][ends] + 1)
        step = {**silent, "action": written["action"], "turn": turn}
        whole = _continued(whole, told, written.with_columns(step=step))
    return whole, active[fits]


def _continued(whole: Rollout, at: Int[Tensor, " chosen"], more: Rollout) -> Rollout:
    """The rollout with ``more`` behind the trajectories ``at``."""
    at = at.to(whole.device)
    if "turn" not in more:
        last = (whole.lengths.cumsum(0) - 1)[at]
        more = more.with_columns(step={"turn": more.spread(whole["turn"][last])})
    return whole.replaced(at, whole.select(at).join(more))
