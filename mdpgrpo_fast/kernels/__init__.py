"""Triton kernels, one file per op, with shared device helpers in `common`. `library` registers them with torch."""
