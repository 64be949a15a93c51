"""Benchmarks on top of infer."""
