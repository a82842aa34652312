"""A reward model: a sequence classifier of transformers, in the trainer's process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import ConfigError
from ..log import reason_of

BATCH = 32  # completions of a forward pass
HEADS = {"score", "classifier"}  # by the first part of their names


class RewardModel:
    """A classifier with one output, its reward of prompt and completion, as TRL calls it."""

    def __init__(self, source: str, trust_remote_code: bool = False) -> None:
        """source: directory or hub id. Raises ConfigError in one line where it is no such model."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.__name__ = source.rstrip("/").split("/")[-1]
        try:
            options = {"trust_remote_code": trust_remote_code}
            model, info = AutoModelForSequenceClassification.from_pretrained(
                source, num_labels=1, output_loading_info=True, **options
            )
            self.tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except Exception as e:  # whatever the files of a model raise
            of_code = "it brings Python code along, which trust_remote_code (--trust-remote-code) lets run"
            why = of_code if "trust_remote_code" in str(e) else reason_of(e)
            raise ConfigError(f"reward model {source!r} cannot be loaded: {why}") from None
        missing = sorted(set(info["missing_keys"]) & {n for n, _ in model.named_parameters(remove_duplicate=False)})
        if missing:
            head = "has no trained head" if {k.partition(".")[0] for k in missing} <= HEADS else "is not whole"
            raise ConfigError(f"reward model {source!r} {head}: {', '.join(missing[:3])} is not in its files")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # The reward is read at the last token that is no padding.
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.model = model.eval()

    def to(self, device: Any) -> None:
        self.model.to(device)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        import torch

        texts = [
            p + c if isinstance(p, str) else self.tokenizer.apply_chat_template(p + c, tokenize=False)
            for p, c in zip(prompts, completions, strict=True)
        ]
        rewards: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(texts), BATCH):
                batch = self.tokenizer(
                    text=texts[start : start + BATCH], return_tensors="pt", padding=True, padding_side="right",
                    add_special_tokens=False,
                )  # fmt: skip
                rewards += self.model(**batch.to(self.model.device)).logits[:, 0].float().tolist()
        return rewards
