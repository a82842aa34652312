"""verl's advantage estimator `mdp_grpo`: the method's advantages of rewards that verl has as one number a row."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...config import ConfigError, MDPGRPOConfig
from ...log import say_once
from ...ops.advantages import advantages
from .method import method_of, options_in

logger = logging.getLogger("mdpgrpo_fast")
COUNT = "constraints"  # K, in what the reward function returns beside the score


def mdp_grpo_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, index: np.ndarray | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Dual-anchor, prospect-shaped advantages (paper, Eq. 3 to 6), as `verl.trainer.ppo.core_algos` calls for them.

    token_level_rewards: (B, L) float, whose sum over L is the reward of a completion, the share of its prompt's
    constraints in [0, 1]. response_mask: (B, L), 1 for tokens of the policy. index: (B,) the uid of each row's prompt.
    config: verl's `algorithm`, with `mdp_grpo`. A group may lack completions that failed; rows that verl adds to fill
    a batch, with no token and a uid that no prompt has, get 0. Each row is a completion: an agent loop that gives
    several outputs for one is seen only where a group has too many rows.

    K of each prompt is `mdp_grpo.num_constraints` where that is set, else `constraints` of what the reward function
    returned, which verl's trainer (v1) keeps beside the completion.

    Returns: (B, L) advantages, one number for all tokens of a completion, 0 outside the mask; twice, as the returns.
    Raises: ConfigError as `method_of`; ValueError for a group of more than num_generations rows, for rewards or counts
    that cannot be used.
    """
    options = options_in(config)
    method = method_of(options)
    if index is None:
        raise ValueError("index is missing: verl gives the uids of the prompts where the batch has them")
    scores, mask = token_level_rewards.sum(-1), response_mask.to(token_level_rewards.dtype)
    uids, group = np.unique(np.asarray(index, dtype=str), return_inverse=True)
    rows = [np.flatnonzero(group == g) for g in range(len(uids))]
    # Rows of verl's own that fill up a batch have no token, and no reward function saw them.
    real = [g for g, members in enumerate(rows) if bool(mask[members].any())]
    found = torch.zeros_like(scores)
    if real:
        counts = None
        if method.alpha > 0:
            counts = constraint_counts([str(uids[g]) for g in real], options, method.multi_temperature)
            if bool(((scores < 0) | (scores > 1)).any()):
                say_once(logging.WARNING, "rewards are outside of [0, 1], which the goal anchor of mdp_grpo is for")
        lost = len(real) * method.num_generations - sum(len(rows[g]) for g in real)
        if lost > 0:
            logger.warning(
                "%d of the %d completions of %d prompts are missing: verl leaves out those whose sampling or reward "
                "raised, and says why as \"Error in _run_prompt\"", lost, len(real) * method.num_generations, len(real)
            )  # fmt: skip
        _fill(found, scores, [rows[g] for g in real], [str(uids[g]) for g in real], counts, method)
    out = found[:, None] * mask
    return out, out


def _fill(
    found: Tensor, scores: Tensor, groups: Sequence[np.ndarray], uids: Sequence[str], counts: Sequence[int] | None,
    method: MDPGRPOConfig,
) -> None:  # fmt: skip
    size = method.num_generations
    rewards = scores.new_zeros(len(groups), size)
    valid = torch.zeros(len(groups), size, dtype=torch.bool, device=scores.device)
    for g, members in enumerate(groups):
        if len(members) > size:
            raise ValueError(
                f"the prompt {uids[g]} has {len(members)} rows for num_generations = {size}: an agent loop of several "
                "outputs a completion has no advantage of this kind"
            )
        rewards[g, : len(members)], valid[g, : len(members)] = scores[members], True
    advantage = advantages(rewards, counts, method, valid=valid).advantage.to(found)
    for g, members in enumerate(groups):
        found[members] = advantage[g, : len(members)]


def constraint_counts(
    uids: Sequence[str], options: Mapping[str, Any], multi_temperature: bool = False
) -> list[int]:  # fmt: skip
    """K of each prompt. Raises: ConfigError where neither the options nor the reward function tells, or, with
    multi_temperature, another agent loop than ours drew the completions."""
    fixed = options.get("num_constraints")
    if fixed is not None:
        return [fixed] * len(uids)
    try:
        import transfer_queue as tq

        # A completion's key is {uid}_{number}_{output}; a group may lack some.
        kept = tq.kv_list("train").get("train", {})
        first: dict[str, str] = {}
        for key in sorted(kept):
            if key.count("_") >= 2:
                first.setdefault(key.rsplit("_", 2)[0], key)
        keys = [first[uid] for uid in uids]
        told = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=["extra_fields"]).pop("extra_fields")
    except (ImportError, KeyError, ValueError, RuntimeError, AssertionError) as e:
        raise ConfigError(
            "mdp_grpo cannot find the constraints of the prompts in verl's TransferQueue; set trainer.use_v1=True, or "
            f"algorithm.mdp_grpo.num_constraints where all prompts have as many ({type(e).__name__}: {e})"
        ) from e
    entries = [entry or {} for entry in told.tolist()]
    if multi_temperature and any("sampling_temperature" not in entry for entry in entries):
        raise ConfigError(
            "agent_name must be mdp_grpo in the rows of data.train_files, as --data writes them, or be left out: "
            "another agent loop drew the completions at one temperature"
        )
    return [_count(entry, uid) for entry, uid in zip(entries, uids, strict=True)]


def _count(extra: Mapping[str, Any], uid: str) -> int:
    count = (extra.get("reward_extra_info") or {}).get(COUNT)
    if count is None:
        raise ConfigError(
            f"the reward function must return {{'score': r, '{COUNT}': K}}, as compute_score of "
            "mdpgrpo_fast.integrations.verl.reward does, or algorithm.mdp_grpo.num_constraints be set; it told no "
            f"{COUNT} of the prompt {uid}"
        )
    return int(count)
