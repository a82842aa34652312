"""The plug-in that verl loads (entry-point group `verl.plugins`): to import it is to register what `PARTS` names."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

from .method import NAME, VENDOR

logger = logging.getLogger("mdpgrpo_fast")


@dataclass(frozen=True)
class Part:
    """Something that verl finds by a name. problem: why it is not registered."""

    what: str
    name: str
    problem: str | None


def _estimator() -> None:
    from verl.trainer.ppo.core_algos import register_adv_est

    from .estimator import mdp_grpo_advantage

    register_adv_est(NAME)(mdp_grpo_advantage)


def _policy_loss() -> None:
    from verl.trainer.ppo.core_algos import register_policy_loss

    from .policy_loss import mdp_grpo_loss

    register_policy_loss(NAME)(mdp_grpo_loss)


def _agent_loop() -> None:
    from verl.experimental.agent_loop.agent_loop import register as register_agent_loop

    from .agent_loop import MDPGRPOAgentLoop

    register_agent_loop(NAME)(MDPGRPOAgentLoop)


def _engine() -> None:
    from verl.workers.engine.base import EngineRegistry

    from .engine import MDPGRPOEngine

    # Of a vendor of its own: no other run of this verl sees it.
    EngineRegistry.register("language_model", ["fsdp", "fsdp2"], ["cuda", "npu"], VENDOR)(MDPGRPOEngine)


PARTS: dict[str, tuple[str, Callable[[], None]]] = {
    "advantage estimator": (NAME, _estimator),
    "policy loss": (NAME, _policy_loss),
    "agent loop": (NAME, _agent_loop),
    "engine": (VENDOR, _engine),
}
registered: dict[str, Part] = {}


def register(what: str) -> Part:
    """Registers one of PARTS, once. What cannot be is told in a warning too, as verl itself would say nothing."""
    if what not in registered:
        (name, part), problem = PARTS[what], None
        try:
            part()
        except Exception as e:  # verl's own import may raise anything
            problem = f"{type(e).__name__}: {e}"
            logger.warning("verl's %s %s cannot be registered: %s", what, name, problem)
        registered[what] = Part(what, name, problem)
    return registered[what]


for _what in PARTS:
    # verl's engines take a second and several warnings to import, which only a worker of this engine needs.
    if _what != "engine" or os.environ.get("VERL_ENGINE_VENDOR") == VENDOR:
        register(_what)
