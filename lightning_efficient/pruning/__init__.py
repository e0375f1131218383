"""Element masks: which weights, how they are scored, how many."""
