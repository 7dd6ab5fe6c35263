"""Measurements against peers: the same inputs, the same process, medians side by side. Each module prints its table."""
