"""rt: recyclable tuning. Model, deltas, losses and recycling, one idea a file."""
__version__ = "0.1.0"
