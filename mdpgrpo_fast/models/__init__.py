"""Causal language models: loading, the policy around one, its head, adapters, packed forward passes."""
