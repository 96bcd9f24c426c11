"""A policy over tokens: any Hugging Face causal language model, trained whole or by LoRA adapters."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Parameter

from polopt.core.errors import UsageError
from polopt.core.example import Example, Message, Text
from polopt.core.loss import Evaluation
from polopt.core.policy import (
    MASKED,
    OF_MODELS,
    OUTPUT_LAYER,
    Corruption,
    Request,
    Sampling,
    head_of,
    pattern,
    value_columns,
)
from polopt.core.rollout import Rollout, Source
from polopt.policies.causal_lm import decoder
from polopt.policies.causal_lm.corruption import blank_id, corrupted, observed
from polopt.policies.causal_lm.critic import ValueHead, load_critic, save_critic, saved_heads
from polopt.policies.causal_lm.fallback import Companion, MaskPolicy
from polopt.policies.causal_lm.forward import (
    OutputLayer,
    Weights,
    evaluate_divergences,
    evaluate_payload,
    output_layer,
)
from polopt.policies.causal_lm.loading import (
    LoraOptions,
    Precision,
    add_lora,
    check_vocabulary,
    load_model,
    load_tokenizer,
    pick_autocast,
    pick_device,
    text_config,
)
from polopt.policies.causal_lm.payload import TokenPayload
from polopt.policies.causal_lm.snapshots import (
    SavedModel,
    Snapshot,
    is_adapted,
    load_tensors,
    snapshot,
    snapshot_from_state,
    trainable,
    unwrapped,
)
from polopt.policies.causal_lm.tiled import FUNCTIONALS
from polopt.policies.nucleus import kept_of


class CausalLM:
    """pi(token | prompt, tokens so far) = softmax(logits / temperature), sampled and evaluated with the same weights.

    ``model`` is a Hugging Face causal language model or peft's wrapper of one, ``tokenizer`` its tokenizer. ``dtype``
    computes under autocast (None: in the dtype of the weights). ``default_max_new_tokens`` bounds completions where
    neither request nor task does; ``max_rows`` the trajectories decoded at once. A `polopt.core.policy.Policy`.

    Raises UsageError when the tokenizer gives ids that the model does not know.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        dtype: torch.dtype | None = None,
        default_max_new_tokens: int = 128,
        max_rows: int = 256,
    ) -> None:
        check_vocabulary(model, tokenizer)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.default_max_new_tokens = default_max_new_tokens
        self.max_rows = max_rows
        self.version = 0
        self.critic: ValueHead | None = None
        self.eos_ids = _eos_ids(unwrapped(model), tokenizer)
        self._layer: OutputLayer | None = output_layer(unwrapped(model))
        self._snapshots: dict[str, Snapshot] = {}
        self._views: dict[str, Corruption] = {}

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        lora: LoraOptions | None = None,
        device: str = "auto",
        precision: Precision = "auto",
        default_max_new_tokens: int = 128,
        max_rows: int = 256,
    ) -> Self:
        """The model and tokenizer of a folder or hub name, weights in float32, computing in ``precision``.

        ``auto`` is bfloat16 autocast where the hardware has it and the model is large enough to gain. Raises UsageError
        naming what cannot be loaded and why.
        """
        where = pick_device(device)
        model = load_model(name_or_path, where)
        tokenizer = load_tokenizer(name_or_path)
        check_vocabulary(model, tokenizer)
        dtype = pick_autocast(precision, where, text_config(model).hidden_size)
        if lora is not None:
            model = add_lora(model, lora)
        return cls(model, tokenizer, dtype=dtype, default_max_new_tokens=default_max_new_tokens, max_rows=max_rows)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return cast(torch.device, unwrapped(self.model).get_input_embeddings().weight.device)

    @property
    def exact_sampler(self) -> bool:
        """Whether decoder and forward pass agree up to float32 rounding: not where they compute in half precision."""
        weights = unwrapped(self.model).get_input_embeddings().weight.dtype
        return self.dtype in (None, torch.float32) and weights in (torch.float32, torch.float64)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The end-of-sequence tokens."""
        return self.eos_ids

    @property
    def columns(self) -> frozenset[str]:
        """``logp``, ``entropy``, ``lse``, ``collision``, each of them at any temperature (``logp@*``), ``max_entropy``,
        `OUTPUT_LAYER`, `MASKED`, ``value`` with a critic (and ``value/<head>``), and `OF_MODELS` of every added model
        and view.
        """
        values = value_columns(0 if self.critic is None else self.critic.heads) | OUTPUT_LAYER
        tempered = {f"{name}@*" for name in FUNCTIONALS}
        of_models = {f"{kind}/{name}" for kind in OF_MODELS for name in (*self._snapshots, *self._views)}
        return FUNCTIONALS | tempered | MASKED | {"max_entropy"} | values | of_models

    # --- sampling -----------------------------------------------------------------------------------------------

    def sample(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        """One group per request; step columns ``action``, ``logp``, ``entropy``, ``mask``, and ``logp/sampled`` where
        another distribution was drawn from (truncated, or at another temperature).

        A trajectory depends on the weights, its prompt and prefix, ``seed``, the index of its request and its place in
        it alone. Log-probs are of `Sampling.trained_temperature`. Raises UsageError for a prompt that is empty or
        too long (naming its example), or no request.
        """
        wanted = [request for request in requests for _ in range(request.count)]
        if not wanted:
            raise UsageError("nothing to sample: no request asks for a trajectory")
        texts = [_prompt(request) for request in requests]
        prompts = [self._conditioned(request) for request in requests]
        counts = [request.count for request in requests]
        owner = [index for index, count in enumerate(counts) for _ in range(count)]
        made = decoder.generate(
            self.model,
            prompts,
            counts,
            trajectory_seeds(seed, counts),
            dataclasses.replace(sampling, max_new_tokens=sampling.max_new_tokens or self.default_max_new_tokens),
            eos_ids=self.eos_ids,
            tokenizer=self.tokenizer,
            entropy=True,
            max_rows=self.max_rows,
            progress=progress,
            dtype=self.dtype,
            limits=[request.limit for request in requests],
            mask=self._mask_policy(sampling),
            mixture=self._mixture(sampling),
        )
        completions = [ids.tolist() for ids in torch.split(made.ids.cpu(), made.lengths.tolist())]
        payload = TokenPayload.build(
            (prompts[i] for i in owner),
            completions,
            torch.full((len(owner),), sampling.trained_temperature),
            (request.example for request in wanted),
            (texts[i] for i in owner),
            self.decode([[*requests[i].prefix, *ids] for i, ids in zip(owner, completions, strict=True)]),
            (len(requests[i].prefix) for i in owner),
        )
        step = {"action": made.ids, "logp": made.logp, "mask": torch.ones_like(made.ids, dtype=torch.bool)}
        if made.entropy is not None:
            step["entropy"] = made.entropy
        if made.logp_sampled is not None:
            step["logp/sampled"] = made.logp_sampled
        if made.kept is not None:
            step["kept"] = made.kept
            # Elsewhere the learner computes it, as it does its own log-probs.
            if self.exact_sampler and sampling.temperature == sampling.trained_temperature:
                step["masked_logp"] = step["logp/sampled"].clone()
        trajectory = self._origin(made.lengths, Source.POLICY) | {"truncated": made.truncated}
        # Group ids are 0.. without gaps, whatever the requests that ask for nothing.
        group = torch.unique(torch.tensor(owner), return_inverse=True)[1].to(made.lengths.device)
        return Rollout(made.lengths, group, {"step": step, "trajectory": trajectory}, payload)

    def _mask_policy(self, sampling: Sampling) -> MaskPolicy | None:
        """What may be drawn, where a model of the policy decides it; special tokens always."""
        if sampling.nucleus_of is None:
            return None
        weights = self._weights("nucleus_of", sampling.nucleus_of)
        always = tuple(sorted({*self.eos_ids, *self.tokenizer.all_special_ids}))
        return MaskPolicy(weights, sampling.nucleus_p, sampling.nucleus_min, always)

    def _mixture(self, sampling: Sampling) -> Companion | None:
        """The model of the policy that it is mixed with."""
        name = sampling.mixture_of
        return None if name is None else Companion(self._weights("mixture_of", name))

    def _weights(self, option: str, name: str) -> Callable[[], AbstractContextManager[Any]]:
        """What opens a context with the weights of an added model, which an option of the sampling names."""
        if name not in self._snapshots:
            raise UsageError(
                f"{option} is {name!r}; this policy has the models {', '.join(sorted(self._snapshots)) or 'none'}"
            )
        return partial(self._snapshots[name].active, self.model)

    def write(self, requests: Sequence[Request], texts: Sequence[Text], *, end: bool = False) -> Rollout:
        """One trajectory per request, a group of its own, whose steps are the tokens of the text (no special ones).

        A chat is what the template makes of it after the prompt, its special tokens included. ``end`` appends the
        end-of-sequence token where the text does not end by one, and drops blanks that a template writes behind it.
        Step columns ``action`` and ``mask``; raises UsageError naming the example for a text of no token, one that the
        context has no room for, and a chat that is not all the assistant's or does not go on from its prompt.
        """
        written = [self._spelled(request, text, end) for request, text in zip(requests, texts, strict=True)]
        prompts = [self._conditioned(request) for request in requests]
        for request, prompt, ids in zip(requests, prompts, written, strict=True):
            if not ids:
                raise UsageError(f"a text to write for example {request.example.id!r} is empty")
            if self.context_length is not None and len(prompt) + len(ids) > self.context_length:
                raise UsageError(
                    f"a text for example {request.example.id!r} of {len(ids)} tokens after {len(prompt)} does not fit "
                    f"into the model's context of {self.context_length} tokens"
                )
        payload = TokenPayload.build(
            prompts,
            written,
            torch.ones(len(requests)),
            (request.example for request in requests),
            map(_prompt, requests),
            self.decode([[*request.prefix, *ids] for request, ids in zip(requests, written, strict=True)]),
            (len(request.prefix) for request in requests),
        )
        action, lengths = payload.ids.to(self.device), payload.lengths.to(self.device)
        trajectory = self._origin(lengths, Source.DATASET) | {"truncated": torch.zeros_like(lengths, dtype=torch.bool)}
        step = {"action": action, "mask": torch.ones_like(action, dtype=torch.bool)}
        return Rollout(
            lengths, torch.arange(len(requests)).to(lengths), {"step": step, "trajectory": trajectory}, payload
        )

    def _spelled(self, request: Request, text: Text, end: bool) -> list[int]:
        """Tokens of an answer; none for an empty one."""
        if not isinstance(text, str):
            text = self._continuation(request, text)
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not end or not ids:
            return ids
        if not self.eos_ids:
            raise UsageError("the model has no end-of-sequence token to end an answer with; set end to false")
        places = [place for place, token in enumerate(ids) if token in self.eos_ids]
        if places and not self.tokenizer.decode(ids[places[-1] + 1 :]).strip():
            return ids[: places[-1] + 1]
        own = self.tokenizer.eos_token_id
        return [*ids, own if own in self.eos_ids else self.eos_ids[0]]

    def _continuation(self, request: Request, answer: Sequence[Message]) -> str:
        """What the chat template writes for an answer behind its prompt."""
        prompt, name = _prompt(request), request.example.id
        if isinstance(prompt, str):
            raise UsageError(f"an answer to example {name!r} is a chat, but its prompt is plain text")
        if other := next((message["role"] for message in answer if message["role"] != "assistant"), None):
            raise UsageError(
                f"an answer to example {name!r} has a message of role {other!r}: the policy did not write it; put "
                f"what comes before the last answer into the prompt"
            )
        before = self._rendered(prompt)
        chat = [dict(message) for message in (*prompt, *answer)]
        whole = cast(str, self.tokenizer.apply_chat_template(chat, tokenize=False))
        if not whole.startswith(before):
            raise UsageError(
                f"the chat template does not write an answer to example {name!r} behind its prompt: with the answer, "
                f"the prompt itself is written differently; give prompts and answers as plain text"
            )
        return whole[len(before) :]

    def room(self, rollout: Rollout) -> list[int]:
        """Steps that each trajectory may still take before the context ends; 2^31 where nothing ends it."""
        context = self.context_length
        return [2**31 if context is None else context - used for used in self.cost(rollout)]

    def _conditioned(self, request: Request) -> list[int]:
        """Tokens of prompt and prefix."""
        return [*self.tokenize_prompt(_prompt(request), request.example.id), *request.prefix]

    def _origin(self, lengths: Tensor, source: Source) -> dict[str, Tensor]:
        return {"version": torch.full_like(lengths, self.version), "source": torch.full_like(lengths, int(source))}

    def tokenize_prompt(self, text: Text, example_id: str) -> list[int]:
        """Tokens of a prompt: plain text as the tokenizer begins a text, a chat through the tokenizer's template.

        Never ends with an end-of-sequence token that the text does not contain. Raises UsageError naming the example
        when the prompt is empty, leaves no room in the context, or is a chat and the tokenizer has no template.
        """
        if isinstance(text, str):
            ids = self._tokenize_text(text)
        else:
            if text and not getattr(self.tokenizer, "chat_template", None):
                raise UsageError(
                    f"the prompt of example {example_id!r} is a chat, but the tokenizer has no chat template; "
                    "give a plain text prompt or a chat model"
                )
            ids = []
            if text:
                # The template writes the special tokens itself.
                ids = self.tokenizer(self._rendered(text), add_special_tokens=False)["input_ids"]
        if not text or not ids:
            raise UsageError(f"the prompt of example {example_id!r} is empty")
        context = self.context_length
        if context is not None and len(ids) + 1 > context:
            raise UsageError(
                f"the prompt of example {example_id!r} has {len(ids)} tokens; the model's context of {context} tokens "
                f"leaves room for at most {context - 1}"
            )
        return list(ids)

    def check_prompts(self, examples: Sequence[Example]) -> None:
        """Raise UsageError for the first of these examples whose prompt cannot be sampled from."""
        for example in examples:
            self.tokenize_prompt(example.prompt, example.id)

    def _rendered(self, text: Text) -> str:
        """A prompt as the string that is tokenized."""
        if isinstance(text, str):
            return text
        chat = [dict(message) for message in text]
        return cast(str, self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))

    def _offsets(self, text: Text) -> list[tuple[int, int]]:
        """Where the tokens of a prompt lie in its rendered string; needs a fast tokenizer."""
        encoded = self.tokenizer(
            self._rendered(text), add_special_tokens=isinstance(text, str), return_offsets_mapping=True
        )
        return [(start, end) for start, end in encoded["offset_mapping"]]

    def _tokenize_text(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text)["input_ids"])
        bare = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        # What the tokenizer puts in front belongs to a prompt; the end of sequence that some append would end it.
        while len(ids) > len(bare) and ids[-1] in self.eos_ids and ids[-len(bare) :] != bare:
            ids.pop()
        return ids

    def decode(self, completions: Sequence[Sequence[int]]) -> list[str]:
        """Text of completions, without special tokens."""
        return cast(
            "list[str]",
            self.tokenizer.batch_decode(
                [list(ids) for ids in completions], skip_special_tokens=True, clean_up_tokenization_spaces=False
            ),
        )

    @property
    def context_length(self) -> int | None:
        """Most positions of a sequence, or None where the architecture sets no limit."""
        return getattr(text_config(unwrapped(self.model)), "max_position_embeddings", None)

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self, rollout: Rollout, names: frozenset[str]) -> Evaluation:
        """The named columns [N], float32, on the rollout's device.

        ``logp``, ``entropy`` (nats), ``lse`` and ``collision`` = sum_v pi(v)^2 of pi = softmax(logits / temperature)
        with each trajectory's temperature or, as ``logp@1.2``, with the one given, ``value`` of the prefix before each
        step, all with gradient and from one forward pass; without, the functionals of models
        (`polopt.core.policy.OF_MODELS`, one pass per model, and one of the policy for those of two models) and
        ``max_entropy`` = log V and `polopt.core.policy.OUTPUT_LAYER`. Dropout is off, as it is when sampling. Raises
        ValueError for a name that is not in `columns`.
        """
        if unknown := sorted(name for name in names if pattern(name) not in self.columns):
            raise ValueError(
                f"this policy cannot evaluate {unknown[0]!r} (it can: {', '.join(sorted(self.columns))}); "
                "models are added with add_model, a critic with add_critic"
            )
        payload = rollout.payload
        if not isinstance(payload, TokenPayload):
            raise TypeError(f"a language model evaluates rollouts of tokens, not of {type(payload).__name__}")
        found: dict[str, Tensor] = {}
        for model in sorted({name.partition("/")[2] for name in names if "/" in name and head_of(name) is None}):
            found |= self._of_model(model, payload, names)
        if "max_entropy" in names:
            vocabulary = text_config(unwrapped(self.model)).vocab_size
            found["max_entropy"] = torch.full((rollout.n_steps,), math.log(vocabulary))
        if own := names - found.keys():
            base = unwrapped(self.model)
            kept = kept_of(rollout).to(self.device) if own & MASKED else None
            found |= evaluate_payload(base, self._layer, payload, own, dtype=self.dtype, critic=self.critic, kept=kept)
        # Ids stay integers.
        full = {name: v.float() if v.is_floating_point() else v for name, v in found.items()}
        return Evaluation({name: full[name].to(rollout.device) for name in sorted(names)})

    @torch.no_grad()
    def _of_model(self, name: str, payload: TokenPayload, names: frozenset[str]) -> dict[str, Tensor]:
        """The wanted functionals of one added model or view."""
        kinds = frozenset(kind for kind in OF_MODELS if f"{kind}/{name}" in names)
        weights: Weights = self._live
        given = payload
        if name in self._views:
            given = self._corrupted(payload, self._views[name])
        else:
            weights = partial(self._snapshots[name].active, self.model)
        found: dict[str, Tensor] = {}
        if "logp" in kinds:
            with weights() as base:
                found = evaluate_payload(base, self._layer, given, frozenset({"logp"}), dtype=self.dtype)
        if divergences := kinds - {"logp"}:
            found |= evaluate_divergences(
                (self._live, payload),
                (weights, given),
                self._layer,
                divergences,
                dtype=self.dtype,
                device=self.device,
            )
        return {f"{kind}/{name}": value for kind, value in found.items()}

    def _live(self) -> AbstractContextManager[Any]:
        """The present weights, as a snapshot gives its own."""
        return nullcontext(unwrapped(self.model))

    def _corrupted(self, payload: TokenPayload, corruption: Corruption) -> TokenPayload:
        """The payload under corrupted prompts; members of a group share where their observation lies."""
        known: dict[tuple[int, str], list[int]] = {}

        def places(index: int) -> list[int]:
            example, text = payload.examples[index], payload.prompt_texts[index]
            key = (int(payload.prompt_of[index]), example.id)
            if key not in known:
                # The prompt's own tokens: a prefix that was written for the policy comes after them.
                ids = self.tokenize_prompt(text, example.id)
                known[key] = observed(self.tokenizer, self._rendered(text), ids, example, lambda: self._offsets(text))
            return known[key]

        return corrupted(payload, corruption, self.version, blank_id(self.tokenizer, corruption.blank), places)

    def corrupted(self, rollout: Rollout, corruption: Corruption) -> Rollout:
        """The same completions after prompts with blanks, as a view sees them (`add_view`)."""
        spoilt = self._corrupted(cast(TokenPayload, rollout.payload), corruption)
        return dataclasses.replace(rollout, payload=spoilt)

    def cost(self, rollout: Rollout) -> list[int]:
        """Tokens of each trajectory, its prompt included."""
        payload = cast(TokenPayload, rollout.payload)
        return cast("list[int]", (payload.prompt_lengths + payload.lengths).tolist())

    # --- models, parameters, state ------------------------------------------------------------------------------

    def add_model(self, name: str) -> None:
        """Freeze the present weights as ``name``, in place of an earlier model of that name.

        Under LoRA a model costs no memory before the first update (the base is it) and a copy of the adapters after.
        """
        self._snapshots.pop(name, None)  # first, so that no two copies are held
        self._snapshots[name] = snapshot(self.model)

    def load_model(self, name: str, folder: Path) -> None:
        """Freeze the model of a folder as ``name``: what `save` wrote, or any of the policy's kind and tokenizer.

        A checkpoint holds the folder's path. Raises UsageError naming the folder where they do not fit.
        """
        if load_tokenizer(folder).get_vocab() != self.tokenizer.get_vocab():
            raise UsageError(f"{folder} has another tokenizer than the policy; model {name!r} must share it")
        self._snapshots.pop(name, None)
        self._snapshots[name] = SavedModel(self.model, folder)

    def add_view(self, name: str, corruption: Corruption) -> None:
        """Let ``name`` stand for the present weights under a corrupted prompt (see `polopt.core.policy.Corruption`).

        The observation is the first occurrence of the example's column ``observation`` in the rendered prompt, or the
        whole prompt where the example has none; special tokens stay. Raises UsageError for the name of a model, and
        for a blank that is not one token.
        """
        if name in self._snapshots:
            raise UsageError(f"this policy has a model {name!r} already; give the view another name")
        blank_id(self.tokenizer, corruption.blank)
        self._views[name] = corruption

    def add_critic(self, heads: int = 1) -> None:
        """Value heads on the shared trunk, as `ValueHead` starts them.

        Does nothing where there are as many. Raises UsageError where there are others.
        """
        if self.critic is None:
            self.critic = ValueHead(text_config(unwrapped(self.model)).hidden_size, heads).to(self.device)
        elif self.critic.heads != heads:
            raise UsageError(f"the critic has value heads: {self.critic.heads}, asked for: {heads}")

    def load_critic(self, folder: Path) -> None:
        """The critic that `save` wrote to a folder, with as many heads as it has.

        Raises UsageError for a folder without one, for one of another size, and where there is one with other heads.
        """
        head = ValueHead(text_config(unwrapped(self.model)).hidden_size, saved_heads(folder))
        load_critic(head, folder)
        self.add_critic(head.heads)
        assert self.critic is not None
        self.critic.load_state_dict(head.state_dict())

    def rewards_of(
        self, rollout: Rollout, scales: Sequence[Float[Tensor, " hidden"] | None] = (None,)
    ) -> Float[Tensor, "scale head trajectory"]:
        """What each value head makes of the prefix before the last step of each trajectory, without gradient.

        ``scales`` multiply the hidden state that the heads read, one pass through them for each: dropout, from one pass
        through the trunk. Raises ValueError without a critic.
        """
        if self.critic is None:
            raise ValueError("the policy has no critic to score with")
        with torch.no_grad():
            states = self.evaluate(rollout, frozenset({"hidden"}))["hidden"][rollout.lengths.cumsum(0) - 1]
            # What the output layer sees is scaled for it alone.
            states = states.to(self.device) / (1.0 if self._layer is None else self._layer.scale)
            seen = [states if scale is None else states * scale.to(states) for scale in scales]
            heads = range(1, self.critic.heads + 1)
            return torch.stack([torch.stack([self.critic(h, head) for head in heads]) for h in seen])

    def parameters(self) -> Sequence[Parameter]:
        """What trains: all weights, or the adapters, and the critic's."""
        heads = list(self.critic.parameters()) if self.critic is not None else []
        return [*trainable(self.model).values(), *heads]

    def state_dict(self) -> dict[str, Any]:
        """``version``, trained weights, critic, added models and views, as a nest of tensors, numbers and names."""
        return {
            "version": self.version,
            "model": {name: parameter.detach() for name, parameter in trainable(self.model).items()},
            "critic": None if self.critic is None else dict(self.critic.state_dict()),
            "models": {name: frozen.state_dict() for name, frozen in self._snapshots.items()},
            "views": {name: dataclasses.asdict(view) for name, view in self._views.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict` into the same parameters; models, views and a critic that are not there are added.

        Raises UsageError naming the first weight that the state and the policy do not share.
        """
        if missing := sorted({"version", "model", "critic", "models"} - set(state)):
            raise UsageError(f"the state is not that of a language model policy: it lacks {missing[0]!r}")
        if state["critic"] is None and self.critic is not None:
            raise UsageError("the state has no critic, but the policy has one")
        load_tensors(trainable(self.model), state["model"], "the model")
        if state["critic"] is not None:
            self.add_critic(heads=len(state["critic"]["linear.bias"]))
            assert self.critic is not None
            load_tensors(self.critic.state_dict(), state["critic"], "the critic")
        self._snapshots = {
            name: snapshot_from_state(self.model, name, frozen) for name, frozen in state["models"].items()
        }
        # A state from before there were views has none; the policy keeps its own then.
        self._views |= {name: Corruption(**view) for name, view in state.get("views", {}).items()}
        self.version = int(state["version"])

    def save(self, folder: Path) -> None:
        """Write a folder that ``AutoModelForCausalLM.from_pretrained`` loads: model, tokenizer, and the critic if any.

        Adapters are merged into the model that is written (the live one keeps them) and written on their own to
        ``adapter/``.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if is_adapted(self.model):
            merged = copy.deepcopy(self.model).merge_and_unload()
            merged.save_pretrained(folder)
            del merged
            self.model.save_pretrained(folder / "adapter")
        else:
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.critic is not None:
            save_critic(self.critic, folder)


def _prompt(request: Request) -> Text:
    return request.prompt if request.prompt is not None else request.example.prompt


def trajectory_seeds(seed: int, counts: Sequence[int]) -> Int[Tensor, " trajectory"]:
    """One 63-bit seed per trajectory, a function of ``seed``, its request's index and its index in the request."""
    return torch.tensor(
        [_hash(seed, request, member) for request, count in enumerate(counts) for member in range(count)],
        dtype=torch.int64,
    )


def _hash(*numbers: int) -> int:
    digest = hashlib.blake2b(":".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _eos_ids(base: Any, tokenizer: Any) -> tuple[int, ...]:
    """End-of-sequence ids of generation config, model config and tokenizer: they often disagree, and each means it."""
    given = [
        getattr(getattr(base, "generation_config", None), "eos_token_id", None),
        getattr(text_config(base), "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ]
    ids: set[int] = set()
    for value in given:
        ids |= set() if value is None else {value} if isinstance(value, int) else {int(item) for item in value}
    return tuple(sorted(ids))
