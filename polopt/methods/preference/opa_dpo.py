"""OPA-DPO: imitate the expert's corrections, then prefer them, on-policy at last (Yang et al. 2025, arXiv:2501.09695).

An answer that an expert corrected is hardly possible under the policy it was taken from: DPO's log-ratio grows while
its probability stays nothing. So the policy first imitates reference answers and revisions, -log pi per token of both;
then it becomes the reference of DPO. Per prompt: y_ref, the policy's own y_gen from before, y_rev its minimal revision.
With s(y; c) = sum_t c_t (log pi - log pi_ref)(y_t), Delta(a, b; c) = -log sigma(beta s(a; c) - beta s(b; c)),
language = Delta(y_ref, y_gen; 1) + Delta(y_rev, y_gen; W),
image    = Delta(y_ref, y_ref blind; 1) + Delta(y_rev, y_rev blind; U),
anchor   = 2 sum over y_ref, y_rev of -log sigma(beta s(y; 1) - delta),
L = mean over prompts of language + 0.2 image + anchor.
W (``severity``) and U (``relevance``) are the expert's judgement of the sentence (`Revisions`).

This is the text-only reading of a method for images. In the place of the image stands the prompt, or of it the column
``observation`` of the example: "blind" is the same answer after a prompt with 30% of these tokens blanked.

Settled by the released code: data, weights, coefficients, each anchor twice. It takes the sigmoid per slot, token t of
one answer against token t of the other, over padded rows, and its anchor of y_rev has the other sign: ``level``
"position". One run makes both stages (`Stages`): a third of the budget for imitation, as 2 of the paper's 2 + 4 epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from polopt.controllers.stages import Stages
from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation, Loss, per_group
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout, Unit
from polopt.core.segments import segment_mean, segment_pairs
from polopt.methods.preference.dpo import dpo
from polopt.objectives.pair_losses import ChosenNLL
from polopt.objectives.preference import Pairs, pair_metrics
from polopt.rollouts.revisions import Revisions, Role


@part("objective", "opa-dpo")
@dataclass(frozen=True)
class ThreePartDPO(Part):
    """``weight`` (language + ``image`` image + ``anchor`` anchor), of the trajectories of a group by their ``role``.

    With ``level`` "position" the T slots of the batch's longest answer are compared, padding included.
    """

    beta: float = 0.1
    image: float = 0.2
    anchor: float = 1.0
    delta: float = 0.0
    weight: float = 1.0
    level: Literal["sequence", "position"] = "sequence"

    needs = frozenset({"label", "role", "severity", "relevance", "logp/ref"})

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UsageError(f"opa-dpo: beta must be above 0, got {self.beta}")

    @property
    def unit(self) -> Unit:  # type: ignore[override]
        """A group; the batch where its longest answer counts."""
        return "batch" if self.level == "position" else "group"

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        step = self.beta * (evaluation.logp - rollout["logp/ref"])
        severity, relevance = (rollout.kept(rollout[name]).to(step) for name in ("severity", "relevance"))
        plain, severe, relevant = (
            self.rewards(rollout, values) for values in (step, severity * step, relevance * step)
        )
        language = self.prefer(rollout, plain, Role.REFERENCE, Role.GENERATED)
        language = language + self.prefer(rollout, severe, Role.REVISED, Role.GENERATED)
        image = self.prefer(rollout, plain, Role.REFERENCE, Role.BLIND_REFERENCE)
        image = image + self.prefer(rollout, relevant, Role.REVISED, Role.BLIND_REVISED)
        sign = -1 if self.level == "position" else 1
        anchor = self.hold(rollout, plain, Role.REFERENCE, 1) + self.hold(rollout, plain, Role.REVISED, sign)
        parts = {"language": language, "image": image, "anchor": 2 * anchor}
        loss = self.weight * (language + self.image * image + self.anchor * parts["anchor"])
        logged = {name: value.detach().sum() / max(rollout.counts.groups, 1.0) for name, value in parts.items()}
        pairs = Pairs.of(rollout)
        return per_group(
            loss, **logged, **pair_metrics(pairs, rollout.sum_steps(step), rollout.sum_steps(evaluation.logp))
        )

    def rewards(self, rollout: Rollout, values: Float[Tensor, " step"]) -> Float[Tensor, "trajectory slot"]:
        """The sum of each trajectory as its one slot, or its padded steps."""
        if self.level == "sequence":
            return rollout.sum_steps(values)[:, None]
        return rollout.pad(rollout.kept(values))

    def prefer(
        self, rollout: Rollout, reward: Float[Tensor, "trajectory slot"], chosen: Role, rejected: Role
    ) -> Float[Tensor, " group"]:
        """Mean over the pairs of these roles of the mean over slots of -log sigma(difference)."""
        role = rollout["role"]
        i, j = segment_pairs(rollout.group, rollout.n_groups, mask=rollout.active_lengths > 0)
        those = (role[i] == chosen) & (role[j] == rejected)
        pairs = Pairs(rollout, i[those], j[those])
        return pairs.mean(-F.logsigmoid(reward[pairs.winner] - reward[pairs.loser]).mean(1))

    def hold(
        self, rollout: Rollout, reward: Float[Tensor, "trajectory slot"], role: Role, sign: int
    ) -> Float[Tensor, " group"]:
        """Mean over the trajectories of a role of the mean over slots of -log sigma(sign (reward - delta))."""
        those = (rollout["role"] == role) & (rollout.active_lengths > 0)
        terms = -F.logsigmoid(sign * (reward - self.delta)).mean(1)
        return segment_mean(terms, rollout.group, rollout.n_groups, mask=those)


opa_dpo = method(
    "opa-dpo",
    dpo,
    seed="133",
    paper="arXiv:2501.09695",
    rollout=Revisions(),
    objective=ThreePartDPO() + ChosenNLL(coefficient=0.0),
    controller=Stages(
        first={"objective.opa-dpo.weight": 0.0, "objective.sft.coefficient": 1.0},
        second={"objective.opa-dpo.weight": 1.0, "objective.sft.coefficient": 0.0},
        share=1 / 3,
    ),
)
