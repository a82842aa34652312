"""The objective and log-probs from hidden states and the head: never more logits than those of a chunk of rows."""
