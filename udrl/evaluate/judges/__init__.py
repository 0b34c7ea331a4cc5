"""Judges that score outputs independently of the scorer that made the training reward.

``likelihood``, ``embedding`` and ``rubric`` judges score one prompt for its intent, ``pairwise`` judges compare two. A judge
counts only if it is validated: it must tell true pairs from false ones (:mod:`~udrl.evaluate.judges.validation`).
"""
