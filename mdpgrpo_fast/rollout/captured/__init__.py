"""Decode steps of fixed shapes (`fixed`), captured in CUDA graphs (`graphs`); their `attention` and `fused` pieces."""
