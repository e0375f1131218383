"""Norms that fold into linear maps, and the way to them."""
