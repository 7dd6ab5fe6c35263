"""What a server tells of itself: logs, metrics, traces, and whether live images look as they should."""
