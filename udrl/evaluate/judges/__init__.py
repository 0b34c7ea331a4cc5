"""Judges that score outputs independently of the scorer that made the training reward.

``likelihood``, ``embedding`` and ``rubric`` score one prompt for its intent, ``pairwise`` compares two. Before a judge is
believed it must tell true pairs from false ones (:mod:`~udrl.evaluate.judges.validation`).
"""

from udrl.evaluate.judges.ask_judges import ask, judge_pairwise, judge_pointwise
from udrl.evaluate.judges.judge_passes import known

__all__ = ["ask", "judge_pairwise", "judge_pointwise", "known"]
