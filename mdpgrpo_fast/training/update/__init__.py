"""What a step does with its completions: weights, advantages over all ranks, the reference, the optimiser's updates."""
