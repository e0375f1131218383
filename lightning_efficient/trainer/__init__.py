"""What is read off a Trainer, or replayed from it."""
