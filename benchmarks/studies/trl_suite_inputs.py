"""Stand-ins for the models and data sets of TRL's own tests, which its hub alone has: `build(folder)`.

Under `folder` lies `trl-internal-testing/NAME` for every name that the tests ask for: with that as the working folder,
they are found before any hub is asked. Models have the architectures and sizes of TRL's tiny ones, with random weights
and fewer tokens. Their tokenizer knows single bytes and what the tests write by its number; the others are fillers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

OWNER = "trl-internal-testing"

# ---- tokens ---------------------------------------------------------------------------------------------------------

# Enough that a random model does not end an answer by chance: one test counts on that.
SIZE = 4096
PAD, EOS = "<|endoftext|>", "<|im_end|>"
IMAGE = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image>"}
SPECIAL = [PAD, EOS, "<|im_start|>", "<|finetune_right_pad_id|>", *IMAGE.values()]
ADDED = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
# What the tests write by its number in Qwen's vocabularies. Numbers below 256 are single bytes there and here.
QWEN = {
    293: " b", 314: " {", 330: ' "', 397: ">\n", 411: "out", 450: "dec", 497: '",', 510: "</", 522: "</", 606: "name",
    788: '":', 866: " any", 894: " any", 914: "'t", 927: "sh", 944: "'t", 1318: "text", 1366: " know", 1414: " know",
    1459: " don", 1513: " don", 1628: "function", 2765: " won", 4913: '{"', 5212: ' {"', 5224: " tool", 5392: " tool",
    6023: "hi", 6659: "call", 7692: "async", 9520: "step", 11248: "}}\n", 13477: "rement", 13744: "=s",
    14172: "tool", 16252: " increment", 16370: "arguments", 16936: "Done", 17453: "Done", 22076: "_tool",
    22785: "_tool", 30091: "creenshot", 35744: "increment", 64648: "multiply", 93054: "_multiply", 95642: '"}}\n',
    151643: PAD, 151645: EOS, 151657: ADDED[0], 151658: ADDED[1],
    248044: PAD, 248046: EOS, 248058: ADDED[0], 248059: ADDED[1],
}  # fmt: skip
TOKENS = [*SPECIAL, *ADDED, *sorted(set(QWEN.values()) - {*SPECIAL, *ADDED})]


def renumbered(tests: str) -> str:
    """The tests with their rows of token numbers in the stand-ins' vocabulary."""

    def row(line: re.Match[str]) -> str:
        return re.sub(r"\d+", lambda n: str(256 + TOKENS.index(QWEN[int(n[0])]) if int(n[0]) > 255 else n[0]), line[0])

    return re.sub(r"^ +\[\d+(?:, \d+)*\]", row, tests, flags=re.MULTILINE)


