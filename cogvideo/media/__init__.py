"""Reading and writing videos, cut detection and contact sheets. Nothing here depends on clip planning or tokens."""
