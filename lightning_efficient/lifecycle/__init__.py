"""When a method acts inside a Trainer, and what a file says of it."""
