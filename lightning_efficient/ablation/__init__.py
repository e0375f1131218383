"""``ablate``: one configuration, methods toggled, over seeds. Imports nothing: runs load the reporter only."""

from __future__ import annotations
