"""A softmax policy over every prefix of a short sequence, for a batch of independent problems."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, cast

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from polopt.core.errors import UsageError
from polopt.core.example import Example, Text
from polopt.core.loss import Evaluation
from polopt.core.policy import (
    MASKED,
    OF_MODELS,
    OUTPUT_LAYER,
    TEMPERED,
    TOP,
    Corruption,
    Request,
    Sampling,
    head_of,
    pattern,
    split_temperature,
    value_columns,
)
from polopt.core.rollout import Rollout, Source
from polopt.policies.exact import heads, tree
from polopt.policies.exact.payload import SequencePayload
from polopt.policies.exact.space import SequenceSpace
from polopt.policies.nucleus import kept_of, masked_functionals, nucleus, pack, unpack
from polopt.policies.sampling import kept_tokens, uniforms
from polopt.policies.values import initial_values

FORMAT: Final = 1
_SETTINGS, _WEIGHTS = "policy.json", "policy.safetensors"
_DTYPES: Final = {"float32": torch.float32, "float64": torch.float64}


class ExactPolicy:
    """pi_b(token | prefix) = softmax(logits_b[row of the prefix] / temperature), for B problems in one parameter.

    ``logits`` [B, P, V], 0 (uniform) when left out, is copied. ``head`` says which row each prefix reads: its own
    (``tabular``, P = K) or one that prefixes share (see `polopt.policies.exact.heads`). A prompt is the number of a
    problem: ``columns["problem"]`` of the example, or else its id. Implements `polopt.core.policy.Policy`.

    Raises UsageError for logits of another shape or that are not finite, an unknown head, or a dtype other than float32
    and float64.
    """

    def __init__(
        self,
        space: SequenceSpace,
        problems: int = 1,
        logits: Float[Tensor, "problem row token"] | None = None,
        *,
        head: str = "tabular",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if problems < 1:
            raise UsageError(f"an exact policy needs at least one problem, got {problems}")
        if dtype not in _DTYPES.values():
            raise UsageError(f"an exact policy computes in float32 or float64, not in {dtype}")
        self.space = space
        self.problems = problems
        self.head = heads.check_head(head)
        self.version = 0
        self.rows = heads.rows(space, self.head)
        shape = (problems, int(self.rows.max()) + 1, space.vocabulary)
        start = torch.zeros(shape) if logits is None else logits.detach()
        if tuple(start.shape) != shape:
            raise UsageError(f"logits of a {head} head must have shape {shape}, got {tuple(start.shape)}")
        if not bool(torch.isfinite(start).all()):
            raise UsageError("logits must be finite; a token that should never be chosen gets a very low one")
        self.logits = Parameter(start.to(dtype, copy=True))
        self.values: Parameter | None = None
        self._models: dict[str, Tensor] = {}
        self._views: dict[str, Corruption] = {}

    # --- the distribution ---------------------------------------------------------------------------------------

    def table(self) -> Float[Tensor, "problem node token"]:
        """Logits of every prefix, [B, K, V]; differentiable in ``logits``."""
        return self.logits if self.head == "tabular" else self.logits.index_select(1, self.rows)

    def log_probabilities(self, temperature: float = 1.0) -> Float[Tensor, "problem sequence"]:
        """log pi(y) of every sequence, [B, S]; differentiable."""
        return tree.log_probabilities(self.space, self.table() / temperature)

    def probabilities(self, temperature: float = 1.0) -> Float[Tensor, "problem sequence"]:
        """pi(y) of every sequence, [B, S]; differentiable."""
        return self.log_probabilities(temperature).exp()

    def step_logp(self, temperature: float = 1.0) -> Float[Tensor, "problem sequence time"]:
        """log pi(y_t | y_<t) of every token of every sequence, [B, S, H], 0 after its end; differentiable."""
        return tree.step_log_probabilities(self.space, self.table() / temperature)

    # --- sampling -----------------------------------------------------------------------------------------------

    @property
    def exact_sampler(self) -> bool:
        """Always: one table gives both."""
        return True

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The end token, where the space has one."""
        return (self.space.vocabulary - 1,) if self.space.end else ()

    @property
    def columns(self) -> frozenset[str]:
        """``logp``, ``entropy``, ``lse``, ``collision``, each of them at any temperature (``logp@*``), ``max_entropy``,
        `OUTPUT_LAYER`, `MASKED`, ``value`` with a critic (and ``value/<head>``), and `OF_MODELS` of every added model
        and view.
        """
        values = value_columns(self.heads) | OUTPUT_LAYER | MASKED
        of_models = {f"{kind}/{name}" for kind in OF_MODELS for name in (*self._models, *self._views)}
        tempered = {f"{name}@*" for name in TEMPERED}
        return frozenset({*TEMPERED, "max_entropy"} | tempered | values | of_models)

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

        A trajectory depends on the logits of its problem, its prefix, ``seed``, the index of its request and its place
        in it alone. Log-probs are of `Sampling.trained_temperature`. ``truncated`` are those that the
        limit cut, or in a space with an end token its length. Raises UsageError for an example without a problem of
        this policy, a prompt other than the example's, a prefix that is whole already, stop strings, or no request.
        """
        counts = torch.tensor([request.count for request in requests], dtype=torch.int64)
        if not int(counts.sum()):
            raise UsageError("nothing to sample: no request asks for a trajectory")
        # Its texts are numbers with blanks between: what has another character is never written.
        if strings := [text for text in sampling.stop if not set(text) - set("0123456789 ")]:
            raise UsageError(f"an exact policy does not look for strings such as {strings[0]!r}; give stop_ids")
        for request in requests:
            if request.prompt is not None and request.prompt != request.example.prompt:
                raise UsageError(
                    f"an exact policy knows problems, not texts: it cannot answer example {request.example.id!r} under "
                    f"another prompt"
                )
        problem = torch.tensor([self._problem(request.example) for request in requests])
        start = torch.tensor([self.space.node_of(request.prefix) for request in requests])
        longest = min(sampling.max_new_tokens or self.space.length, self.space.length)
        limits = torch.tensor(
            [longest if request.limit is None else min(request.limit, longest) for request in requests]
        )
        owner = torch.arange(len(requests)).repeat_interleave(counts)
        place = torch.arange(len(owner)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        # A hash of (seed, request, place), 52 bits at each stage.
        seeds = _hash(_hash(torch.tensor(seed), owner), place)
        nodes, ids, lengths, cut = self._draw(problem[owner], start[owner], limits[owner], seeds, sampling)
        if progress is not None:
            progress(len(owner), len(owner))
        written = torch.arange(nodes.shape[1])[None] < lengths[:, None]
        payload = SequencePayload(
            problem[owner],
            lengths,
            torch.full((len(owner),), sampling.trained_temperature, dtype=self.logits.dtype),
            nodes[written],
            ids[written],
            tuple(request.example for request in requests),
            owner,
            self.space.branching,
        )
        # Group ids are 0.. without gaps, whatever the requests that ask for nothing.
        return self._rollout(payload, torch.unique(owner, return_inverse=True)[1], cut, sampling)

    def sample_sequences(self, count: int, *, seed: int, temperature: float = 1.0) -> Int[Tensor, "problem count"]:
        """Numbers of ``count`` sequences drawn for every problem, [B, count]: a fast Monte-Carlo sample."""
        problem = torch.arange(self.problems).repeat_interleave(count)
        place = torch.arange(count).repeat(self.problems)
        seeds = _hash(_hash(torch.tensor(seed), problem), place)
        root, limits = torch.zeros_like(problem), torch.full_like(problem, self.space.length)
        nodes, ids, lengths, _ = self._draw(problem, root, limits, seeds, Sampling(temperature=temperature))
        last = (lengths - 1)[:, None]
        found = self.space.sequence_of(nodes.gather(1, last), ids.gather(1, last))
        return found.view(self.problems, count)

    def rollout(
        self,
        problem: Int[Tensor, " trajectory"],
        sequence: Int[Tensor, " trajectory"],
        group: Int[Tensor, " trajectory"],
        *,
        examples: Sequence[Example] | None = None,
    ) -> Rollout:
        """The rollout that `sample` would give if it drew these sequences: for enumeration.

        ``examples`` has one entry per problem; plain ones are made when left out.
        """
        pool = tuple(examples) if examples is not None else tuple(map(example_of, range(self.problems)))
        mask = self.space.mask[sequence]
        payload = SequencePayload(
            problem,
            self.space.lengths[sequence],
            torch.ones(len(problem), dtype=self.logits.dtype),
            self.space.nodes[sequence][mask],
            self.space.sequences[sequence][mask],
            pool,
            problem,
            self.space.branching,
        )
        return self._rollout(payload, group, self.space.truncated[sequence], Sampling())

    def _rollout(self, payload: SequencePayload, group: Tensor, cut: Tensor, sampling: Sampling) -> Rollout:
        with torch.no_grad():
            found = self._functionals(payload, frozenset({"logp", "entropy"}))
        step = {"action": payload.ids, "mask": torch.ones_like(payload.ids).bool(), **found}
        if sampling.differs:
            flat = payload.step_problem * self.space.n_nodes + payload.nodes
            kept = self._kept(sampling)
            total = kept.sum(-1)[flat]
            if sampling.temperature == 0:
                total = kept[flat, payload.ids]
            step["logp/sampled"] = kept[flat, payload.ids].log() - total.log()
            if sampling.nucleus_of is not None:
                step["kept"] = pack(self._allowed(sampling)[flat])
                with torch.no_grad():
                    step |= self._functionals(payload, frozenset({"masked_logp"}), step["kept"])
        trajectory = self._origin(payload.lengths, Source.POLICY) | {"truncated": cut}
        return Rollout(payload.lengths, group, {"step": step, "trajectory": trajectory}, payload)

    @torch.no_grad()
    def _kept(self, sampling: Sampling) -> Tensor:
        """Probabilities [B K, V] at the sampling temperature (1 for 0), truncated tokens at 0."""
        chance = self._chance(sampling)
        return chance.masked_fill(~self._allowed(sampling), 0.0) if sampling.truncates else chance

    def _chance(self, sampling: Sampling) -> Tensor:
        """The distribution drawn from before it is truncated, [B K, V]."""
        return (self._drawn(sampling) / (sampling.temperature or 1.0)).softmax(-1).flatten(0, 1)

    def _drawn(self, sampling: Sampling) -> Tensor:
        """The logits that actions are drawn by, [B, K, V]: the policy's, or those of its mixture with a model."""
        if sampling.mixture_of is None:
            return self.table()
        return torch.lerp(self.table(), self.model(sampling.mixture_of), sampling.mixture_weight)

    @torch.no_grad()
    def _allowed(self, sampling: Sampling) -> Tensor:
        """Which tokens may be drawn at each node, [B K, V]."""
        chance = self._chance(sampling)
        allowed = kept_tokens(chance, sampling)
        if sampling.nucleus_of is None:
            return allowed
        mask = self.model(sampling.nucleus_of).softmax(-1).flatten(0, 1)
        return allowed & nucleus(mask, sampling.nucleus_p, sampling.nucleus_min, self.end_ids)

    @torch.no_grad()
    def _draw(
        self, problem: Tensor, start: Tensor, limits: Tensor, seeds: Tensor, sampling: Sampling
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Nodes and tokens [M, H], lengths [M], and which trajectories a limit cut [M], from the nodes ``start``."""
        space = self.space
        room = space.length - space.depths[start]
        limits = torch.minimum(limits, room)
        table = self._drawn(sampling).flatten(0, 1)
        if sampling.temperature == 0:
            best = table.masked_fill(~self._allowed(sampling), -torch.inf) if sampling.nucleus_of else table
            cumulative = torch.nn.functional.one_hot(best.argmax(-1), space.vocabulary).cumsum(-1).to(table)
        else:
            cumulative = self._kept(sampling).cumsum(-1, dtype=torch.float64)
        most = int(limits.max())
        nodes = torch.zeros(len(problem), most, dtype=torch.int64)
        ids = torch.zeros_like(nodes)
        lengths = torch.zeros_like(problem)
        ends = torch.tensor([*sampling.stop_ids, *([space.end_token] if space.end else [])], dtype=torch.int64)
        cut = torch.zeros_like(problem, dtype=torch.bool)
        alive, node = torch.arange(len(problem)), start
        for step in range(most):
            below = cumulative[problem[alive] * space.n_nodes + node]
            uniform = uniforms(seeds[alive], torch.full_like(alive, step))
            token = (below <= (uniform * below[:, -1])[:, None]).sum(-1).clamp_(max=space.vocabulary - 1)
            nodes[alive, step], ids[alive, step] = node, token
            lengths[alive] += 1
            ended, full = torch.isin(token, ends), limits[alive] == step + 1
            # A space without an end token ends at its length, not by a limit.
            cut[alive] = ~ended & full & (space.end | (limits < room)[alive])
            going = ~ended & ~full
            alive, node = alive[going], space.child(node, token)[going]
        return nodes, ids, lengths, cut

    def write(self, requests: Sequence[Request], texts: Sequence[Text], *, end: bool = False) -> Rollout:
        """One trajectory per request, a group of its own, whose steps are the tokens of the text (``"2 0 1"``).

        ``end`` appends the end token, where the space has one, to a text that another token could follow. Step columns
        ``action`` and ``mask``; raises UsageError naming the example for a text that the space does not have after the
        request's prefix.
        """
        nodes: list[int] = []
        ids = []
        for request, text in zip(requests, texts, strict=True):
            if not isinstance(text, str):
                raise UsageError(f"an exact policy writes numbers, no chat as that for example {request.example.id!r}")
            written = [int(token) if token.isdecimal() else -1 for token in text.split()]
            if not written:
                raise UsageError(f"a text to write for example {request.example.id!r} is empty")
            if not 0 <= min(written) <= max(written) < self.space.vocabulary:
                raise UsageError(f"the text {text!r} for example {request.example.id!r} has a token outside the space")
            open_ended = written[-1] < self.space.branching and len(request.prefix) + len(written) < self.space.length
            if end and self.space.end and open_ended:
                written.append(self.space.vocabulary - 1)
            # Checked once: up to there every shorter prefix is one of the space too.
            self.space.node_of([*request.prefix, *written[:-1]])
            node = self.space.node_of(request.prefix)
            for token in written:
                nodes.append(node)
                node = node * self.space.branching + 1 + token
            ids.append(torch.tensor(written))
        lengths = torch.tensor([len(written) for written in ids])
        payload = SequencePayload(
            torch.tensor([self._problem(request.example) for request in requests]),
            lengths,
            torch.ones(len(requests), dtype=self.logits.dtype),
            torch.tensor(nodes),
            torch.cat(ids),
            tuple(request.example for request in requests),
            torch.arange(len(requests)),
            self.space.branching,
        )
        step = {"action": payload.ids, "mask": torch.ones_like(payload.ids).bool()}
        trajectory = self._origin(lengths, Source.DATASET) | {"truncated": torch.zeros_like(lengths).bool()}
        return Rollout(lengths, torch.arange(len(requests)), {"step": step, "trajectory": trajectory}, payload)

    def corrupted(self, rollout: Rollout, corruption: Corruption) -> Rollout:
        """The same sequences asked of other problems: a prompt, one symbol here, becomes with ``probability`` that of a
        problem drawn uniformly. Of ``corruption`` the blank is not used.
        """
        payload = cast(SequencePayload, rollout.payload)
        last = rollout.lengths.cumsum(0) - 1
        state = torch.tensor(corruption.seed * 1_000_003 + self.version).expand_as(last)
        place = payload.nodes[last] * self.space.vocabulary + payload.ids[last]
        seeds = _hash(_hash(state, payload.problem), place)
        hit = uniforms(seeds, torch.zeros_like(seeds)) < corruption.probability
        other = (uniforms(seeds, torch.ones_like(seeds)) * self.problems).long()
        spoilt = dataclasses.replace(payload, problem=torch.where(hit, other, payload.problem))
        return dataclasses.replace(rollout, payload=spoilt)

    def room(self, rollout: Rollout) -> list[int]:
        """Steps that each trajectory may still take before the space ends."""
        payload = cast(SequencePayload, rollout.payload)
        last = rollout.lengths.cumsum(0) - 1
        return [self.space.length - 1 - depth for depth in self.space.depths[payload.nodes[last]].tolist()]

    def _origin(self, lengths: Tensor, source: Source) -> dict[str, Tensor]:
        return {"version": torch.full_like(lengths, self.version), "source": torch.full_like(lengths, int(source))}

    def _problem(self, example: Example) -> int:
        given = example.columns.get("problem", example.id)
        try:
            number = int(given)
        except (TypeError, ValueError):
            number = -1
        if not 0 <= number < self.problems:
            raise UsageError(
                f"example {example.id!r} is no problem of this exact policy: its column 'problem' (or else its id) "
                f"must be a number from 0 to {self.problems - 1}, got {given!r}"
            )
        return number

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self, rollout: Rollout, names: frozenset[str]) -> Evaluation:
        """The named columns [N], in the policy's dtype.

        ``logp``, ``entropy`` (nats), ``lse`` and ``collision`` = sum_v pi(v)^2 of pi = softmax(logits / temperature)
        with each trajectory's temperature or, as ``logp@1.2``, with the one given, ``value`` of the prefix before each
        step, all with gradient; without, the functionals of models (`polopt.core.policy.OF_MODELS`), ``max_entropy`` =
        log V and `polopt.core.policy.OUTPUT_LAYER`, whose ``hidden`` is one-hot (which row of which problem's logits
        the prefix reads) over the temperature. Raises ValueError for a name that is not in `columns`.
        """
        if unknown := sorted(name for name in names if pattern(name) not in self.columns):
            raise ValueError(
                f"this policy cannot evaluate {unknown[0]!r} (it can: {', '.join(sorted(self.columns))}); "
                "models are added with add_model, a critic with add_critic"
            )
        payload = rollout.payload
        if not isinstance(payload, SequencePayload):
            raise TypeError(f"an exact policy evaluates rollouts of sequences, not of {type(payload).__name__}")
        return Evaluation(self._functionals(payload, names, kept_of(rollout) if names & MASKED else None))

    def _functionals(
        self, payload: SequencePayload, names: frozenset[str], kept: Tensor | None = None
    ) -> dict[str, Tensor]:
        place = payload.step_problem * self.space.n_nodes + payload.nodes
        temperature = payload.step_temperature[:, None].to(self.logits.dtype)

        def steps(table: Tensor) -> Tensor:
            return table.flatten(0, 1)[place] / temperature

        def chosen(logits: Tensor) -> Tensor:
            return logits.log_softmax(-1).gather(1, payload.ids[:, None])[:, 0]

        own = steps(self.table())
        found: dict[str, Tensor] = {}
        if kept is not None:
            found |= masked_functionals(own, payload.ids, unpack(kept, self.space.vocabulary), names & MASKED)
        for name in sorted(names - found.keys()):
            functional, other_temperature = split_temperature(name)
            z = own if other_temperature is None else own * (temperature / other_temperature)
            if functional == "logp":
                found[name] = chosen(z)
            elif functional == "entropy":
                logp = z.log_softmax(-1)
                found[name] = -(logp.exp() * logp).sum(-1)
            elif functional == "lse":
                found[name] = z.logsumexp(-1)
            elif functional == "collision":
                found[name] = z.softmax(-1).square().sum(-1)
            elif name == "max_entropy":
                found[name] = torch.full_like(own[:, 0].detach(), math.log(self.space.vocabulary))
            elif (head := head_of(name)) is not None:
                assert self.values is not None
                found[name] = self.values[..., None].flatten(2)[:, self.rows, head - 1].flatten()[place]
            elif name == "hidden":
                found[name] = self._one_hot(payload) / temperature
            elif name in OUTPUT_LAYER:
                found |= _most_likely(own.detach())
            else:
                kind, _, model = name.partition("/")
                seen = model in self._views
                other = self._blind(payload.nodes, temperature) if seen else steps(self._models[model])
                found[name] = chosen(other) if kind == "logp" else _divergence(kind, own.detach(), other)
        return found

    def _one_hot(self, payload: SequencePayload) -> Tensor:
        """The row of parameters that each step reads, as a state of the output layer logits^T [V, B P]: [N, B P]."""
        row = payload.step_problem * self.logits.shape[1] + self.rows[payload.nodes]
        return torch.nn.functional.one_hot(row, self.logits.shape[:2].numel()).to(self.logits.dtype)

    @torch.no_grad()
    def _blind(self, nodes: Tensor, temperature: Tensor) -> Tensor:
        """log of the mean over problems of pi_b(token | node) at each step, [N, V]."""
        return (self.table()[:, nodes] / temperature).log_softmax(-1).logsumexp(0) - math.log(self.problems)

    def cost(self, rollout: Rollout) -> list[int]:
        """Tokens of each trajectory; a prompt costs nothing."""
        found: list[int] = rollout.lengths.tolist()
        return found

    # --- models, parameters, state ------------------------------------------------------------------------------

    def add_model(self, name: str, table: Float[Tensor, "problem node token"] | None = None) -> None:
        """Freeze the present logits, or any table of logits [B, K, V], as ``name``, in place of one of that name.

        Raises UsageError for a table of another shape.
        """
        frozen = self.table() if table is None else table
        shape = (self.problems, self.space.n_nodes, self.space.vocabulary)
        if tuple(frozen.shape) != shape:
            raise UsageError(f"model {name!r} needs a table of logits of shape {shape}, got {tuple(frozen.shape)}")
        self._models[name] = frozen.detach().to(self.logits.dtype, copy=True)

    def load_model(self, name: str, folder: Path) -> None:
        """Freeze the policy that `save` wrote to a folder as ``name``; its head may be another.

        Raises UsageError naming the folder when it holds none, or one of another space or number of problems.
        """
        saved = type(self).load(folder)
        if (saved.space, saved.problems) != (self.space, self.problems):
            raise UsageError(
                f"{folder} holds a policy of {saved.problems} problems on {saved.space}, model {name!r} must have "
                f"{self.problems} on {self.space}"
            )
        self.add_model(name, saved.table())

    def add_view(self, name: str, corruption: Corruption) -> None:
        """Let ``name`` stand for the present policy with its prompt removed: m(v | prefix) = mean_b pi_b(v | prefix).

        A prompt is one symbol here, the number of a problem, and the view always removes it: of ``corruption``
        nothing else is used. Raises UsageError for the name of a model.
        """
        if name in self._models:
            raise UsageError(f"this policy has a model {name!r} already; give the view another name")
        self._views[name] = corruption

    @property
    def models(self) -> frozenset[str]:
        """Names of the added models, views left out."""
        return frozenset(self._models)

    def model(self, name: str) -> Float[Tensor, "problem node token"]:
        """The logits [B, K, V] of an added model."""
        if name not in self._models:
            raise UsageError(f"this policy has no model {name!r}; it has {', '.join(self._models) or 'none'}")
        return self._models[name]

    def add_critic(self, heads: int = 1) -> None:
        """A value per row of parameters, 0 at first: a tabular critic [B, P].

        Several heads make it [B, P, heads] and start at random (`polopt.policies.values.initial_values`). Does nothing
        where there is one of as many heads. Raises UsageError where there are others.
        """
        if self.values is None:
            shape = tuple(self.logits.shape[:2])
            start = torch.zeros(shape) if heads == 1 else initial_values(*shape, heads)
            self.values = Parameter(start.to(self.logits.dtype))
        elif self.heads != heads:
            raise UsageError(f"the critic has value heads: {self.heads}, asked for: {heads}")

    @property
    def heads(self) -> int:
        """How many value heads the critic has, 0 without a critic."""
        return 0 if self.values is None else self.values[..., None].shape[2]

    def parameters(self) -> Sequence[Parameter]:
        """The logits, and the critic's values."""
        return [self.logits] if self.values is None else [self.logits, self.values]

    def state_dict(self) -> dict[str, Any]:
        """``version``, logits, critic, added models and the settings of views."""
        return {
            "version": self.version,
            "logits": self.logits.detach(),
            "values": None if self.values is None else self.values.detach(),
            "models": dict(self._models),
            "views": {name: dataclasses.asdict(view) for name, view in self._views.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; models, views and a critic that are not there yet are added.

        Raises UsageError when the state is not of a policy of this shape.
        """
        # A state from before there were views has none; the policy keeps its own then.
        if odd := sorted({"version", "logits", "values", "models"} ^ (set(state) - {"views"})):
            raise UsageError(f"the state is not that of an exact policy: {odd[0]!r} is missing or unknown")
        if state["logits"].shape != self.logits.shape:
            raise UsageError(
                f"the state has logits of shape {tuple(state['logits'].shape)}, this policy {tuple(self.logits.shape)}"
            )
        if state["values"] is None and self.values is not None:
            raise UsageError("the state has no critic, but the policy has one")
        if state["values"] is not None:
            self.add_critic(state["values"][..., None].shape[2])
            assert self.values is not None
            self.values.copy_(state["values"])
        self.logits.copy_(state["logits"])
        self._models = {}
        for name, table in state["models"].items():
            self.add_model(name, table)
        self._views |= {name: Corruption(**view) for name, view in state.get("views", {}).items()}
        self.version = int(state["version"])

    def save(self, folder: Path) -> None:
        """Write ``policy.json`` and ``policy.safetensors``, which `load` reads; added models are left out."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "format": FORMAT,
            "vocabulary": self.space.vocabulary,
            "length": self.space.length,
            "end": self.space.end,
            "head": self.head,
            "version": self.version,
        }
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        tensors = {"logits": self.logits.detach().contiguous()}
        if self.values is not None:
            tensors["values"] = self.values.detach().contiguous()
        save_file(tensors, folder / _WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The policy that `save` wrote. Raises UsageError naming the folder when it holds none or a damaged one."""
        try:
            settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
            tensors = load_file(folder / _WEIGHTS)
            if settings["format"] != FORMAT:
                raise UsageError(f"{folder} holds an exact policy of format {settings['format']}, this is {FORMAT}")
            space = SequenceSpace(settings["vocabulary"], settings["length"], settings["end"])
            logits = tensors["logits"]
            policy = cls(space, len(logits), logits, head=settings["head"], dtype=logits.dtype)
            policy.version = int(settings["version"])
        except UsageError:
            raise
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UsageError(f"{folder} holds no exact policy that can be read: {error}") from error
        if "values" in tensors:
            policy.add_critic(tensors["values"][..., None].shape[2])
            assert policy.values is not None
            with torch.no_grad():
                policy.values.copy_(tensors["values"])
        return policy


def example_of(problem: int, name: str = "") -> Example:
    """The plain example that asks for a problem."""
    identity = f"{name}/{problem}" if name else str(problem)
    return Example(identity, f"problem {problem}", columns={"problem": problem})


def _divergence(kind: str, own: Tensor, other: Tensor) -> Tensor:
    """``hellinger`` or ``kl`` [N] of softmax(own) and softmax(other), [N, V] each."""
    p, q = own.log_softmax(-1), other.log_softmax(-1)
    if kind == "kl":
        return (p.exp() * (p - q)).sum(-1).clamp_min(0)
    # 1 - sum sqrt(p q), in the form that is exactly 0 for equal models.
    return ((p / 2).exp() - (q / 2).exp()).square().sum(-1).div(2).clamp(max=1)


def _most_likely(logits: Tensor) -> dict[str, Tensor]:
    """``top_id`` and ``top_logp`` [N, K] from logits [N, V]."""
    logp, ids = logits.log_softmax(-1).topk(min(TOP, logits.shape[1]))
    return {"top_id": ids, "top_logp": logp}


def _hash(seed: Tensor, number: Tensor) -> Tensor:
    return (uniforms(seed, number) * 2.0**52).long()
