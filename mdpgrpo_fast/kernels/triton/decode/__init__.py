"""Kernels of a decode step: one token a row."""
