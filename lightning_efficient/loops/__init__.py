"""The methods in a training loop of one's own: plain torch, no Trainer."""
