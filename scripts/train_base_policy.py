"""Train the base policy that ships with the package, from nothing, on generated demonstrations.

    python scripts/train_base_policy.py --out polopt/assets/base --seed 0 --minutes 25

The policy is meant to be improved, not to be good: demonstrations mix an accurate way of answering each task with
quick ways that are mostly wrong (``Task.strategies`` and ``Task.shares``), so that sampling at temperature 1 solves a
part of each task by more than one strategy. Only prompts of the train split are used. The folder receives the weights,
the tokenizer and ``training.json``: command, tokens, seconds and held-out accuracy by task and strategy.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor, distributed, multiprocessing
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from polopt.core.example import Example
from polopt.tasks.registry import tasks
from polopt.tasks.task import Task, demonstration

PAD, BOS, EOS = 256, 257, 258
VOCABULARY = 259
BOS_SHARE = 0.1
"""Share of sequences that begin with ``<bos>``, so that the policy answers with and without one."""

TASK_SHARES = {"arithmetic": 0.45, "countdown": 0.2, "programs": 0.2, "grid": 0.15}
FINAL_MIX_FROM = 0.6
"""Until this part of the run the accurate strategy is over-represented (it is what takes long to learn)."""
EARLY_ACCURATE_SHARE = 0.6
DECAY_FROM = 0.65
WARMUP_STEPS = 60
WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class Batch:
    """Sequences packed into rows; ``position`` restarts and ``sequence`` changes where a new sequence begins."""

    token: Tensor
    position: Tensor
    sequence: Tensor
    is_completion: Tensor


def byte_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """One token per byte (token id = byte value), no merges, and ``<pad> <bos> <eos>``; adds nothing by itself."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    # The byte-level alphabet of GPT-2 moves the other bytes, in order, to the code points from 256 on.
    moved = {byte: 256 + index for index, byte in enumerate(b for b in range(256) if b not in printable)}
    vocabulary = {chr(moved.get(byte, byte)): byte for byte in range(256)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


def untrained_policy(hidden: int, layers: int, context: int) -> Qwen3ForCausalLM:
    """A Qwen3 decoder over bytes with random weights; 4 heads of 32, 2 of them for keys and values."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=3 * hidden,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        use_cache=True,
    )
    # At this size plain attention is faster on a CPU than the fused kernel, whose masked backward pass is slow.
    config._attn_implementation = "eager"
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
    )
    return model


def example_stream(task: Task, seed: int) -> Iterator[Example]:
    """Endless examples of the train split."""
    chunk = 0
    while True:
        # Seeds that no user's run is likely to start from; the split, not the seed, keeps the test prompts out.
        yield from task.examples(1024, seed=1_000_000 * (seed + 1) + chunk)
        chunk += 1


def demonstration_stream(seed: int, progress: list[float]) -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) pairs; ``progress[0]`` in 0..1 decides the mixture of strategies."""
    rng = random.Random(f"demonstrations/{seed}")
    known = tasks()
    streams = {name: example_stream(known[name], seed) for name in TASK_SHARES}
    names, shares = list(TASK_SHARES), list(TASK_SHARES.values())
    while True:
        (name,) = rng.choices(names, weights=shares)
        task, example = known[name], next(streams[name])
        if progress[0] < FINAL_MIX_FROM and rng.random() < EARLY_ACCURATE_SHARE:
            completion = task.demonstration(example, task.strategies[0], rng)
        else:
            completion = demonstration(task, example, rng)
        yield str(example.prompt), completion


def batch_stream(pairs: Iterator[tuple[str, str]], rows: int, width: int, seed: int) -> Iterator[Batch]:
    """Pack sequences into rows in the order they come; what does not fit opens the next row."""
    rng = random.Random(f"packing/{seed}")
    carried: tuple[list[int], int] | None = None
    while True:
        token, position, sequence, is_completion = (_table(rows, width, fill) for fill in (PAD, 0, -1, 0))
        for row in range(rows):
            used, index = 0, 0
            while True:
                if carried is None:
                    prompt, completion = next(pairs)
                    start = ([BOS] if rng.random() < BOS_SHARE else []) + list(prompt.encode())
                    carried = ([*start, *completion.encode(), EOS], len(start))
                ids, prompt_length = carried
                end = used + len(ids)
                if end > width:
                    break
                token[row][used:end] = ids
                position[row][used:end] = range(len(ids))
                sequence[row][used:end] = [index] * len(ids)
                is_completion[row][used + prompt_length : end] = [1] * (len(ids) - prompt_length)
                used, index, carried = end, index + 1, None
        yield Batch(
            torch.tensor(token), torch.tensor(position), torch.tensor(sequence), torch.tensor(is_completion).bool()
        )


def _table(rows: int, width: int, fill: int) -> list[list[int]]:
    return [[fill] * width for _ in range(rows)]


def completion_loss(model: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy, in nats, of completion tokens given their own sequence only."""
    width = batch.token.shape[1]
    same = batch.sequence[:, :, None] == batch.sequence[:, None, :]
    visible = (same & torch.ones(width, width, dtype=torch.bool).tril())[:, None]
    # Additive, because plain attention would add a mask of booleans as zeros and ones. Padding sees its like only.
    mask = torch.zeros(visible.shape, dtype=torch.bfloat16).masked_fill_(~visible, -1e9)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(input_ids=batch.token, position_ids=batch.position, attention_mask=mask).last_hidden_state
        chosen = batch.is_completion[:, 1:]
        logits = hidden[:, :-1][chosen] @ model.embed_tokens.weight.T
    return F.cross_entropy(logits.float(), batch.token[:, 1:][chosen])


def matrix_and_vector_optimizers(model: Qwen3ForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms.

    Muon (Jordan et al. 2024) needs clearly fewer tokens here; its steps are scaled to the size of AdamW's, so that
    one learning rate serves both.
    """
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_at(done: float, step: int, peak: float) -> float:
    """Warm-up by steps, then constant, then linear to 2% of the peak over the last part of the run."""
    decay = 1.0 if done < DECAY_FROM else 1.0 - 0.98 * (done - DECAY_FROM) / (1.0 - DECAY_FROM)
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * max(decay, 0.02)


@torch.no_grad()
def sampled_completions(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], limit: int
) -> list[str]:
    """One completion per prompt, sampled at temperature 1."""
    encoded = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=limit,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    return list(tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True))


