"""The public functions: checks at the door, a backend chosen, autograd around it."""