def template(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def make_tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    """Single bytes, then `TOKENS`, then fillers; with one of the chat templates that TRL brings."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = dict(zip(printable + [b for b in range(256) if b not in printable], alphabet, strict=True))
    words = alphabet + ["".join(spelled[b] for b in text.encode()) for text in TOKENS]
    # Fillers differ in length, so that rewards that count characters differ too.
    words += [f"{i:x}" + "z" * (i % 7) for i in range(len(words), SIZE)]
    bpe = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(SPECIAL)
    bpe.add_tokens([AddedToken(word, special=False, normalized=False) for word in ADDED])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        chat_template=template(chat_template),
        extra_special_tokens=IMAGE,
    )


# ---- models ---------------------------------------------------------------------------------------------------------

COMMON: dict[str, Any] = {
    "vocab_size": SIZE,
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2ForCausalLM", "qwen2_5", {}),
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2ForSequenceClassification", "qwen2_5", {}),
    "tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", "qwen3", {}),
    "tiny-Qwen3ForSequenceClassification": ("Qwen3ForSequenceClassification", "qwen3", {}),
    "tiny-Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", "qwen3", {"num_experts": 4, **MIXTURE}),
    "tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", "llama3_2", {}),
    "tiny-Gemma2ForCausalLM": ("Gemma2ForCausalLM", "gemma", {}),
    "tiny-Cohere2ForCausalLM": ("Cohere2ForCausalLM", "cohere2", {"logit_scale": 0.125}),
    "tiny-Glm4MoeForCausalLM": (
        "Glm4MoeForCausalLM",
        "glm4moe",
        {"n_routed_experts": 4, "first_k_dense_replace": 1, **MIXTURE},
    ),
    "tiny-GptOssForCausalLM": ("GptOssForCausalLM", "gptoss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "tiny-NemotronHForCausalLM-nano": (
        "NemotronHForCausalLM",
        "nemotron_3_nano",
        {"layers_block_type": ["mamba", "moe", "attention"], "num_hidden_layers": 3, "n_routed_experts": 4}
        | {"mamba_num_heads": 4, "mamba_head_dim": 4, "ssm_state_size": 4, "n_groups": 1}
        | MIXTURE,
    ),
}
# A model whose code comes with it.
REMOTE = """
from transformers import Qwen2Config, Qwen2ForCausalLM


class RemoteConfig(Qwen2Config):
    model_type = "remote"


class RemoteForCausalLM(Qwen2ForCausalLM):
    config_class = RemoteConfig
"""


def save(folder: Path, model: Any, processor: Any) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_model(folder: Path, architecture: str, chat_template: str, sizes: dict[str, Any]) -> None:
    tokenizer = make_tokenizer(chat_template)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    # Some take heads of 128 where nothing is given.
    heads = {} if "Qwen2" in architecture else {"head_dim": 2}
    labels = {"num_labels": 1} if "Classification" in architecture else {}
    cls = getattr(transformers, architecture)
    save(folder, cls(cls.config_class(**COMMON | ends | heads | labels | sizes)), tokenizer)


def save_remote(folder: Path) -> None:
    save_model(folder, *MODELS["tiny-Qwen2ForCausalLM-2.5"])
    (folder / "remote.py").write_text(REMOTE, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    auto_map = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"}
    config |= {"model_type": "remote", "architectures": ["RemoteForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def vision_language(tokenizer: PreTrainedTokenizerFast) -> dict[str, tuple[Any, Any]]:
    """By name, the configuration and the processor of those whose processor does without torchvision."""
    text = COMMON | {"head_dim": 2, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 14}  # four patches
    side = {"height": 28, "width": 28}
    gemma = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision | {"vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    llava = transformers.LlavaNextConfig(
        text_config=text | {"model_type": "mistral"},
        vision_config=vision | {"model_type": "clip_vision_model", "projection_dim": 8},
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        image_token_index=tokenizer.image_token_id,
    )
    pixels = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size=side, image_grid_pinpoints=llava.image_grid_pinpoints
    )
    seen = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return {
        "tiny-Gemma3ForConditionalGeneration": (
            gemma,
            transformers.Gemma3Processor(
                transformers.Gemma3ImageProcessorPil(size=side), tokenizer, template("gemma3"), image_seq_length=4
            ),
        ),
        "tiny-LlavaNextForConditionalGeneration": (
            llava,
            transformers.LlavaNextProcessor(
                pixels, tokenizer, patch_size=14, chat_template=template("llava_next"), **seen
            ),
        ),
    }


# ---- data sets ------------------------------------------------------------------------------------------------------

# The Zen of Python, cut where the tests expect it.
TRAIN = [
    "Beautiful is better than", "Explicit is", "Simple is better", "Complex", "Flat is better than",
    "Sparse is better", "Readability", "Special cases aren't special", "Although practicality beats",
    "Errors should never", "Unless explicitly", "In the face of ambiguity, refuse",
    "There should be one-- and preferably only one", "Although that way may not be obvious at first unless",
    "Now is better", "Although never is often", "If the implementation is hard to explain,",
]  # fmt: skip
TEST = ["If the implementation is easy", "Namespaces are one honking great"]


def save_splits(folder: Path, configs: dict[str, dict[str, Dataset]]) -> None:
    """Parquet files by configuration and split, and the page that says which file is which."""
    listed = []
    for name, splits in configs.items():
        for split, dataset in splits.items():
            dataset.to_parquet(folder / name / f"{split}.parquet")
        files = [{"split": split, "path": f"{name}/{split}.parquet"} for split in splits]
        listed.append({"config_name": name, "data_files": files})
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': listed})}\n---\n", encoding="utf-8")


def asked(prompts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def build(folder: Path) -> None:
    """All stand-ins, under `folder`."""
    home = folder / OWNER
    for name, parts in MODELS.items():
        save_model(home / name, *parts)
    save_remote(home / "tiny-RemoteForCausalLM")
    for name, (config, processor) in vision_language(make_tokenizer("gemma3")).items():
        torch.manual_seed(0)
        save(home / name, transformers.AutoModelForImageTextToText.from_config(config), processor)
    texts = {"train": TRAIN, "test": TEST}
    plain = {split: Dataset.from_dict({"prompt": prompts}) for split, prompts in texts.items()}
    chat = {split: Dataset.from_dict({"prompt": asked(prompts)}) for split, prompts in texts.items()}
    save_splits(home / "zen", {"standard_prompt_only": plain, "conversational_prompt_only": chat})
    pictures = [Image.new("RGB", (28 + 4 * i, 28), (40 * i, 0, 99)) for i in range(6)]
    seen = Dataset.from_dict({"prompt": asked(TRAIN[:6]), "image": pictures})
    save_splits(home / "zen-image", {"conversational_prompt_only": {"train": seen}})
