"""One forward pass over the trajectories of a payload, and the functionals of its logits at their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polopt.core.policy import MASKED, OUTPUT_LAYER, TOP, head_of
from polopt.policies.causal_lm.critic import ValueHead
from polopt.policies.causal_lm.fused import (
    linear_divergences,
    linear_functionals,
    linear_top,
    logit_divergences,
    logit_functionals,
    logit_top,
)
from polopt.policies.causal_lm.loading import text_config
from polopt.policies.causal_lm.payload import TokenPayload
from polopt.policies.causal_lm.states import Rows, can_pack, step_states
from polopt.policies.nucleus import masked_functionals, unpack

MASKED_LOGITS: Final = 2**24
"""Logits that are held at once where tokens are masked."""


@dataclass(frozen=True, eq=False)
class Steps:
    """What is predicted: the token of each step, and the temperature of its trajectory (a number where all agree)."""

    targets: Int[Tensor, " step"]
    temperature: float | Float[Tensor, " step"]

    @classmethod
    def of(cls, payload: TokenPayload, device: torch.device) -> Steps:
        """The steps of a whole payload."""
        targets, own = payload.ids.to(device, non_blocking=True), payload.temperature
        if len(own) and bool((own == own[0]).all()):
            return cls(targets, float(own[0]))
        return cls(targets, own.repeat_interleave(payload.lengths).to(device, non_blocking=True))

    @property
    def inverse(self) -> Float[Tensor, "step 1"]:
        """1 / temperature as a column."""
        of_all = torch.as_tensor(self.temperature, dtype=torch.float32, device=self.targets.device)
        return of_all.reciprocal().expand(len(self.targets))[:, None]


@dataclass(frozen=True)
class OutputLayer:
    """How final hidden states become logits: cap(scale * (W h + b)), cap(x) = softcap * tanh(x / softcap).

    ``pack``: all tokens may go through the trunk as one row (`can_pack`).
    """

    softcap: float | None
    scale: float
    pack: bool = False

    def functionals(
        self,
        base: Any,
        hidden: Float[Tensor, "step hidden"],
        steps: Steps,
        names: frozenset[str],
    ) -> dict[str, Tensor]:
        """The named functionals [N] from the hidden states at the steps, logits never held all at once."""
        head = base.get_output_embeddings()
        return linear_functionals(
            hidden,
            head.weight,
            steps.targets,
            names,
            bias=head.bias,
            temperature=steps.temperature,
            softcap=self.softcap,
            scale=self.scale,
        )

    def masked(
        self,
        base: Any,
        hidden: Float[Tensor, "step hidden"],
        steps: Steps,
        kept: UInt8[Tensor, "step byte"],
        names: frozenset[str],
    ) -> dict[str, Tensor]:
        """`masked_functionals`; the logits of a chunk are computed again in the backward pass."""
        head = base.get_output_embeddings()
        ordered = sorted(names)

        def of_rows(states: Tensor, targets: Tensor, inverse: Tensor, bits: Tensor) -> tuple[Tensor, ...]:
            z = nn.functional.linear(states, head.weight, head.bias)
            z = z.to(torch.promote_types(z.dtype, torch.float32)) * self.scale
            z = z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap
            found = masked_functionals(z * inverse, targets, unpack(bits, z.shape[-1]), ordered)
            return tuple(found[name] for name in ordered)

        rows = max(1, MASKED_LOGITS // head.weight.shape[0])
        columns = (hidden, steps.targets, steps.inverse, kept)
        pieces = zip(*(torch.split(column, rows) for column in columns), strict=True)
        chunks = [checkpoint(of_rows, *piece, use_reentrant=False) for piece in pieces]
        return {name: torch.cat(parts) for name, parts in zip(ordered, zip(*chunks, strict=True), strict=True)}

    def most_likely(self, base: Any, hidden: Float[Tensor, "step hidden"], steps: Steps) -> dict[str, Tensor]:
        """``top_id`` and ``top_logp`` [N, K] of the `TOP` most likely tokens."""
        head = base.get_output_embeddings()
        return linear_top(
            hidden,
            head.weight,
            TOP,
            bias=head.bias,
            temperature=steps.temperature,
            softcap=self.softcap,
            scale=self.scale,
        )


def output_layer(base: Any) -> OutputLayer | None:
    """The output layer of a model, or None where its logits are not those of a linear layer on its trunk.

    The configuration says which scale and cap to expect; whether that is all that the architecture does is then tried
    out on one short input, so that an architecture with a twist of its own is never computed wrongly.
    """
    trunk, head = _trunk(base), base.get_output_embeddings()
    if trunk is None or type(head) is not nn.Linear:
        return None
    config = text_config(base)
    softcap = getattr(config, "final_logit_softcapping", None)
    # Cohere multiplies its logits by logit_scale, Granite divides them by logits_scaling.
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    layer = OutputLayer(softcap, scale, can_pack(base, trunk))
    ids = torch.arange(min(8, head.weight.shape[0]), device=head.weight.device)[None]
    with torch.no_grad(), torch.autocast(head.weight.device.type, enabled=False):
        expected = base(input_ids=ids, use_cache=False).logits[0].float()
        hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state[0]
        raw = head(hidden).float() * layer.scale
    found = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 2e-2
    same = found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance * expected.abs().max())
    return layer if same else None


def evaluate_payload(
    base: Any,
    layer: OutputLayer | None,
    payload: TokenPayload,
    names: frozenset[str],
    *,
    dtype: torch.dtype | None,
    critic: ValueHead | None = None,
    kept: UInt8[Tensor, "step byte"] | None = None,
) -> dict[str, Float[Tensor, " step"]]:
    """``names`` of ``logp``, ``entropy``, ``lse``, ``collision``, these at a temperature (``logp@1.2``), and with a
    critic ``value`` and ``value/<head>``, at every step, float32; and `polopt.core.policy.OUTPUT_LAYER`. ``kept``
    says which tokens could be drawn, for ``masked_logp`` and ``masked_entropy``.

    ``dtype`` computes under autocast. Everything is a function of the prefix before the step.
    """
    values = {name: head for name in names if (head := head_of(name)) is not None}
    of_states = {*values, "hidden"} & names
    top = bool(OUTPUT_LAYER & names - {"hidden"})
    masked = names & MASKED if kept is not None else frozenset()
    of_logits = names - of_states - OUTPUT_LAYER - MASKED
    device = base.get_input_embeddings().weight.device
    steps = Steps.of(payload, device)
    # Each pass has an autocast of its own: its cache would hand casts made without gradient to a pass that needs one.
    hidden: Tensor | None
    with _autocast(device, dtype), _without_dropout(base):
        if layer is not None:
            hidden = step_states(_trunk(base), payload, device, pack=layer.pack)
            found = layer.functionals(base, hidden, steps, of_logits) if of_logits else {}
            found |= layer.most_likely(base, hidden, steps) if top else {}
            if kept is not None and masked:
                found |= layer.masked(base, hidden, steps, kept, masked)
        else:
            rows = Rows.of(payload, device)
            out = base(**rows.inputs(base), output_hidden_states=bool(of_states))
            logits = out.logits.flatten(0, 1).index_select(0, rows.steps)
            found = logit_functionals(logits, steps.targets, of_logits, temperature=steps.temperature)
            found |= logit_top(logits, TOP, temperature=steps.temperature) if top else {}
            if kept is not None and masked:
                tempered = logits.float() * steps.inverse
                found |= masked_functionals(tempered, steps.targets, unpack(kept, logits.shape[-1]), masked)
            hidden = out.hidden_states[-1].flatten(0, 1).index_select(0, rows.steps) if of_states else None
        if hidden is not None and critic is not None:
            found |= {name: critic(hidden, head) for name, head in values.items()}
        if hidden is not None and "hidden" in names:
            scale = 1.0 if layer is None else layer.scale
            found["hidden"] = hidden.detach() * (scale * steps.inverse)
    return found


Weights = Callable[[], AbstractContextManager[Any]]
"""Opens a context in which a Hugging Face module holds some weights: the live ones, or those of a snapshot."""


@torch.no_grad()
def evaluate_divergences(
    own: tuple[Weights, TokenPayload],
    other: tuple[Weights, TokenPayload],
    layer: OutputLayer | None,
    names: frozenset[str],
    *,
    dtype: torch.dtype | None,
    device: torch.device,
) -> dict[str, Float[Tensor, " step"]]:
    """``names`` of ``hellinger`` and ``kl`` between two models at every step, float32, constants.

    The payloads differ in their prompts at most. Hidden states of all steps are held, logits of a chunk of steps only;
    of an architecture without a plain output layer those of one trajectory at a time.
    """
    if layer is None:
        return _divergences_row_by_row(own, other, names, dtype, device)
    sides = []
    for weights, payload in (own, other):
        with weights() as base, _autocast(device, dtype), _without_dropout(base):
            trunk, head = _trunk(base), base.get_output_embeddings()
            hidden = step_states(trunk, payload, device, pack=layer.pack)
            # Detached, the weight stays that of this model when live adapters come back.
            sides.append((hidden, head.weight.detach(), None if head.bias is None else head.bias.detach()))
    (hidden, weight, bias), (other_hidden, other_weight, other_bias) = sides
    with _autocast(device, dtype):
        return linear_divergences(
            hidden,
            weight,
            other_hidden,
            other_weight,
            names,
            bias=bias,
            other_bias=other_bias,
            temperature=Steps.of(own[1], device).temperature,
            softcap=layer.softcap,
            scale=layer.scale,
        )


def _divergences_row_by_row(
    own: tuple[Weights, TokenPayload],
    other: tuple[Weights, TokenPayload],
    names: frozenset[str],
    dtype: torch.dtype | None,
    device: torch.device,
) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for index in range(own[1].lengths.numel()):
        logits = []
        for weights, payload in (own, other):
            one = payload.select(torch.tensor([index]))
            rows = Rows.of(one, device)
            with weights() as base, _autocast(device, dtype), _without_dropout(base):
                logits.append(base(**rows.inputs(base)).logits.flatten(0, 1).index_select(0, rows.steps))
        values = logit_divergences(logits[0], logits[1], names, temperature=Steps.of(one, device).temperature)
        for name, value in values.items():
            found[name].append(value)
    return {name: torch.cat(values) for name, values in found.items()}


def _trunk(base: Any) -> Any:
    trunk = getattr(base, base.base_model_prefix, None) if base.base_model_prefix else None
    return None if trunk is base else trunk


def _autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@contextmanager
def _without_dropout(model: Any) -> Iterator[None]:
    # The gradient of a policy is that of the distribution that was sampled from, which had no dropout. The flags are
    # set here, whatever the caller did with ``train()``, and put back.
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
