"""Makes the seed policy of the demo: a small Llama taught, without RL, to obey each constraint about half the time.

`python examples/demo/seed_policy.py --output DIR` trains a tokenizer and the model on generated pairs of prompt and
response, in a few minutes on two CPU cores, with no network, and the same bytes under one seed.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import words
from prompts import DEMO, Prompt, describe, sample_prompt, shipped
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from writer import write

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '" + ASSISTANT + "' + message['content'] + '" + END + "' -}}"
    "{%- else -%}{{- '" + USER + "' + message['content'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '" + ASSISTANT + "' -}}{%- endif -%}"
)


OBEY, OBEY_LAST = 0.68, 0.3
DRILLED = ("keywords:existence", "keywords:frequency")


@dataclass(frozen=True)
class Recipe:
    """Every knob of the seed policy."""

    seed: int = 0
    steps: int = 1600
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    vocab_size: int = 1024
    vocab_pairs: int = 12000  # pairs that the tokenizer is trained on
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    mlp_size: int = 320
    drill: float = 0.3
    settled: float = 0.5
    obey: float | None = None  # one probability for all constraints, in place of `obey_probability`
    threads: int = 2


def obey_probability(prompt: Prompt, index: int) -> float:
    """How likely the teacher obeys the prompt's constraint at `index`: less where it has its type's last wording.

    A policy that fits the teacher then obeys most constraints at temperature 0, fails some, and samples both.
    """
    least_minded = words.WORDINGS[prompt.instruction_id_list[index]][-1]
    return OBEY_LAST if describe(least_minded, prompt.kwargs[index]) in prompt.prompt else OBEY


def sample_pair(recipe: Recipe, rng: random.Random, exclude: set[str], progress: float = 1.0) -> tuple[Prompt, str]:
    """A new prompt and a response that obeys some of its constraints.

    `progress` through training, 0 to 1, sets the lesson. The first `recipe.drill` of it is a drill of short prompts,
    half of them about keywords, all obeyed: without it, copying a word from the prompt may never be learned. From
    there to `recipe.settled` disobedience grows to `obey_probability`.
    """
    drill = progress < recipe.drill
    doubt = min(1.0, max(0.0, (progress - recipe.drill) / (recipe.settled - recipe.drill)))
    while True:
        if drill:
            include = rng.choice(DRILLED) if rng.random() < 0.5 else None
            prompt = sample_prompt(rng, rng.choice((1, 2)), include)
        else:
            prompt = sample_prompt(rng)
        if prompt.prompt in exclude:
            continue
        odds = [obey_probability(prompt, i) for i in range(len(prompt.kwargs))]
        flags = [rng.random() < (1 - doubt * (1 - p) if recipe.obey is None else recipe.obey) for p in odds]
        response = write(prompt.topic, prompt.instruction_id_list, prompt.kwargs, flags, rng)
        if response is not None:
            return prompt, response


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which the words that a response copies are single tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, prompt: Prompt, response: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt in the chat template, and of the response with its end token."""
    asked = f"{USER}{prompt.prompt}{ASSISTANT}"
    return (
        tokenizer.encode(asked, add_special_tokens=False),
        tokenizer.encode(f"{response}{END}", add_special_tokens=False),
    )


def batches(pairs: list[tuple[list[int], list[int]]], recipe: Recipe) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded ids and labels, both (B, L); labels are -100 outside the response. Lengths are bucketed."""
    size = recipe.batch_size
    chunk = size * 16
    rng = random.Random(f"batches {recipe.seed}")
    for start in range(0, len(pairs), chunk):
        part = sorted(pairs[start : start + chunk], key=lambda pair: len(pair[0]) + len(pair[1]))
        groups = [part[i : i + size] for i in range(0, len(part), size)]
        rng.shuffle(groups)
        for group in groups:
            width = max(len(asked) + len(answer) for asked, answer in group)
            ids = torch.zeros(len(group), width, dtype=torch.long)
            labels = torch.full((len(group), width), -100)
            for row, (asked, answer) in enumerate(group):
                ids[row, : len(asked) + len(answer)] = torch.tensor(asked + answer)
                labels[row, len(asked) : len(asked) + len(answer)] = torch.tensor(answer)
            yield ids, labels


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of under a million parameters with tied embeddings."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.mlp_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, max_new_tokens=64
    )
    return model


def train(model: LlamaForCausalLM, pairs: list[tuple[list[int], list[int]]], recipe: Recipe) -> float:
    """Supervised steps on the response tokens; returns the mean loss of the last tenth."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
    )
    model.train()
    losses = []
    started = time.perf_counter()
    for step, (ids, labels) in enumerate(batches(pairs, recipe)):
        warm = min(1.0, (step + 1) / recipe.warmup_steps)
        rate = recipe.learning_rate * warm * (0.55 + 0.45 * math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Padding stands on the right, where causal attention never looks from a real token: no mask is needed.
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # (B, L-1, D)
        target = labels[:, 1:]
        answered = target != -100
        loss = F.cross_entropy(model.lm_head(hidden[answered]), target[answered])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            spent = time.perf_counter() - started
            print(f"step {step + 1}: loss {sum(losses[-100:]) / 100:.4f}, {spent:.0f} s", flush=True)
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def make(output: Path, recipe: Recipe) -> float:
    """Trains the seed policy and writes it in `from_pretrained` form; returns the final training loss."""
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    rng = random.Random(f"pairs {recipe.seed}")
    exclude = {prompt.prompt for prompt in shipped(recipe.seed)["heldout.jsonl"]}
    needed = recipe.steps * recipe.batch_size
    pairs = [sample_pair(recipe, rng, exclude, i / needed) for i in range(max(needed, recipe.vocab_pairs))]
    texts = [text for prompt, response in pairs[-recipe.vocab_pairs :] for text in (prompt.prompt, response)]
    tokenizer = train_tokenizer(texts, recipe.vocab_size)
    check_tokenizer(tokenizer)
    model = build_model(recipe, tokenizer)
    loss = train(model, [encode(tokenizer, prompt, response) for prompt, response in pairs[:needed]], recipe)
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return loss


def check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises ValueError where a word that responses copy is more than one token."""
    copied = (*words.TOPICS, *words.KEYWORDS, *words.ADJECTIVES)
    split = [word for word in copied if len(tokenizer.encode(f" {word}", add_special_tokens=False)) != 1]
    if split:
        raise ValueError(f"vocab_size={len(tokenizer)} splits words that should be one token: {split}")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=DEMO / "seed_policy", help="folder to write to")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--obey", type=float, default=None, help="diagnostic: one obedience probability for all")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    recipe = Recipe(seed=args.seed, steps=args.steps, obey=args.obey)
    loss = make(args.output, recipe)
    print(f"{args.output}: loss {loss:.4f}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
