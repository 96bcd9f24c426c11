"""(c) Log-prob and entropy of every position, forward and backward, at a large vocabulary: time and peak memory.

Against the plain computation (logits of the whole batch, log_softmax, entropy) and TRL's chunked one. Hidden states and
weight are inputs whose gradients are computed; memory is what a call adds at its peak to what was there before, the
gradients that must exist anyway taken off. Each measurement of memory is a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import peak_memory, product_rate
from benchmarks.row import Row
from benchmarks.timing import alternate

POSITIONS, HIDDEN = 2048, 1024
CASES: Mapping[str, tuple[int, torch.dtype]] = {
    "log-probs-32k-float32": (32_768, torch.float32),
    "log-probs-32k-bfloat16": (32_768, torch.bfloat16),
    "log-probs-152k-float32": (151_936, torch.float32),
    "log-probs-152k-bfloat16": (151_936, torch.bfloat16),
}
GOAL = 1.0
MEMORY_GOAL = 0.2

Functional = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def run(name: str, rounds: int) -> Row:
    """Measure one case."""
    inputs = _inputs(name)
    times = alternate({which: _work(FUNCTIONALS[which], *inputs) for which in FUNCTIONALS}, rounds)
    faster = min(("plain", "trl"), key=times.median)
    ratio, low, high = times.ratio(faster, "polopt")
    memory = {which: _memory_in_a_process(name, which) for which in FUNCTIONALS}
    vocabulary, dtype = CASES[name]
    # Logits, and the two products of their gradient.
    least = 3 * 2 * POSITIONS * HIDDEN * vocabulary / product_rate(POSITIONS, HIDDEN, 16_384, dtype)
    seconds = times.median("polopt")
    more = {
        **{f"{which}_seconds": times.median(which) for which in ("plain", "trl")},
        **{f"{which}_peak_mb": value / 2**20 for which, value in memory.items()},
        "memory_of_plain": memory["polopt"] / memory["plain"],
    }
    peer, most = f"the faster of plain and TRL ({faster})", {"memory_of_plain": MEMORY_GOAL}
    return Row(name, peer, ratio, low, high, least / seconds, GOAL, seconds, more, most)


def _inputs(name: str) -> tuple[Tensor, Tensor, Tensor]:
    vocabulary, dtype = CASES[name]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, HIDDEN, generator=generator) * HIDDEN**-0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (POSITIONS,), generator=generator)


def _work(functional: Functional, hidden: Tensor, weight: Tensor, targets: Tensor) -> Callable[[], None]:
    scale = torch.linspace(-1, 1, POSITIONS)

    def forward_and_backward() -> None:
        hidden.grad = weight.grad = None
        logp, entropy = functional(hidden, weight, targets)
        (logp * scale + 0.01 * entropy).sum().backward()  # type: ignore[no-untyped-call]

    return forward_and_backward


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As everybody writes it first."""
    logp = (hidden @ weight.t()).float().log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """TRL's tiles, at its own width."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as width

    logp, entropy, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, width, None, 1.0, ("entropy",))
    return logp, entropy


def polopt(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """polopt's."""
    from polopt.policies.causal_lm.fused import linear_functionals

    found = linear_functionals(hidden, weight, targets, frozenset({"logp", "entropy"}))
    return found["logp"], found["entropy"]


FUNCTIONALS: Mapping[str, Functional] = {"plain": plain, "trl": trl, "polopt": polopt}


def _memory_in_a_process(name: str, which: str) -> int:
    code = f"from benchmarks.log_probs import memory; print('BYTES', memory({name!r}, {which!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.rpartition("BYTES")[2])


def memory(name: str, which: str) -> int:
    """Peak bytes of one forward and backward beyond the inputs' gradients."""
    hidden, weight, targets = _inputs(name)
    small = slice(0, 64)
    # Threads, kernels and pools start up on something small.
    warm: list[Any] = [hidden[small].detach().requires_grad_(), weight[:512].detach().requires_grad_()]
    logp, _ = FUNCTIONALS[which](warm[0], warm[1], targets[small] % 512)
    logp.sum().backward()  # type: ignore[no-untyped-call]
    del logp, warm
    taken = peak_memory(_work(FUNCTIONALS[which], hidden, weight, targets))
    return taken - sum(x.numel() * x.element_size() for x in (hidden, weight))
