"""The trained model for others: its card, and its repository on the hub."""
