"""Dr. GRPO: no length bias, no difficulty bias (Liu et al. 2025, arXiv:2503.20783).

Design, fixed before the first run. Exact world.

- Length: tokens 0, 1 and the end, at most 8 tokens. The first token is the answer (0 is right, 1 or an immediate end is
  wrong), every token after it padding; initial logits normal with standard deviation 0.5. The card lets padding come
  before the answer; here it comes after. In an enumerable policy nothing hidden decides whether a response will be
  right: with the answer last, length and correctness are independent at first and no method has a push on the length to
  show. 8 prompts x 8, Adam at rate 0.1, 40 iterations, one update each. Exact mean length of the incorrect responses,
  change from start to end. "Does not rise" means by less than 0.25 tokens. "Equal accuracy": expected rewards at the
  end within 0.05 of each other.
- Difficulty: 5 tokens, length 4, prompts with pass rates 0.05, 0.5 and 0.95, groups of 8 from the initial policy, 1,000
  per prompt in one batch. Share of the middle prompt in the sum of the norms of the three prompts' mean gradients.
"""

from __future__ import annotations

from polopt.claims.bias import difficulty, length
from polopt.claims.claim import Claim

CHANGE = "change of the exact mean length of incorrect responses, tokens"

CLAIMS = (
    Claim(
        "dr-grpo",
        "length-grpo",
        "Under GRPO incorrect responses grow longer than under Dr. GRPO.",
        "exact",
        "grpo",
        CHANGE,
        "lower",
        "dr-grpo/wrong",
        "grpo/wrong",
        measure=length,
    ),
    Claim(
        "dr-grpo",
        "length-constant",
        "Under Dr. GRPO the length of incorrect responses does not rise.",
        "exact",
        "the initial policy",
        CHANGE,
        "lower",
        "dr-grpo/wrong",
        None,
        margin=0.25,
        measure=length,
    ),
    Claim(
        "dr-grpo",
        "accuracy",
        "Dr. GRPO reaches the accuracy of GRPO.",
        "exact",
        "grpo",
        "expected reward after 40 iterations",
        "equal",
        "dr-grpo/reward",
        "grpo/reward",
        margin=0.05,
        measure=length,
    ),
    Claim(
        "dr-grpo",
        "difficulty",
        "Against prompts of pass rate 0.05 and 0.95, one of 0.5 has a larger share of the gradient than under GRPO.",
        "exact",
        "grpo",
        "share of the norm of the expected gradient",
        "higher",
        "dr-grpo/middle",
        "grpo/middle",
        measure=difficulty,
    ),
)
