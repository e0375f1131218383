"""The progressive norm swap: normalization layers traded during training for ones that fold away."""
