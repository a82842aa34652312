"""What `bench_step.py` trains: a random Llama with a tokenizer of its own, prompts of one length, a cheap reward.

And what a step has to have done before its time counts.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
SPECIAL = (PAD, EOS, UNKNOWN)


@dataclass(frozen=True)
class Size:
    """A Llama and the step it takes: P prompts of S tokens, G completions of L new tokens each."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    dtype: str = "float32"
    prompts: int = 2
    generations: int = 8
    prompt_length: int = 256
    completion_length: int = 256
    micro_batch: int = 8  # of TRL; ours packs all groups that 8192 tokens hold


SIZES = {
    "small": Size(500, 64, 128, 2, 4, 2, generations=4, prompt_length=16, completion_length=12, micro_batch=4),
    "cpu": Size(32000, 512, 1408, 6, 8, 4),  # 34M parameters
    "gpu": Size(128256, 2048, 8192, 16, 32, 8, dtype="bfloat16", prompts=8),  # Llama 3.2 1B
    # The same problem, in a fraction of the time: a step of TRL's is mostly generation.
    "gpu_short": Size(128256, 2048, 8192, 16, 32, 8, dtype="bfloat16", prompts=8, completion_length=64),
}


def word(index: int) -> str:
    return f"w{index}"


def make_tokenizer(vocab: int) -> Any:
    """One word, one token: three special tokens, then w3, w4 ... of their own ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {name: i for i, name in enumerate((*SPECIAL, *map(word, range(len(SPECIAL), vocab))))}
    words = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)


def make_model(size: Size, device: Any = "cpu") -> Any:
    """A Llama of random weights with tied embeddings that never samples the end token.

    A channel that no layer writes to is 1 for every token, so that it is positive behind the last norm; the end
    token's row of the head is far below zero there. Its probability is 0 whatever the prompt and the temperature.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.prompt_length + size.completion_length, tie_word_embeddings=True,
        pad_token_id=SPECIAL.index(PAD), eos_token_id=SPECIAL.index(EOS), bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(getattr(torch, size.dtype))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        model.model.embed_tokens.weight[:, 0] = 1
        model.model.embed_tokens.weight[SPECIAL.index(EOS), 0] = -1000
    return model


def make_prompts(size: Size, count: int) -> list[str]:
    """Texts of exactly `prompt_length` tokens."""
    rng = random.Random(0)
    return [
        " ".join(word(rng.randrange(len(SPECIAL), size.vocab)) for _ in range(size.prompt_length)) for _ in range(count)
    ]


def write_problem(size: Size, count: int, folder: Path, device: Any = "cpu") -> int:
    """The model, its tokenizer and `count` prompts (model/, prompts.jsonl); returns the number of parameters."""
    model = make_model(size, device)
    model.save_pretrained(folder / "model")
    make_tokenizer(size.vocab).save_pretrained(folder / "model")
    lines = [json.dumps({"prompt": prompt}) for prompt in make_prompts(size, count)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return sum(p.numel() for p in model.parameters())


def even_share(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Share of a completion's words that end in an even digit: about half, and different for each."""
    rewards = []
    for completion in completions:
        words = completion.split()
        rewards.append(sum(w[-1] in "02468" for w in words) / max(1, len(words)))
    return rewards


# ---- steps ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    beta: float
    trl: dict[str, Any]  # options of GRPOConfig
    plain_linear: bool = False  # ours with PyTorch's own linear layers, whatever the CPU


class Wrong(AssertionError):
    """A step that must not be timed."""


@dataclass
class Step:
    """What one step took, and what it did."""

    seconds: float
    stages: dict[str, float]
    seen: dict[str, float] = field(default_factory=dict)


def verify(who: str, seen: dict[str, float], size: Size) -> None:
    """Raises Wrong unless the step did the whole work."""
    for name in ("shortest", "longest"):
        if seen[name] != size.completion_length:
            raise Wrong(f"{who}: {name} completion must have {size.completion_length} tokens; got {seen[name]}")
    for name in ("loss", "grad_norm"):
        if not math.isfinite(seen[name]):
            raise Wrong(f"{who}: {name} must be finite; got {seen[name]}")
    if not seen["grad_norm"] > 0 or seen["equal_groups"] == 1:
        raise Wrong(f"{who}: a step without a gradient; got {seen}")


@contextmanager
def must_move(who: str, model: Any) -> Iterator[None]:
    """Every matrix of the model has other values at the end; vectors of ones round small updates away in bfloat16."""

    import torch

    def sums() -> dict[str, float]:
        return {n: p.sum(dtype=torch.float64).item() for n, p in model.named_parameters() if p.ndim > 1}

    before = sums()
    yield
    still = [name for name, value in sums().items() if value == before[name]]
    if still:
        raise Wrong(f"{who}: {len(still)} of {len(before)} weight matrices did not move, {still[0]} is one")
