"""What can be known of a run before its model is loaded."""
