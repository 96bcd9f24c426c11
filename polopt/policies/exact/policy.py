"""A softmax policy over every prefix of a short sequence, for a batch of independent problems."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.loss import Evaluation
from polopt.core.policy import Request, Sampling
from polopt.core.rollout import Rollout, Source
from polopt.policies.exact import heads, tree
from polopt.policies.exact.payload import SequencePayload
from polopt.policies.exact.space import SequenceSpace
from polopt.policies.sampling import kept_tokens, uniforms

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
    def columns(self) -> frozenset[str]:
        """``logp``, ``entropy``, ``lse``, ``value`` with a critic, and ``logp/<model>`` of every added model."""
        values = {"value"} if self.values is not None else set()
        return frozenset({"logp", "entropy", "lse"} | values | {f"logp/{name}" for name in self._models})

    def sample(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        """One group per request; step columns ``logp``, ``entropy``, ``mask``, and ``logp/sampled`` under truncation.

        A trajectory depends on the logits of its problem, ``seed``, the index of its request and its place in it alone.
        Log-probs are those of the temperature (of 1 at temperature 0). ``truncated`` are those that the limit cut, or
        in a space with an end token its length. Raises UsageError for an example without a problem of this policy, a
        prompt other than the example's, stop strings, or no request.
        """
        counts = torch.tensor([request.count for request in requests], dtype=torch.int64)
        if not int(counts.sum()):
            raise UsageError("nothing to sample: no request asks for a trajectory")
        if sampling.stop:
            raise UsageError(f"an exact policy writes no text that could end at {sampling.stop[0]!r}; give stop_ids")
        for request in requests:
            if request.prompt is not None and request.prompt != request.example.prompt:
                raise UsageError(
                    f"an exact policy knows problems, not texts: it cannot answer example {request.example.id!r} under "
                    f"another prompt"
                )
        problem = torch.tensor([self._problem(request.example) for request in requests])
        owner = torch.arange(len(requests)).repeat_interleave(counts)
        place = torch.arange(len(owner)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        # A hash of (seed, request, place), 52 bits at each stage.
        seeds = _hash(_hash(torch.tensor(seed), owner), place)
        nodes, ids, lengths, cut = self._draw(problem[owner], seeds, sampling)
        if progress is not None:
            progress(len(owner), len(owner))
        written = torch.arange(nodes.shape[1])[None] < lengths[:, None]
        payload = SequencePayload(
            problem[owner],
            lengths,
            torch.full((len(owner),), sampling.temperature or 1.0, dtype=self.logits.dtype),
            nodes[written],
            ids[written],
            tuple(request.example for request in requests),
            owner,
        )
        # Group ids are 0.. without gaps, whatever the requests that ask for nothing.
        return self._rollout(payload, torch.unique(owner, return_inverse=True)[1], cut, sampling)

    def sample_sequences(self, count: int, *, seed: int, temperature: float = 1.0) -> Int[Tensor, "problem count"]:
        """Numbers of ``count`` sequences drawn for every problem, [B, count]: a fast Monte-Carlo sample."""
        problem = torch.arange(self.problems).repeat_interleave(count)
        place = torch.arange(count).repeat(self.problems)
        seeds = _hash(_hash(torch.tensor(seed), problem), place)
        nodes, ids, lengths, _ = self._draw(problem, seeds, Sampling(temperature=temperature))
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
        )
        return self._rollout(payload, group, self.space.truncated[sequence], Sampling())

    def _rollout(self, payload: SequencePayload, group: Tensor, cut: Tensor, sampling: Sampling) -> Rollout:
        with torch.no_grad():
            found = self._functionals(payload, frozenset({"logp", "entropy"}))
        step = {"logp": found["logp"], "entropy": found["entropy"], "mask": torch.ones_like(payload.ids).bool()}
        if (kept := self._kept(sampling)) is not None:
            flat = payload.step_problem * self.space.n_nodes + payload.nodes
            total = kept.sum(-1)[flat]
            if sampling.temperature == 0:
                total = kept[flat, payload.ids]
            step["logp/sampled"] = kept[flat, payload.ids].log() - total.log()
        trajectory = {
            "truncated": cut,
            "version": torch.full_like(payload.lengths, self.version),
            "source": torch.full_like(payload.lengths, int(Source.POLICY)),
        }
        return Rollout(payload.lengths, group, {"step": step, "trajectory": trajectory}, payload)

    @torch.no_grad()
    def _kept(self, sampling: Sampling) -> Tensor | None:
        """Probabilities [B K, V] with truncated tokens at 0; None where nothing is truncated."""
        if not sampling.truncates:
            return None
        chance = (self.table() / (sampling.temperature or 1.0)).softmax(-1).flatten(0, 1)
        return chance.masked_fill(~kept_tokens(chance, sampling), 0.0)

    @torch.no_grad()
    def _draw(self, problem: Tensor, seeds: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Nodes and tokens [M, H], lengths [M], and which trajectories a limit cut [M]."""
        space = self.space
        limit = min(sampling.max_new_tokens or space.length, space.length)
        table = self.table().flatten(0, 1)
        if sampling.temperature == 0:
            cumulative = torch.nn.functional.one_hot(table.argmax(-1), space.vocabulary).cumsum(-1).to(table)
        else:
            kept = self._kept(sampling)
            chance = (table / sampling.temperature).softmax(-1) if kept is None else kept
            cumulative = chance.cumsum(-1, dtype=torch.float64)
        nodes = torch.zeros(len(problem), limit, dtype=torch.int64)
        ids = torch.zeros_like(nodes)
        lengths = torch.zeros_like(problem)
        ends = torch.tensor([*sampling.stop_ids, *([space.end_token] if space.end else [])], dtype=torch.int64)
        alive = torch.arange(len(problem))
        node = torch.zeros_like(problem)
        for depth in range(limit):
            below = cumulative[problem[alive] * space.n_nodes + node]
            uniform = uniforms(seeds[alive], torch.full_like(alive, depth))
            token = (below <= (uniform * below[:, -1])[:, None]).sum(-1).clamp_(max=space.vocabulary - 1)
            nodes[alive, depth], ids[alive, depth] = node, token
            lengths[alive] += 1
            going = ~torch.isin(token, ends)
            alive, node = alive[going], space.child(node, token)[going]
        cut = torch.zeros_like(problem, dtype=torch.bool)
        cut[alive] = space.end or limit < space.length
        return nodes, ids, lengths, cut

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

        ``logp``, ``entropy`` (nats) and ``lse`` of softmax(logits / temperature) with each trajectory's temperature,
        ``value`` of the prefix before each step, all with gradient; ``logp/<model>`` without. Raises ValueError for a
        name that is not in `columns`.
        """
        if unknown := sorted(names - self.columns):
            raise ValueError(
                f"this policy cannot evaluate {unknown[0]!r} (it can: {', '.join(sorted(self.columns))}); "
                "models are added with add_model, a critic with add_critic"
            )
        payload = rollout.payload
        if not isinstance(payload, SequencePayload):
            raise TypeError(f"an exact policy evaluates rollouts of sequences, not of {type(payload).__name__}")
        return Evaluation(self._functionals(payload, names))

    def _functionals(self, payload: SequencePayload, names: frozenset[str]) -> dict[str, Tensor]:
        place = payload.step_problem * self.space.n_nodes + payload.nodes
        temperature = payload.step_temperature[:, None].to(self.logits.dtype)

        def steps(table: Tensor) -> Tensor:
            return table.flatten(0, 1)[place] / temperature

        def chosen(logits: Tensor) -> Tensor:
            return logits.log_softmax(-1).gather(1, payload.ids[:, None])[:, 0]

        own = steps(self.table())
        found: dict[str, Tensor] = {}
        for name in sorted(names):
            if name == "logp":
                found[name] = chosen(own)
            elif name == "entropy":
                logp = own.log_softmax(-1)
                found[name] = -(logp.exp() * logp).sum(-1)
            elif name == "lse":
                found[name] = own.logsumexp(-1)
            elif name == "value":
                assert self.values is not None
                found[name] = self.values[:, self.rows].flatten()[place]
            else:
                found[name] = chosen(steps(self._models[name.removeprefix("logp/")]))
        return found

    def cost(self, rollout: Rollout) -> list[int]:
        """Tokens of each trajectory; a prompt costs nothing."""
        return [int(length) for length in rollout.lengths]

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

    def model(self, name: str) -> Float[Tensor, "problem node token"]:
        """The logits [B, K, V] of an added model."""
        if name not in self._models:
            raise UsageError(f"this policy has no model {name!r}; it has {', '.join(self._models) or 'none'}")
        return self._models[name]

    def add_critic(self) -> None:
        """A value per row of parameters, 0 at first: a tabular critic [B, P]. Does nothing where there is one."""
        if self.values is None:
            self.values = Parameter(torch.zeros(self.logits.shape[:2], dtype=self.logits.dtype))

    def parameters(self) -> Sequence[Parameter]:
        """The logits, and the critic's values."""
        return [self.logits] if self.values is None else [self.logits, self.values]

    def state_dict(self) -> dict[str, Any]:
        """``version``, logits, critic and added models."""
        return {
            "version": self.version,
            "logits": self.logits.detach(),
            "values": None if self.values is None else self.values.detach(),
            "models": dict(self._models),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; models and a critic that are not there yet are added.

        Raises UsageError when the state is not of a policy of this shape.
        """
        if odd := sorted({"version", "logits", "values", "models"} ^ set(state)):
            raise UsageError(f"the state is not that of an exact policy: {odd[0]!r} is missing or unknown")
        if state["logits"].shape != self.logits.shape:
            raise UsageError(
                f"the state has logits of shape {tuple(state['logits'].shape)}, this policy {tuple(self.logits.shape)}"
            )
        if state["values"] is None and self.values is not None:
            raise UsageError("the state has no critic, but the policy has one")
        if state["values"] is not None:
            self.add_critic()
            assert self.values is not None
            self.values.copy_(state["values"])
        self.logits.copy_(state["logits"])
        self._models = {}
        for name, table in state["models"].items():
            self.add_model(name, table)
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
            policy.add_critic()
            assert policy.values is not None
            with torch.no_grad():
                policy.values.copy_(tensors["values"])
        return policy


def example_of(problem: int, name: str = "") -> Example:
    """The plain example that asks for a problem."""
    identity = f"{name}/{problem}" if name else str(problem)
    return Example(identity, f"problem {problem}", columns={"problem": problem})


def _hash(seed: Tensor, number: Tensor) -> Tensor:
    return (uniforms(seed, number) * 2.0**52).long()
