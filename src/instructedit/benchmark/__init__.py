"""Benchmark of the engine against a plain implementation, on the same weights, records, rank and threads."""
