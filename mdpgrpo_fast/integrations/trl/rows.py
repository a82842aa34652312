"""The completions of a forward pass as rows of the ops: padded as TRL has them, or packed by shared prompts."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models.packing import PackedRow, Packing, pack
from ...models.shared_prompt import upload

COUNTED, WHICH_PROMPT = 2, 3  # columns of `host_facts`


@dataclass(frozen=True)
class PaddedRows:
    """(B, L) rows as they are. mask: those that count; lengths: how many of each completion, on the host, or None."""

    tokens: Tensor
    mask: Tensor
    lengths: Tensor | None = None

    def states(self, hidden: Tensor) -> Tensor:
        """Those that predict the completion's tokens, of the states of all."""
        return hidden[:, -(self.tokens.shape[1] + 1) : -1]

    def arguments(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "mask": self.mask, "lengths": self.lengths}

    def of(self, x: Any) -> Any:
        """What is given for each row (B, L), or each completion (B,), in this form; anything else as it is."""
        return x

    def padded(self, x: Tensor) -> Tensor:
        """What was found for each row, as (B, L)."""
        return x


@dataclass(frozen=True)
class PackedRows:
    """The rows of a packed row, of a (B, L) batch whose other rows have no token."""

    packed: PackedRow
    mask: Tensor
    lengths: list[int] | None

    def states(self, hidden: Tensor) -> Tensor:
        return hidden[0, self.packed.predictors]

    def arguments(self) -> dict[str, Any]:
        p, mask = self.packed, self.mask.flatten()[self.packed.source]
        completions = {"completion": p.completion, "num_completions": len(p.rows)}
        return {"tokens": p.tokens, "mask": mask, "lengths": self.lengths, **completions}

    def of(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim == 0:
            return x
        return x[self._completions] if x.ndim == 1 else x.flatten()[self.packed.source]

    @functools.cached_property
    def _completions(self) -> Tensor:
        return upload(torch.tensor(self.packed.rows), self.packed.tokens.device)

    def padded(self, x: Tensor) -> Tensor:
        flat = x.new_zeros(self.mask.numel()).index_copy(0, self.packed.source, x)
        return flat.view(self.mask.shape)


def host_facts(prompt_ids: Tensor, prompt_mask: Tensor, attended: Tensor, mask: Tensor) -> Tensor:
    """(B, 4) on the host: tokens of the prompt, of the completion and those that count, and which prompt it is.

    prompt_ids, prompt_mask (B, S) left-padded, attended and mask (B, L). Waits for the device: once a generation.
    """
    facts = torch.stack([prompt_mask.sum(1), attended.sum(1), (mask != 0).sum(1)], 1).long().cpu()
    first: dict[tuple[int, ...], int] = {}
    prompts = zip(prompt_ids.tolist(), facts[:, 0].tolist(), strict=True)
    which = [first.setdefault(tuple(ids[len(ids) - n :]), i) for i, (ids, n) in enumerate(prompts)]
    return torch.cat([facts, torch.tensor(which)[:, None]], 1)


Form = PaddedRows | PackedRows


class Packer:
    """Packs completions that have their prompt in common, wherever they lie in a batch."""

    def __init__(self, packing: Packing) -> None:
        self.packing = packing

    def rows(self, prompt_ids: Tensor, tokens: Tensor, mask: Tensor, facts: Tensor) -> PackedRows | None:
        """None where no completion has a token, or where the model's sliding window forbids it.

        prompt_ids (B, S) left-padded, tokens (B, L) right-padded; mask (B, L): rows that count; facts: of `host_facts`.
        """
        prompt_lengths, lengths, counted, which = facts.T.tolist()
        if not any(lengths):
            return None
        groups: dict[int, list[int]] = {}
        for i, prompt in enumerate(which):
            groups.setdefault(prompt, []).append(i)
        packed = pack(prompt_ids, prompt_lengths, tokens, lengths, list(groups.values()))
        if self.packing.mode_for(packed.layout.longest) is None:
            return None
        return PackedRows(packed, mask, [counted[i] for i in packed.rows])
