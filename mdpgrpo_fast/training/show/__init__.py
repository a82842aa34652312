"""What a run tells on the terminal: the block at its start, its steps, and how it ended."""
