"""The nucleus of a mask policy: which actions may be drawn, and the policy on those alone (arXiv:2210.01241)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.rollout import Rollout


def nucleus(
    probs: Float[Tensor, "row action"], p: float, least: int = 1, always: Sequence[int] = ()
) -> Bool[Tensor, "row action"]:
    """Ranked by probability, the first ``least`` actions, those before which the others hold at most ``p``, ``always``.

    Of equal actions the one with the smaller id comes first. The most likely one is always in it; p = 1 keeps all.
    """
    if p >= 1:
        return torch.ones_like(probs, dtype=torch.bool)
    ranked, order = probs.double().sort(dim=-1, descending=True, stable=True)
    kept = ranked.cumsum(-1) - ranked <= p
    kept[:, : max(least, 1)] = True
    kept = torch.zeros_like(kept).scatter_(1, order, kept)
    kept[:, list(always)] = True
    return kept


def pack(kept: Bool[Tensor, "step action"]) -> UInt8[Tensor, "step byte"]:
    """One bit per action: the step column ``kept`` of a rollout."""
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % 8)).view(len(kept), -1, 8)
    return (padded.to(torch.uint8) << _places(kept)).sum(-1, dtype=torch.uint8)


def unpack(packed: UInt8[Tensor, "step byte"], actions: int) -> Bool[Tensor, "step action"]:
    """The inverse of `pack`."""
    bits = (packed[..., None] >> _places(packed)) & 1
    return bits.flatten(1)[:, :actions].bool()


def _places(on: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=on.device)


def masked_functionals(
    logits: Float[Tensor, "step action"],
    targets: Int[Tensor, " step"],
    kept: Bool[Tensor, "step action"],
    names: Iterable[str],
) -> dict[str, Float[Tensor, " step"]]:
    """``masked_logp`` and ``masked_entropy`` of pi^m(a) = m_a pi(a) / sum_b m_b pi(b); the gradient is 0 outside m."""
    logp = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
    found = {"masked_logp": logp.gather(1, targets[:, None])[:, 0]}
    if "masked_entropy" in names:
        # 0 log 0 is 0, and so is its gradient.
        found["masked_entropy"] = -(logp.exp() * logp.masked_fill(~kept, 0.0)).sum(-1)
    return {name: found[name] for name in names}


def kept_of(rollout: Rollout) -> UInt8[Tensor, "step byte"]:
    """Its column ``kept``. Raises UsageError where nothing was masked when it was sampled."""
    if "kept" not in rollout:
        raise UsageError(
            "the rollout does not say which actions could be drawn: sample it within the nucleus of a model "
            "(--rollout.nucleus_of)"
        )
    return rollout["kept"]
