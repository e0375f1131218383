"""Who reads the output of a norm, and absorbs it."""
