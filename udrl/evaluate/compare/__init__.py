"""Finished evaluations side by side, and thresholds for CI."""
