"""``ablate``: one configuration, methods toggled, over seeds. Imports nothing: runs load the reporter only."""
