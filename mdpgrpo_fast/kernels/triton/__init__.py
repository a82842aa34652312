"""Triton kernels, one module per op; `rows` and `method` hold device functions, `library` registers the ops."""
