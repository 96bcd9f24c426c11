"""Random models of a few thousand weights and a byte-level tokenizer, made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from polopt.core.example import Example
from polopt.core.rollout import Rollout
from polopt.policies.causal_lm.payload import TokenPayload

VOCABULARY, BOS, EOS = 258, 256, 257

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "initializer_range": 0.4,  # so that the distributions are far from uniform
}
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "bos_token_id": BOS, "eos_token_id": EOS, "initializer_range": 0.4,
}  # fmt: skip


def tiny(family: str = "Qwen3", seed: int = 0, **options: Any) -> Any:
    """A model of a family with random weights, dropout included where the family has it by default."""
    sizes = GPT2 if family == "GPT2" else SIZES
    config = getattr(transformers, f"{family}Config")(**{**sizes, **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
        return getattr(transformers, name)(config).eval()


def byte_tokenizer(*, template: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, in the byte-level alphabet's own order, and <bos>, <eos>; adds nothing by itself."""
    vocabulary = {piece: index for index, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    chat = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<eos>' }}{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        chat_template=chat + "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}" if template else None,
    )


def token_rollout(
    sizes: Sequence[tuple[int, int]] = ((3, 5), (7, 1), (1, 6), (3, 2)),
    temperature: Sequence[float] | None = None,
    seed: int = 0,
) -> Rollout:
    """Random prompts and completions of the given (prompt, completion) lengths, one group each."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [[torch.randint(BOS, (length,), generator=generator).tolist() for length in size] for size in sizes]
    lengths = torch.tensor([completion for _, completion in sizes])
    payload = TokenPayload.build(
        [prompt for prompt, _ in pairs],
        [completion for _, completion in pairs],
        torch.tensor(temperature if temperature is not None else [1.0] * len(sizes)),
        [Example(str(index), "?") for index in range(len(sizes))],
        ["?"] * len(sizes),
        ["!"] * len(sizes),
    )
    return Rollout(lengths, torch.arange(len(sizes)), payload=payload)
