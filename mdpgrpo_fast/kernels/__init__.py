"""Kernels by backend: `triton`, and `cpu` and `cuda`, compiled from csrc/. `schemas` is what they share."""
