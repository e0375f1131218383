"""What accompanies the methods: scores of a canary, losses, batches by length, fixed heads, modulation; torch only."""