def held_out_report(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Per task: accuracy of one sample per test prompt at temperature 1, its 95% half-width, by level and strategy."""
    model.eval()
    report: dict[str, dict[str, Any]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in TASK_SHARES:
            task = tasks()[name]
            examples = task.examples(count, seed=seed, split="test")
            scored: list[tuple[str, int, float]] = []
            for start in range(0, count, 256):
                part = examples[start : start + 256]
                texts = sampled_completions(model, tokenizer, [str(e.prompt) for e in part], task.max_new_tokens)
                scored += [
                    (task.strategy_of(text), e.columns["level"], task.score(text, e))
                    for e, text in zip(part, texts, strict=True)
                ]
            accuracy = sum(score for _, _, score in scored) / count
            report[name] = {
                "prompts": count,
                "accuracy": round(accuracy, 4),
                "half_width_95": round(1.96 * math.sqrt(accuracy * (1 - accuracy) / count), 4),
                "levels": {
                    str(level): round(_mean([s for _, at, s in scored if at == level]), 4) for level in task.levels
                },
                "strategies": {
                    strategy: {
                        "share": round(used / count, 4),
                        "accuracy": round(_mean([s for form, _, s in scored if form == strategy]), 4),
                    }
                    for strategy, used in Counter(form for form, _, _ in scored).most_common()
                },
            }
    model.train()
    return report


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any], out: Path) -> None:
    """Write the folder file by file, each replaced in one move, so that a reader never sees half a file."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        (Path(staging) / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        for file in Path(staging).iterdir():
            file.chmod(0o644)  # the weights are written for their owner only, but they ship
            file.replace(out / file.name)


def train(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    """Train data-parallel: every worker has its own stream of demonstrations, gradients are averaged, worker 0 reports.

    One thread per worker: matrices this small gain nothing from a second thread, and lose where cores are shared.
    """
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=options.workers)
    torch.manual_seed(options.seed)
    model = untrained_policy(options.hidden, options.layers, options.context)
    tokenizer = byte_tokenizer(options.context)
    parameters = list(model.parameters())
    size = sum(parameter.numel() for parameter in parameters)
    optimizers = matrix_and_vector_optimizers(model, options.lr)
    progress = [0.0]
    stream_seed = options.seed * options.workers + rank
    pairs = demonstration_stream(stream_seed, progress)
    batches = batch_stream(pairs, options.rows // options.workers, options.width, stream_seed)

    def record(finished: bool, prompts: int) -> dict[str, Any]:
        return {
            "command": " ".join(["python", *sys.argv]),
            "finished": finished,
            "parameters": size,
            "steps": step,
            "tokens": tokens,
            "seconds": round(time.monotonic() - started),
            "loss": round(smoothed, 4),
            "held_out": held_out_report(model, tokenizer, prompts, seed=7),
        }

    started = reported = evaluated = time.monotonic()
    step = tokens = 0
    smoothed = math.log(VOCABULARY)
    if rank == 0:
        print(f"{size:,} parameters, {options.workers} workers", flush=True)
    while progress[0] < 1.0:
        batch = next(batches)
        rate = learning_rate_at(progress[0], step, options.lr)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss = completion_loss(model.model, batch)
        model.zero_grad()
        loss.backward()
        # Worker 0's clock is the run's clock: it travels with the gradient so that all workers stop together.
        clock = (time.monotonic() - started) / (60 * options.minutes) if rank == 0 else 0.0
        extra = torch.tensor([loss.item() / options.workers, float((batch.sequence >= 0).sum()), clock])
        flat = torch.cat([parameter.grad.flatten() / options.workers for parameter in parameters] + [extra])
        distributed.all_reduce(flat)
        mean_loss, batch_tokens, clock = flat[size:].tolist()
        for parameter, gradient in zip(parameters, flat[:size].split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        tokens += int(batch_tokens)
        smoothed += (mean_loss - smoothed) * max(0.02, 1 / step)
        progress[0] = tokens / options.tokens if options.tokens else clock
        now = time.monotonic()
        if rank == 0 and now - reported > 15:
            reported = now
            print(
                f"{progress[0]:6.1%}  step {step}  {tokens / 1e6:.2f}M tokens  {tokens / (now - started):,.0f} tokens/s"
                f"  loss {smoothed:.4f}  lr {rate:.1e}",
                flush=True,
            )
        if rank == 0 and now - evaluated > options.evaluate_every:
            state = record(False, 128)
            save(model, tokenizer, state, options.out)
            for name, row in state["held_out"].items():
                print(f"    {name:<11} {row['accuracy']:.3f}  {row['levels']}  {row['strategies']}", flush=True)
            evaluated = time.monotonic()
    if rank == 0:
        state = record(True, 2048)
        save(model, tokenizer, state, options.out)
        print(json.dumps(state, indent=2))
    distributed.destroy_process_group()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def main() -> None:
    """Read the command line and start the workers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("polopt/assets/base"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=25.0, help="wall time to train for")
    budget.add_argument("--tokens", type=int, help="tokens to train on, instead of a time: makes the run repeatable")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rows", type=int, default=48, help="rows per batch, all workers together")
    parser.add_argument("--width", type=int, default=112, help="tokens per row")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--evaluate-every", type=float, default=240.0, help="seconds between checkpoints")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as meeting:
        multiprocessing.spawn(train, (options, f"file://{meeting}/rendezvous"), nprocs=options.workers)


if __name__ == "__main__":
    main()
