"""The Triton kernels as torch.library ops `mdpgrpo_fast::triton_*`, launched with the tile that was measured."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..schemas import Launchers, register
from .advantages import launch_advantages
from .completions import launch_totals
from .logprobs import launch_logprobs, launch_logprobs_backward
from .objective import launch_objective
from .sampling import launch_sample
from .token_loss import launch_scale, launch_token_loss
from .tuning import tile_for


def options(logits: Tensor) -> dict[str, Any]:
    """The tile of these rows, measured when it is first asked for."""
    return {"tile_of": lambda: tile_for(logits.shape[-1], logits.dtype, logits.device)}


def sample(logits: Tensor, temperature: Tensor | None, seeds: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As `sampling.launch_sample`."""
    return launch_sample(logits, temperature, seeds, **options(logits))


LAUNCHERS = Launchers(
    options=options,
    token_loss=launch_token_loss,
    logprobs=launch_logprobs,
    logprobs_backward=launch_logprobs_backward,
    objective=launch_objective,
    totals=launch_totals,
    advantages=launch_advantages,
    scale=launch_scale,
)
# On the CPU in Triton's interpreter. Kept: the ops live as long as their library.
_library = register("triton", LAUNCHERS, ("CUDA", "CPU"))
