"""Judges that score outputs independently of the scorer that made the training reward.

A judge counts only if it is validated: it must tell true pairs of intent and prompt from false ones
(:mod:`~udrl.evaluate.judges.validation`).
"""
