"""How sure a reward model is of a comparison: passes under dropout, and what they tell of each pair."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def information_gain(chance: Float[Tensor, "pass item kind"]) -> Float[Tensor, " item"]:
    """B = H(mean_t p_t) - mean_t H(p_t) in nats: what the passes disagree about; 0 where they are equal.

    ``chance`` are T distributions over C kinds for each item; 0 <= B <= log min(T, C). Houlsby et al. 2011,
    arXiv:1112.5745; of preference pairs: arXiv:2409.11212.
    """
    mean = chance.mean(0)
    gain = _entropy(mean) - _entropy(chance).mean(0)
    # A rounding below 0 is no negative information.
    return gain.clamp_min(0.0)


def _entropy(chance: Tensor) -> Tensor:
    return -torch.xlogy(chance, chance).sum(-1)


def pair_chances(
    scores: Float[Tensor, "pass answer"], first: Int[Tensor, " pair"], second: Int[Tensor, " pair"]
) -> Float[Tensor, "pass pair 2"]:
    """P(first beats second) and its opposite by the rewards of each pass, sigmoid(r_first - r_second)."""
    gap = scores[:, first] - scores[:, second]
    return torch.stack([torch.sigmoid(gap), torch.sigmoid(-gap)], -1)


def pair_uncertainty(
    scores: Float[Tensor, "pass answer"], first: Int[Tensor, " pair"], second: Int[Tensor, " pair"]
) -> Float[Tensor, " pair"]:
    """`information_gain` of which of two answers is better, by passes under dropout or the models of an ensemble."""
    return information_gain(pair_chances(scores, first, second))
