"""Packing of groups that hold their prompt once: one row, bins by tokens, forward passes checked to be exact."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from . import shared_prompt
from .heads import body_of, causal_lm, evaluating
from .shared_prompt import PackedLayout, upload

Mode = Literal["blocks", "masks", "flex"]
FLASH_ATTN = "flash_attention_2"


class Unpackable(ValueError):
    """Why a model cannot run over packed groups."""


@dataclass(frozen=True)
class PackedRow:
    """Groups in one row of T tokens, of b completions with R tokens in all."""

    ids: Tensor  # (1, T) int64
    positions: Tensor  # (1, T) int64, which go on after the prompt in every completion
    layout: PackedLayout
    predictors: Tensor  # (R,) which of the T states predicts each completion token
    tokens: Tensor  # (R,) completion tokens
    completion: Tensor  # (R,) 0 .. b-1
    source: Tensor  # (R,) where each token is in the (B, L) tokens it came from, flattened
    rows: list[int]  # the b completions, as rows of those
    lengths: list[int]  # of the b completions


def pack(
    prompt_ids: Tensor, prompt_lengths: list[int], tokens: Tensor, lengths: list[int], groups: list[list[int]]
) -> PackedRow:
    """One packed row of groups, each a list of rows with the same prompt.

    prompt_ids (B, S) left-padded, tokens (B, L) right-padded, int64; prompt_lengths and lengths of their B rows. Groups
    without rows are left out, and so are completions without tokens. Raises: ValueError where nothing is left.
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
    end = 0  # of the packed row so far
    for group in groups:
        first, size = group[0] * (prompt_width + width) + prompt_width, prompt_lengths[group[0]]
        index.append(torch.arange(first - size, first))
        positions.append(torch.arange(size))
        prompts.append((end, end := end + size))
        last_of_prompt, spans = end - 1, []
        for i in group:
            start, n = i * (prompt_width + width) + prompt_width, lengths[i]
            index.append(torch.arange(start, start + n))
            positions.append(torch.arange(size, size + n))
            predictors += [torch.tensor([last_of_prompt]), torch.arange(end, end + n - 1)]
            completion.append(torch.full((n,), len(rows)))
            source.append(torch.arange(i * width, i * width + n))
            spans.append((end, end := end + n))
            rows.append(i)
        completions.append(spans)
    if not rows:
        raise ValueError("groups must hold a completion with at least one token")
    device = tokens.device
    # One copy to the device for all of them.
    sizes = [sum(map(len, x)) for x in (index, positions, predictors, completion, source)]
    host = torch.cat([*index, *positions, *predictors, *completion, *source])
    where, position, predictor, owner, origin = upload(host, device).split(sizes)
    ids = torch.cat([prompt_ids, tokens], 1).flatten()[where]
    return PackedRow(
        ids[None], position[None], PackedLayout(prompts, completions), predictor, tokens.flatten()[origin], owner,
        origin, rows, [lengths[i] for i in rows],
    )  # fmt: skip


