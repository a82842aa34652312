"""Which TRL this works in: looked at when it is imported, so that nothing of ours is passed by in silence."""

from __future__ import annotations

import importlib.metadata

from ...config import needs_package

OLDEST = (1, 16)
# Methods of GRPOTrainer that are overridden or called here. One that is gone would never be called again.
EXTENDED = (
    "_calculate_rewards", "_compute_loss", "_generate_and_score_completions", "_generate_single_turn",
    "_get_per_token_logps_and_entropies", "_prepare_inputs", "_tool_call_loop", "get_gamma_weights",
    "get_high_entropy_mask",
)  # fmt: skip


def check() -> None:
    """Raises: ImportError where TRL is missing, is older than 1.16, or lacks what is extended here."""
    least = ".".join(map(str, OLDEST))
    try:
        found = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"mdpgrpo_fast.integrations.trl {needs_package('trl')}") from None
    if tuple(int(x) for x in found.split(".")[:2]) < OLDEST:
        raise ImportError(f"mdpgrpo_fast.integrations.trl {needs_package('trl', f'{least} or newer; found {found}')}")
    from trl import GRPOTrainer

    gone = [name for name in EXTENDED if not hasattr(GRPOTrainer, name)]
    if gone:
        raise ImportError(
            f"trl {found} is newer than this version of mdpgrpo_fast knows: its GRPOTrainer has no {', '.join(gone)}; "
            f"install a trl between {least} and that, or a newer mdpgrpo_fast"
        )
