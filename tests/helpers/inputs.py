"""Random loss inputs, small random models with a tokenizer, and where things lie."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SHARED_DATA = ROOT.parent / "shared" / "data"


def unavailable(reason: str) -> None:
    """Skips on a developer's machine, fails in CI, where everything has to be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason, allow_module_level=True)


def needed(name: str) -> Any:
    """A package that the tests install, and a user need not have."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        return unavailable(f"{name} cannot be imported: {e}")


# ---- loss inputs ----------------------------------------------------------------------------------------------------


@dataclass
class LossInputs:
    """Arguments of `token_loss`: those that every call has by field, the optional ones in `kwargs`."""

    logits: Any
    tokens: Any
    mask: Any
    advantage: Any
    kl_beta: Any
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Any:
        return iter((self.logits, self.tokens, self.mask, self.advantage, self.kl_beta))

    def given(self) -> dict[str, Any]:
        """The advantages and all optional arguments, by name."""
        return {"advantage": self.advantage, "kl_beta": self.kl_beta, **self.kwargs}

    def rows(self, index: Any) -> LossInputs:
        """The same for some of the completions."""
        b = len(self.tokens)
        kwargs = {k: v[index] if getattr(v, "shape", ())[:1] == (b,) else v for k, v in self.kwargs.items()}
        return LossInputs(*(x[index] for x in self), kwargs=kwargs)


def make_inputs(
    seed: int = 0, lengths: tuple[int, ...] = (5, 3, 1, 4), vocab: int = 11, dtype: str = "float64", scale: float = 3.0
) -> LossInputs:
    """Ragged completions, off-policy by a few tenths of a nat, every third softmax peaked at its token.

    Advantages alternate in sign, so that both clip bounds and both KL coefficients are met.
    """
    g = torch.Generator().manual_seed(seed)
    b, width, real = len(lengths), max(lengths), getattr(torch, dtype)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tokens = torch.randint(0, vocab, (b, width), generator=g)
    logits = scale * normal(b, width, vocab)
    peaked = torch.arange(b * width).view(b, width) % 3 == 0
    logits.scatter_add_(2, tokens[..., None], 4 * scale * peaked[..., None].double())
    logits = logits.to(real)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    logprobs = logits.double().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    small = torch.float64 if real == torch.float64 else torch.float32
    advantage = (0.2 + normal(b).abs()) * (1 - 2 * (torch.arange(b) % 2))
    return LossInputs(
        logits,
        tokens,
        mask,
        advantage.to(small),
        torch.where(advantage < 0, 0.25, 0.1).to(small),
        {
            "old_logprobs": (logprobs + 0.3 * normal(b, width)).to(small),
            "ref_logprobs": (logprobs + 0.5 * normal(b, width)).to(small),
        },
    )


# ---- small models ---------------------------------------------------------------------------------------------------

SOFTCAP = 5.0


def make_tokenizer() -> Any:
    """A byte-level BPE of a few hundred tokens, so that any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<pad>", "<eos>", "<end>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(["write three short sentences about the sea and the wind"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


def make_model(family: str, vocab: int) -> Any:
    """A random model of two layers. Weights are wide enough that its distributions are far from uniform.

    gpt2 has absolute positions, where a wrong position id shows; gemma2 caps its final logits.
    """
    import transformers as tf

    sizes: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.5,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    torch.manual_seed(7)
    if family == "llama":
        return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).eval()
    if family == "qwen2":
        return tf.Qwen2ForCausalLM(tf.Qwen2Config(**sizes)).eval()
    if family == "gemma2":
        sizes |= {"head_dim": 8, "initializer_range": 1.0, "final_logit_softcapping": SOFTCAP, "sliding_window": 8}
        return tf.Gemma2ForCausalLM(tf.Gemma2Config(**sizes)).eval()
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.5}
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=vocab, bos_token_id=1, eos_token_id=1, **small)).eval()
