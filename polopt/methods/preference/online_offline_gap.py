"""Online-offline gap: one loss on fresh or on fixed pairs, a study (Tang et al. 2024, arXiv:2405.08448).

s(y) = log pi(y) - log pi_ref(y), sums over the steps; the loss is IPO's,
L = mean over pairs of (s(y_w) - s(y_l) - 1 / (2 tau))^2,
or best-of-2, L = mean over pairs of -log pi(y_w) (`--objective best-of-n`). Only the source of the pairs differs:
online, this recipe: y, y' ~ pi, and y wins with the probability P(y beats y') of a proxy preference, drawn;
offline: a fixed data set (`--rollout dataset --filter none`, or the method `ipo`).
At equal KL from pi_ref the online policy wins more often, while the offline one classifies pairs better.
Where all answers can be counted: with a fixed sampler mu of full support IPO ends at log pi / pi_ref = P(. > mu) / tau
+ const; online at log pi / pi_ref = P(. > pi) / tau + const, the Nash policy of the proxy under a KL to pi_ref.

The proxy is the run's reward (`--reward model:FOLDER` for a reward model), P = sigmoid(r - r'): the first two answers
of each prompt are the pair. The paper sweeps tau; 0.1 is this recipe's. Its comparison:
`polopt study online-offline-gap`.
"""

from __future__ import annotations

from polopt.core.registry import method
from polopt.filters.preferences import RandomPair
from polopt.methods.preference.ipo import IPO, ipo
from polopt.rollouts.groups import Groups

online_offline_gap = method(
    "online-offline-gap",
    ipo,
    seed="184",
    paper="arXiv:2405.08448",
    rollout=Groups(),
    filter=RandomPair(),
    objective=IPO(beta=0.1, per_step=False),
)
