"""Replace modules, and keep optimizers and schedulers in step."""
