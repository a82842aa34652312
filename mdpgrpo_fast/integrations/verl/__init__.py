"""MDP-GRPO inside verl (0.9).

`plugin` is what verl loads. `python -m mdpgrpo_fast.integrations.verl` tells what is registered and where the configs
are, and makes parquet files; only the first of these needs verl.
"""
