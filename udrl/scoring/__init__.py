"""Scoring: from raw completions to episodes with a reward, and rejects with a reason."""
