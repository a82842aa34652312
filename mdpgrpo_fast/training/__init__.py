"""The trainer and what it is made of: batches, distribution, checkpoints, metrics, the run directory."""
