"""Masked sampling: the nucleus of a mask policy, what is stored of it, and the policy on it alone; in both worlds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.method import Method
from polopt.core.policy import Request, Sampling
from polopt.core.rollout import Rollout
from polopt.policies.causal_lm.policy import CausalLM
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.policies.nucleus import masked_functionals, nucleus, pack, unpack
from polopt.policies.sampling import kept_tokens
from polopt.rollouts.states import actions
from tests.policies.causal_lm.models import byte_tokenizer, tiny
from tests.support import f64, same

PSI = (0.5, 0.25, 0.15, 0.07, 0.03)
LIMIT = 5


def ids(kept: Any) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in kept]


def test_worked_example_of_the_mask() -> None:
    psi = f64([PSI])
    assert ids(nucleus(psi, 0.8)) == [[0, 1, 2]]
    assert ids(nucleus(psi, 0.4)) == [[0]]
    assert ids(nucleus(psi, 0.4, 3)) == [[0, 1, 2]]
    assert ids(nucleus(psi, 0.4, 3, (4,))) == [[0, 1, 2, 4]]
    assert ids(nucleus(psi, 1.0)) == [[0, 1, 2, 3, 4]]
    assert ids(nucleus(psi, 1e-9)) == [[0]]


@pytest.mark.parametrize(("p", "least"), [(0.9, 1), (0.3, 4), (0.999, 1), (0.05, 12)])
def test_the_mask_by_its_definition(p: float, least: int) -> None:
    probs = torch.randn(40, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(2).softmax(-1)
    made = nucleus(probs, p, least, (7,))
    for row, kept in zip(probs.tolist(), made.tolist(), strict=True):
        order = sorted(range(11), key=lambda j: (-row[j], j))
        expected = {
            token for j, token in enumerate(order) if j == 0 or sum(row[t] for t in order[:j]) <= p or j < least
        } | {7}
        assert {token for token, yes in enumerate(kept) if yes} == expected


def test_ties_go_to_the_smaller_id() -> None:
    assert ids(nucleus(f64([[0.25] * 4]), 0.3)) == [[0, 1]]


@pytest.mark.parametrize("actions", [1, 7, 8, 9, 64, 131])
def test_bits_come_back(actions: int) -> None:
    kept = torch.rand(13, actions, generator=torch.Generator().manual_seed(actions)) > 0.5
    packed = pack(kept)
    assert packed.dtype == torch.uint8 and packed.shape == (13, -(-actions // 8))
    assert torch.equal(unpack(packed, actions), kept)


def test_worked_example_of_the_masked_policy() -> None:
    logits = (f64(PSI).log() + f64([0.2, -0.1, 0, 0.4, 0]))[None].requires_grad_()
    kept = nucleus(f64([PSI]), 0.8)
    found = masked_functionals(logits, torch.tensor([1]), kept, ["masked_logp", "masked_entropy"])
    same(found["masked_logp"].detach(), [-1.4731186753], rtol=0, atol=1e-10)
    same(found["masked_entropy"].detach(), [0.9209993289], rtol=0, atol=1e-10)
    (gradient,) = torch.autograd.grad(found["masked_logp"].sum(), logits)
    same(gradient, [[-0.618801, 0.77079, -0.151989, 0, 0]], rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(
        masked_functionals(logits, torch.tensor([1]), kept, ["masked_entropy"])["masked_entropy"].sum(), logits
    )
    assert torch.isfinite(gradient).all() and not gradient[0, 3:].any()


# --- in the policies -------------------------------------------------------------------------------------------------


def exact() -> tuple[ExactPolicy, list[Request]]:
    space = SequenceSpace(12, 4, end=True)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, space.n_nodes, 12, generator=generator, dtype=torch.float64) * 2
    logits[..., 11] -= 2.0
    policy = ExactPolicy(space, 2, logits)
    policy.add_model("mask")
    with torch.no_grad():  # the policy has moved since
        policy.logits.add_(torch.randn(policy.logits.shape, generator=generator, dtype=torch.float64))
    return policy, [Request(Example(str(i), "?"), 40) for i in range(2)]


def language_model(family: str = "Qwen3") -> tuple[CausalLM, list[Request]]:
    policy = CausalLM(tiny(family), byte_tokenizer())
    move(policy, 0.3, seed=1)
    policy.add_model("mask")
    move(policy, 0.1, seed=2)
    return policy, [Request(Example("a", "one"), 6), Request(Example("b", "a longer prompt"), 4)]


def move(policy: CausalLM, by: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def vocabulary(policy: Any) -> int:
    return policy.space.vocabulary if isinstance(policy, ExactPolicy) else policy.model.config.vocab_size


worlds = pytest.mark.parametrize("world", [exact, language_model])
World = Callable[[], tuple[Any, list[Request]]]


def sampled(policy: Any, requests: list[Request], **options: Any) -> Rollout:
    given = {"nucleus_of": "mask", "nucleus_p": 0.6, "nucleus_min": 2, "max_new_tokens": LIMIT}
    return policy.sample(requests, Sampling(**{**given, **options}), seed=3)  # type: ignore[no-any-return]


def logits_of(policy: Any, rollout: Rollout, model: bool) -> torch.Tensor:
    """Logits at every step, [N, V], by a plain forward pass per step."""
    payload = rollout.payload
    if isinstance(policy, ExactPolicy):
        table = policy.model("mask") if model else policy.table()
        return table.detach()[payload.step_problem, payload.nodes]  # type: ignore[union-attr]
    rows = []
    for i, taken in enumerate(actions(rollout)):
        prompt = payload.prompts[int(payload.prompt_of[i])]  # type: ignore[union-attr]
        for t in range(len(taken)):
            ids = torch.tensor([[*prompt, *taken[:t]]])
            with torch.no_grad(), policy._snapshots["mask"].active(policy.model) if model else policy._live() as base:
                rows.append(base(input_ids=ids).logits[0, -1].double())
    return torch.stack(rows)


@worlds
def test_only_the_nucleus_of_the_mask_policy_is_drawn_and_it_is_stored(world: World) -> None:
    policy, requests = world()
    rollout = sampled(policy, requests)
    kept = unpack(rollout["kept"], vocabulary(policy))
    psi = logits_of(policy, rollout, model=True).softmax(-1)
    special = (
        policy.end_ids
        if isinstance(policy, ExactPolicy)
        else tuple({*policy.eos_ids, *policy.tokenizer.all_special_ids})
    )
    # Up to rounding of the forward pass: what is clearly inside is kept, what is clearly outside is not.
    assert (kept | ~nucleus(psi, 0.6 - 1e-4, 2, special)).all()
    assert (~kept | nucleus(psi, 0.6 + 1e-4, 2, special)).all()
    assert kept.gather(1, rollout["action"][:, None]).all()
    assert kept[:, list(special)].all() and 1 < float(kept.sum(1).float().mean()) < 0.8 * vocabulary(policy)


@worlds
def test_log_probs_are_those_of_the_policy_on_the_mask(world: World) -> None:
    policy, requests = world()
    rollout = sampled(policy, requests)
    kept = unpack(rollout["kept"], vocabulary(policy))
    z = logits_of(policy, rollout, model=False)
    inside = z.masked_fill(~kept, -torch.inf).log_softmax(-1)
    expected = inside.gather(1, rollout["action"][:, None])[:, 0]
    with torch.no_grad():
        found = policy.evaluate(rollout, frozenset({"masked_logp", "masked_entropy", "logp", "entropy"}))
    for column in (rollout["masked_logp"], rollout["logp/sampled"], found["masked_logp"]):
        torch.testing.assert_close(column.double(), expected, rtol=1e-4, atol=1e-4)
    entropy = torch.where(kept, -inside.exp() * inside, 0.0).sum(-1)
    torch.testing.assert_close(found["masked_entropy"].double(), entropy, rtol=1e-4, atol=1e-4)
    # The plain ones are those of the whole distribution, as ever.
    whole = z.log_softmax(-1).gather(1, rollout["action"][:, None])[:, 0]
    torch.testing.assert_close(rollout.logp.double(), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logp.double(), whole, rtol=1e-4, atol=1e-4)
    # What is kept only gains, and is no more uncertain than its size allows.
    assert (found["masked_logp"] >= found["logp"] - 1e-6).all()
    assert (found["masked_entropy"] <= kept.sum(1).log() + 1e-5).all()


@worlds
def test_all_ones_change_nothing(world: World) -> None:
    policy, requests = world()
    plain = policy.sample(requests, Sampling(max_new_tokens=LIMIT), seed=3)
    for options in ({"nucleus_p": 1.0}, {"nucleus_min": vocabulary(policy)}):
        rollout = sampled(policy, requests, **options)
        assert actions(rollout) == actions(plain)
        assert unpack(rollout["kept"], vocabulary(policy)).all()
        torch.testing.assert_close(rollout["masked_logp"], rollout.logp, rtol=1e-5, atol=1e-5)


@worlds
def test_the_stored_mask_holds_whatever_becomes_of_the_mask_policy(world: World) -> None:
    policy, requests = world()
    rollout = sampled(policy, requests)
    before = policy.evaluate(rollout, frozenset({"masked_logp"}))["masked_logp"].detach()
    policy.add_model("mask")
    torch.testing.assert_close(policy.evaluate(rollout, frozenset({"masked_logp"}))["masked_logp"].detach(), before)
    again = sampled(policy, requests)
    assert not torch.equal(again["kept"], rollout["kept"][: len(again["kept"])]) or again.n_steps != rollout.n_steps


def test_exactly_no_gradient_outside_the_mask() -> None:
    policy, requests = exact()
    rollout = sampled(policy, requests)
    found = policy.evaluate(rollout, frozenset({"masked_logp", "masked_entropy"}))
    weights = torch.randn(rollout.n_steps, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = (weights * (found["masked_logp"] + found["masked_entropy"])).sum()
    (gradient,) = torch.autograd.grad(loss, policy.logits)
    payload: Any = rollout.payload
    allowed = torch.zeros_like(gradient, dtype=torch.bool)
    allowed[payload.step_problem, payload.nodes] = unpack(rollout["kept"], 12)
    assert (gradient[~allowed] == 0).all() and (gradient[allowed] != 0).any()


def test_exactly_no_gradient_outside_the_mask_of_a_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through an output bias, which is nothing but a logit; in one chunk and in many."""
    policy, requests = language_model()
    head = policy.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(vocabulary(policy)))
    rollout = sampled(policy, requests)
    outside = ~unpack(rollout["kept"], vocabulary(policy)).any(0)
    assert outside.any()
    found = []
    for size in (2**24, 3 * vocabulary(policy)):
        monkeypatch.setattr("polopt.policies.causal_lm.forward.MASKED_LOGITS", size)
        values = policy.evaluate(rollout, frozenset({"masked_logp", "masked_entropy"}))
        loss = (values["masked_logp"] - 0.3 * values["masked_entropy"]).sum()
        found.append(torch.autograd.grad(loss, [head.bias, *policy.parameters()], allow_unused=True))
    assert (found[0][0][outside] == 0).all() and (found[0][0][~outside] != 0).any()
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["Qwen3", "Mamba", "GPT2"])
def test_other_architectures_have_masks_too(family: str) -> None:
    policy, requests = language_model(family)
    rollout = sampled(policy, requests)
    kept = unpack(rollout["kept"], vocabulary(policy))
    psi = logits_of(policy, rollout, model=True).softmax(-1)
    always = tuple({*policy.eos_ids, *policy.tokenizer.all_special_ids})
    assert (kept | ~nucleus(psi, 0.6 - 1e-3, 2, always)).all() and (~kept | nucleus(psi, 0.6 + 1e-3, 2, always)).all()
    with torch.no_grad():
        found = policy.evaluate(rollout, frozenset({"masked_logp"}))["masked_logp"]
    torch.testing.assert_close(found, rollout["masked_logp"], rtol=1e-3, atol=1e-3)


