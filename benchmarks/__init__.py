"""Benchmarks: one script per claim, each prints a table and, as its last line, JSON."""
