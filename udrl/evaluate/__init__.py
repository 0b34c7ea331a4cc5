"""Evaluation: outputs of several policies, judged, measured and reported."""
