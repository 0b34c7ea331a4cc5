"""Rounds: the student explores, what it wrote is scored and relabelled, and the next student learns from all of it."""
