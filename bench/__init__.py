"""Benchmarks (``pytest bench/ --benchmark-only``) and the studies behind the tables in docs/."""
