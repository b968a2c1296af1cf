"""A run directory: its files, checkpoints, curves and costs."""
