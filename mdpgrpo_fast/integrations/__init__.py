"""The library inside other stacks."""
