"""Structured pruning: whole channels, neurons and heads."""
