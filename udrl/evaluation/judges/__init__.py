"""Judges that score outputs independently of the scorer that made the training reward.

``likelihood``, ``embedding`` and ``rubric`` score one prompt for its intent, ``pairwise`` compares two. Before a judge is
believed it must tell true pairs from false ones (:mod:`~udrl.evaluation.judges.validation`).
"""

from udrl.evaluation.judges.passes import known
from udrl.evaluation.judges.run import ask, judge_pairwise, judge_pointwise

__all__ = ["ask", "judge_pairwise", "judge_pointwise", "known"]