def test_a_mask_goes_with_the_rollout(tmp_path: Any) -> None:
    policy, requests = language_model()
    rollout = sampled(policy, requests)
    saved = Rollout.from_state(rollout.state_dict())
    pieces = Rollout.concat([saved.select(torch.tensor([4, 1])), saved.select(torch.tensor([9]))])
    with torch.no_grad():
        found = policy.evaluate(pieces, frozenset({"masked_logp"}))["masked_logp"]
    torch.testing.assert_close(found, pieces["masked_logp"], rtol=1e-4, atol=1e-5)


@worlds
def test_greedy_stays_in_the_mask(world: World) -> None:
    policy, requests = world()
    rollout = sampled(policy, requests, temperature=0.0, nucleus_p=0.1, nucleus_min=1)
    kept = unpack(rollout["kept"], vocabulary(policy))
    best = logits_of(policy, rollout, model=False).masked_fill(~kept, -torch.inf).argmax(-1)
    assert torch.equal(rollout["action"], best)


def test_a_mask_and_a_truncation_leave_what_both_leave() -> None:
    policy, requests = exact()
    rollout = sampled(policy, requests, nucleus_p=0.9, top_k=2)
    kept = unpack(rollout["kept"], 12)
    own = logits_of(policy, rollout, model=False).softmax(-1)
    assert (kept.sum(1) <= 2).all() and (~kept | kept_tokens(own, Sampling(top_k=2))).all()
    torch.testing.assert_close(rollout["logp/sampled"], rollout["masked_logp"])


@worlds
def test_errors_say_what_is_missing(world: World) -> None:
    policy, requests = world()
    with pytest.raises(UsageError, match="tutor"):
        sampled(policy, requests, nucleus_of="tutor")
    with pytest.raises(UsageError, match="nucleus_p is 0"):
        Sampling(nucleus_p=0.0)
    with pytest.raises(UsageError, match="nucleus_min is 0"):
        Sampling(nucleus_min=0)
    plain = policy.sample(requests, Sampling(max_new_tokens=LIMIT), seed=0)
    with pytest.raises(UsageError, match="does not say which actions could be drawn"):
        policy.evaluate(plain, frozenset({"masked_logp"}))


def test_a_method_installs_the_model_it_samples_with() -> None:
    from polopt.methods.trust_region.nlpo import nlpo

    plain: Method = nlpo | {"rollout": type(nlpo.rollout)()}
    assert set(nlpo.models_in_use) == {"ref", "mask"} and set(plain.models_in_use) == {"ref"}
