"""Sampling of completions: by the model itself, or by vLLM."""
