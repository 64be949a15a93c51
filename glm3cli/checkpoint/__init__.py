"""Weights on disk, in every layout."""
