"""What accompanies the methods: scores of a canary, losses of distillation; torch only."""