def bins(costs: list[int], budget: int) -> list[list[int]]:
    """Indices of `costs` in as few bins as the rule "largest first, to the emptiest" needs, none over the budget.

    Raises: ValueError where one cost alone is over the budget.
    """
    if costs and max(costs) > budget:
        raise ValueError(f"tokens_per_micro_batch must hold the largest group, {max(costs)} tokens; got {budget}")
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    num_bins = max(1, -(-sum(costs) // budget))
    while True:
        found: list[list[int]] = [[] for _ in range(num_bins)]
        loads = [0] * num_bins
        for i in order:
            emptiest = loads.index(min(loads))
            found[emptiest].append(i)
            loads[emptiest] += costs[i]
        if max(loads) <= budget:
            return [sorted(b) for b in found]
        num_bins += 1


def masks(layout: PackedLayout, positions: Tensor, window: int | None = None) -> Tensor:
    """(T, T) bool of a packed row, true where a query (first) attends to a key; window: of sliding attention."""
    device = positions.device
    group = torch.empty(positions.numel(), dtype=torch.int64)
    member = torch.zeros_like(group)
    for g, ((a, b), spans) in enumerate(zip(layout.prompts, layout.completions, strict=True)):
        group[a : spans[-1][1] if spans else b] = g
        for j, (c, d) in enumerate(spans, 1):
            member[c:d] = j
    group, member, position = upload(group, device), upload(member, device), positions.flatten()
    allowed = (group[:, None] == group) & ((member == 0) | (member[:, None] == member))
    gap = position[:, None] - position
    allowed &= gap >= 0
    return allowed if window is None else allowed & (gap < window)


class Packing:
    """How a model runs over packed groups.

    blocks: attention by `shared_prompt`, without masks or padding, with a soft-cap under flash-attn alone; masks: a
    (T, T) mask given to the model's own attention, for soft-caps and sliding windows; flex: the same as a block mask,
    where the model's attention is flex.

    device, dtype: where and in what the passes will run, autocast considered; trial: False for a model whose weights
    are elsewhere, where it is tried.

    Raises: Unpackable where a small trial does not give the padded pass's hidden states, or the reason is known before.
    """

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype, trial: bool = True) -> None:
        lm = causal_lm(model)
        body = body_of(lm)
        if body is None:
            raise Unpackable("it has no body apart from its head")
        self.config, self.body, self.dtype = lm.config.get_text_config(), body, dtype
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if kinds - {"full_attention", "sliding_attention"}:
            raise Unpackable(f"it has layers of other kinds than attention ({', '.join(sorted(kinds))})")
        if "position_ids" not in inspect.signature(self.body.forward).parameters:
            raise Unpackable("its forward pass takes no position_ids")
        self.kinds = kinds
        self.window = getattr(self.config, "sliding_window", None) if self._slides(kinds) else None
        self.attention = self.config._attn_implementation
        if self.attention not in ("sdpa", "eager", "flex_attention", FLASH_ATTN):
            raise Unpackable(
                f"its attention is {self.attention}; packed groups take sdpa, flex_attention, {FLASH_ATTN} or eager"
            )
        if self.attention == "eager" and any(n.endswith("bias") and b.ndim == 4 for n, b in self.body.named_buffers()):
            raise Unpackable("its attention makes a mask of its own from where a token lies in the row")
        self.mode: Mode = "flex" if self.attention == "flex_attention" else "masks"
        if self.attention in ("sdpa", FLASH_ATTN) and shared_prompt.runs_on(device, dtype, self._head_size()):
            shared_prompt.install(self.attention)
            self.mode = "blocks"
        elif self.attention == FLASH_ATTN:
            raise Unpackable(f"{FLASH_ATTN} has no kernels for {dtype} of {self._head_size()} on {device.type}")
        if not trial:
            return
        if self.attention == FLASH_ATTN and next(lm.parameters()).device.type == "cpu":
            # A run moves the model later, and may shard it first. What its layers do besides attention shows here too,
            # under the attention that runs anywhere and takes masks.
            with shared_prompt.attention_named(lm, "eager"):
                self._try("masks")
            return
        for mode in {self.mode_for(1), self.mode_for((self.window or 0) + 1)}:
            if mode is not None:
                self._try(mode)

    def _slides(self, kinds: set[str]) -> bool:
        if kinds:
            return "sliding_attention" in kinds
        return getattr(self.config, "use_sliding_window", True)

    def _head_size(self) -> int:
        size = getattr(self.config, "head_dim", None)
        return int(size or self.config.hidden_size // self.config.num_attention_heads)

    def mode_for(self, longest: int) -> Mode | None:
        """What groups take whose longest prompt and completion together have so many positions; None: they cannot."""
        if self.mode == "blocks" and self.window is not None and longest > self.window:
            return None if self.attention == FLASH_ATTN else "masks"
        return self.mode

    @property
    def too_long(self) -> str:
        """Why `mode_for` gives None."""
        return (
            f"a prompt with its completion may be longer than the sliding window of {self.window} positions, and "
            f"{FLASH_ATTN} takes no mask"
        )

    def arguments(self, packed: PackedRow, mode: Mode | None = None) -> dict[str, Any]:
        """What the forward pass of the model or its body is called with.

        Raises: Unpackable for groups longer than a sliding window under an attention that takes no mask.
        """
        mode = mode or self.mode_for(packed.layout.longest)
        if mode is None:
            raise Unpackable(self.too_long)
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

    def _mask(self, packed: PackedRow, window: int | None) -> Tensor:
        allowed = masks(packed.layout, packed.positions, window)[None, None]
        if self.attention == "sdpa":
            return allowed
        dtype = next(p for p in self.body.parameters() if p.is_floating_point()).dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
            ~allowed, torch.finfo(dtype).min
        )

    def _block_mask(self, packed: PackedRow, window: int | None) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        allowed = masks(packed.layout, packed.positions, window)
        size = len(allowed)
        return create_block_mask(lambda b, h, q, k: allowed[q, k], None, None, size, size, device=allowed.device)

    @torch.no_grad()
    def _try(self, mode: Mode) -> None:
        """Two small groups, packed and padded: whatever a model does besides attention shows."""
        weights = next(self.body.parameters())
        device, autocast = weights.device, weights.is_cuda and weights.dtype != self.dtype
        vocab, lengths, prompt_lengths = self.config.vocab_size, [3, 1, 4, 2], [3, 3, 2, 2]
        prompt_ids = (torch.tensor([[5, 6, 7]] * 2 + [[0, 8, 9]] * 2) % vocab).to(device)
        tokens = (torch.arange(16).view(4, 4) * 3 % vocab).to(device)
        packed = pack(prompt_ids, prompt_lengths, tokens, lengths, [[0, 1], [2, 3]])
        rows = [torch.cat([prompt_ids[i, 3 - prompt_lengths[i] :], tokens[i, :n]])[None] for i, n in enumerate(lengths)]
        try:
            with evaluating(self.body), torch.autocast(device.type, self.dtype, enabled=autocast):
                states = self.body(**self.arguments(packed, mode)).last_hidden_state[0, packed.predictors]
                parts = [self.body(input_ids=r, use_cache=False).last_hidden_state[0] for r in rows]
        except Exception as e:
            raise Unpackable(f"its forward pass does not take packed groups: {type(e).__name__}: {e}") from None
        alone = torch.cat([x[-n - 1 : -1] for x, n in zip(parts, lengths, strict=True)]).float()
        gap, size = (states.float() - alone).abs().amax(), alone.abs().amax()
        # Rounding differs from one order of sums to another, and grows over the layers. In bfloat16 that leaves only
        # gross differences to be seen.
        dtype = self.dtype if autocast else states.dtype
        ulps = 200 if dtype in (torch.float32, torch.float64) else 8
        if not bool(gap <= size * torch.finfo(dtype).eps * ulps):
            raise Unpackable(f"its hidden states differ when groups are packed, by {gap:.1e} of {size:.1e}")
