"""Held-out evaluation: greedy answers, accuracies and their intervals. `mdpgrpo_fast.evaluate` is its command."""
