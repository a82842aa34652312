"""The Triton kernels as torch.library ops `mdpgrpo_fast::triton_*`."""

from __future__ import annotations

from ..schemas import Launchers, register
from .advantages import launch_advantages
from .logprobs import launch_logprobs, launch_logprobs_backward
from .token_loss import launch_scale, launch_token_loss

LAUNCHERS = Launchers(launch_token_loss, launch_logprobs, launch_logprobs_backward, launch_advantages, launch_scale)
# On the CPU in Triton's interpreter. Kept: the ops live as long as their library.
_library = register("triton", LAUNCHERS, ("CUDA", "CPU"))
