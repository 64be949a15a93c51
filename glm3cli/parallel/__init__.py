"""The grid of ranks and its process groups."""
