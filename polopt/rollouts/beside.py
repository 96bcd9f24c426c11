"""Sampled groups, and in each of them the answers that its example brings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from polopt.core.errors import UsageError
from polopt.core.example import Example, answers_of
from polopt.core.part import part
from polopt.core.policy import Policy, Request
from polopt.core.rollout import Rollout, Source
from polopt.rollouts.groups import Groups


@part("rollout", "beside-answers")
@dataclass(frozen=True)
class BesideAnswers(Groups):
    """`Groups`, with the known answers of each example (`polopt.core.example.answers_of`) as members of its group.

    Step column ``mask/known`` [N] is true on the steps of known answers, ``mask`` on those of sampled ones: a loss with
    that ``mask`` learns from known answers, every other from sampled ones. Trajectory column ``label`` [M], NaN for
    sampled ones. Known answers have the source OPPONENT and a ``logp`` of 0. ``end`` ends them with the policy's own
    end action. Raises UsageError naming an example that brings no answer.
    """

    end: bool = True

    gives = Groups.gives | {"label", "mask/known"}
    reads_answers = True

    def __call__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        limit: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        asked = [request for request in requests if request.count]
        self.check([request.example for request in asked])
        drawn = super().__call__(policy, asked, limit=limit, seed=seed, progress=progress)
        known = [(place, *answer) for place, request in enumerate(asked) for answer in answers_of(request.example)]
        places, texts, labels = zip(*known, strict=True)
        written = policy.write([asked[place] for place in places], texts, end=self.end)
        owner = torch.tensor(places, device=drawn.device)
        first = torch.searchsorted(drawn.group.contiguous(), owner)
        step = {name: v.new_zeros(written.n_steps, *v.shape[1:]) for name, v in drawn.columns["step"].items()}
        trajectory = {name: value[first] for name, value in drawn.columns["trajectory"].items()}
        trajectory |= {
            "source": torch.full_like(written.lengths, int(Source.OPPONENT)),
            "label": torch.tensor(labels, device=drawn.device),
            "truncated": torch.zeros_like(written.lengths, dtype=torch.bool),
        }
        yes = torch.ones(written.n_steps, dtype=torch.bool, device=drawn.device)
        step |= {"action": written["action"], "mask/known": yes}
        given = replace(written, columns={"step": step, "trajectory": trajectory})
        unlabelled = torch.full((drawn.n_trajectories,), torch.nan, device=drawn.device)
        own = drawn.with_columns(step={"mask/known": torch.zeros_like(drawn.mask)}, trajectory={"label": unlabelled})
        return Rollout.concat([own, given], torch.cat([drawn.group, owner]))

    def check(self, examples: Sequence[Example]) -> None:
        """Raise UsageError for the first example that brings no answer."""
        for example in examples:
            if not answers_of(example):
                raise UsageError(
                    f"example {example.id!r} brings no answers to learn from beside the sampled ones; name their "
                    f"columns with --map completions=COLUMN and --map labels=COLUMN"
                )

    def held_out(self) -> Groups:
        """How held-out prompts are answered: without known answers."""
        return Groups(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Groups)})
