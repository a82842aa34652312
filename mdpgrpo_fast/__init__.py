"""mdpgrpo_fast: MDP-GRPO, reinforcement learning on many checkable constraints."""

__version__ = "0.1.0"
