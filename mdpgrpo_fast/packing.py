"""Groups with their prompt once: laid out in one row, binned by tokens, run through a model, checked to be exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from . import shared_prompt
from .heads import causal_lm
from .shared_prompt import Layout

Mode = Literal["blocks", "masks", "flex"]


class Unpackable(ValueError):
    """Why a model cannot run over packed groups."""


@dataclass(frozen=True)
class Packed:
    """Groups in one row of T tokens, of n completions with R tokens in all."""

    ids: Tensor  # (1, T) int64
    positions: Tensor  # (1, T) int64, which go on after the prompt in every completion
    layout: Layout
    predictors: Tensor  # (R,) which of the T states predicts each completion token
    tokens: Tensor  # (R,) completion tokens
    completion: Tensor  # (R,) 0 .. n-1
    source: Tensor  # (R,) where each token is in the (N, L) tokens it came from, flattened
    rows: list[int]  # the n completions, as rows of those
    lengths: list[int]  # of the n completions


def pack(
    prompt_ids: Tensor, prompt_lengths: list[int], tokens: Tensor, lengths: list[int], groups: list[list[int]]
) -> Packed:
    """One packed row of groups, each a list of rows with the same prompt.

    prompt_ids (N, S) left-padded, tokens (N, L) right-padded, int64; prompt_lengths and lengths of their N rows. Groups
    without rows are left out, and so are completions without tokens.
    """
    groups = [kept for group in groups if (kept := [i for i in group if lengths[i] > 0])]
    prompt_width, width = prompt_ids.shape[1], tokens.shape[1]
    index: list[Tensor] = []
    positions: list[Tensor] = []
    predictors: list[Tensor] = []
    completion: list[Tensor] = []
    source: list[Tensor] = []
    rows: list[int] = []
    prompts: list[tuple[int, int]] = []
    completions: list[list[tuple[int, int]]] = []
    at = 0
    for group in groups:
        first, size = group[0] * (prompt_width + width) + prompt_width, prompt_lengths[group[0]]
        index.append(torch.arange(first - size, first))
        positions.append(torch.arange(size))
        prompts.append((at, at := at + size))
        last_of_prompt, spans = at - 1, []
        for i in group:
            start, n = i * (prompt_width + width) + prompt_width, lengths[i]
            index.append(torch.arange(start, start + n))
            positions.append(torch.arange(size, size + n))
            predictors += [torch.tensor([last_of_prompt]), torch.arange(at, at + n - 1)]
            completion.append(torch.full((n,), len(rows)))
            source.append(torch.arange(i * width, i * width + n))
            spans.append((at, at := at + n))
            rows.append(i)
        completions.append(spans)
    if not rows:
        raise ValueError("groups must hold a completion with at least one token")
    device = tokens.device
    # One copy to the device for all of them.
    sizes = [sum(map(len, x)) for x in (index, positions, predictors, completion, source)]
    host = torch.cat([*index, *positions, *predictors, *completion, *source])
    where, position, predictor, owner, origin = host.to(device, non_blocking=True).split(sizes)
    ids = torch.cat([prompt_ids, tokens], 1).flatten()[where]
    return Packed(
        ids[None], position[None], Layout(prompts, completions), predictor, tokens.flatten()[origin], owner, origin,
        rows, [lengths[i] for i in rows],
    )  # fmt: skip


def bins(costs: list[int], budget: int) -> list[list[int]]:
    """Indices of `costs` in as few bins as the rule "largest first, to the emptiest" needs, none over the budget.

    Raises: ValueError where one cost alone is over the budget.
    """
    if costs and max(costs) > budget:
        raise ValueError(f"tokens_per_micro_batch must hold the largest group, {max(costs)} tokens; got {budget}")
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    count = max(1, -(-sum(costs) // budget))
    while True:
        found: list[list[int]] = [[] for _ in range(count)]
        full = [0] * count
        for i in order:
            emptiest = full.index(min(full))
            found[emptiest].append(i)
            full[emptiest] += costs[i]
        if max(full) <= budget:
            return [sorted(b) for b in found]
        count += 1


def masks(layout: Layout, positions: Tensor, window: int | None = None) -> Tensor:
    """(T, T) bool of a packed row, true where a query (first) attends to a key; window: of sliding attention."""
    device = positions.device
    group = torch.empty(positions.numel(), dtype=torch.int64)
    member = torch.zeros_like(group)
    for g, ((a, b), spans) in enumerate(zip(layout.prompts, layout.completions, strict=True)):
        group[a : spans[-1][1] if spans else b] = g
        for j, (c, d) in enumerate(spans, 1):
            member[c:d] = j
    group, member, at = group.to(device), member.to(device), positions.flatten()
    allowed = (group[:, None] == group) & ((member == 0) | (member[:, None] == member))
    gap = at[:, None] - at
    allowed &= gap >= 0
    return allowed if window is None else allowed & (gap < window)


class Packing:
    """How a model runs over packed groups.

    blocks: attention by `shared_prompt`, without masks or padding; masks: a (T, T) mask given to the model's own
    attention, for soft-caps and sliding windows; flex: the same as a block mask, where the model's attention is flex.

    Raises: Unpackable where a small trial does not give the padded pass's hidden states, or the reason is known before.
    """

    def __init__(self, model: Any) -> None:
        lm = causal_lm(model)
        self.config, self.body = lm.config.get_text_config(), getattr(lm, lm.base_model_prefix)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if kinds - {"full_attention", "sliding_attention"}:
            raise Unpackable(f"it has layers of other kinds than attention ({', '.join(sorted(kinds))})")
        self.kinds = kinds
        self.window = getattr(self.config, "sliding_window", None) if self._slides(kinds) else None
        # Attention other than sdpa has its own ways: eager may have a soft-cap.
        self.own_attention = self.config._attn_implementation
        self.mode: Mode = "flex" if self.own_attention == "flex_attention" else "masks"
        if self.own_attention in ("sdpa", "flash_attention_2"):
            shared_prompt.install(lm)
            self.mode = "blocks"
        self._try()

    def _slides(self, kinds: set[str]) -> bool:
        if kinds:
            return "sliding_attention" in kinds
        return getattr(self.config, "use_sliding_window", True)

    def _mode(self, packed: Packed) -> Mode:
        slides = self.window is not None and packed.layout.longest > self.window
        plain = packed.ids.is_cuda and not torch.is_autocast_enabled("cuda") and self._dtype() == torch.float32
        if self.mode != "blocks" or not (slides or plain):
            return self.mode
        if self.own_attention == "flash_attention_2":
            why = "its sliding window is shorter than a prompt with its completion" if slides else "it is in float32"
            raise Unpackable(f"flash_attention_2 takes no mask, and {why}; choose attention = sdpa")
        return "masks"

    def _dtype(self) -> torch.dtype:
        return next(p for p in self.body.parameters() if p.is_floating_point()).dtype

    def arguments(self, packed: Packed) -> dict[str, Any]:
        """What the forward pass of the model or its body is called with."""
        mode = self._mode(packed)
        given = {"input_ids": packed.ids, "position_ids": packed.positions, "use_cache": False}
        if mode == "blocks":
            # A mask of four dimensions is taken for a finished one; our attention does not look at it.
            given["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packed.ids.device)
            return {**given, "shared_prompt": packed.layout}
        make = self._block_mask if mode == "flex" else self._mask
        if self.kinds:
            windows = {"full_attention": None, "sliding_attention": self.window}
            return {**given, "attention_mask": {kind: make(packed, windows[kind]) for kind in self.kinds}}
        return {**given, "attention_mask": make(packed, self.window)}

    def _mask(self, packed: Packed, window: int | None) -> Tensor:
        allowed = masks(packed.layout, packed.positions, window)[None, None]
        if self.own_attention == "sdpa":
            return allowed
        dtype = self._dtype()
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
            ~allowed, torch.finfo(dtype).min
        )

    def _block_mask(self, packed: Packed, window: int | None) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        allowed = masks(packed.layout, packed.positions, window)
        size = len(allowed)
        return create_block_mask(lambda b, h, q, k: allowed[q, k], None, None, size, size, device=allowed.device)

    @torch.no_grad()
    def _try(self) -> None:
        """Two small groups, packed and padded: whatever a model does besides attention shows."""
        device = next(self.body.parameters()).device
        vocab, lengths, prompt_lengths = self.config.vocab_size, [3, 1, 4, 2], [3, 3, 2, 2]
        prompt_ids = (torch.tensor([[5, 6, 7]] * 2 + [[0, 8, 9]] * 2) % vocab).to(device)
        tokens = (torch.arange(16).view(4, 4) * 3 % vocab).to(device)
        packed = pack(prompt_ids, prompt_lengths, tokens, lengths, [[0, 1], [2, 3]])
        try:
            ours = self.body(**self.arguments(packed)).last_hidden_state[0, packed.predictors].float()
        except Exception as e:
            raise Unpackable(f"its forward pass does not take packed groups: {type(e).__name__}: {e}") from None
        at = 0
        for i, n in enumerate(lengths):
            row = torch.cat([prompt_ids[i, 3 - prompt_lengths[i] :], tokens[i, :n]])[None]
            alone = self.body(input_ids=row, use_cache=False).last_hidden_state[0, -n - 1 : -1].float()
            gap = (ours[at : at + n] - alone).abs().amax()
            # Rounding differs from one order of sums to another, and grows over the layers.
            allowed = alone.abs().amax() * torch.finfo(self._dtype()).eps * 200
            if not bool(gap <= allowed):
                raise Unpackable(
                    f"its hidden states differ when groups are packed, by {gap:.1e} of {alone.abs().amax():.1e}"
                )
            at += n
