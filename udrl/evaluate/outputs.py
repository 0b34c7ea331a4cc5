"""The table that metrics are computed from: one row per output.

One rule holds everywhere: a rejected or empty output counts as relevance 0, and for a judge as a prompt for another intent, for
every policy, so that refusing never pays. Trivial baselines (:mod:`udrl.evaluate.policy_outputs`) are never rejected.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from udrl.episodes import COMPONENTS, KEYS

# The command of a row: the default; words in (length) and out of (reach) the usual range; a reward bin.
PROBES = ("default", "length", "reach", "reward")
STUDENT, TEACHER = "student", "teacher"
# Prefix of the column of each judge, float32: NaN or null if the judge failed or did not see the row; for a rejected row its
# mean score of prompts for other intents (see udrl.evaluate.judges.judging).
JUDGE = "judge_"

OUTPUTS = pa.schema(
    [
        *KEYS,
        ("probe", pa.string()),
        ("prompt", pa.string()),  # empty when rejected
        ("reason", pa.string()),  # empty, or an udrl.episodes.Reason
        ("n_words", pa.int32()),  # of a rejected output: words of its completion
        *((component, pa.float32()) for component in COMPONENTS),
        ("reward", pa.float32()),
    ]
)

Columns = dict[str, np.ndarray]  # arrays of shape (rows,)


def columns(outputs: pa.Table) -> Columns:
    """Return the table as arrays of shape (rows,), with ``rejected`` as a further one.

    A rejected row has relevance 0; the judges' columns are unchanged, since they cover rejected rows already.
    """
    texts = ("task", "policy", "probe", "prompt", "reason")
    rows = {name: np.asarray(outputs[name].to_pylist(), dtype=object) for name in texts}
    rows |= {
        name: _numbers(outputs, name).astype(np.int64) for name in ("command_words", "command_reward", "n_words", "variation")
    }
    rows["intent_id"] = outputs["intent_id"].to_numpy()  # 63 bits, which a float cannot hold
    rows["rejected"] = np.array([bool(r) or not p for r, p in zip(rows["reason"], rows["prompt"], strict=True)], dtype=bool)
    rows["relevance"] = np.where(rows["rejected"], 0.0, _numbers(outputs, "relevance", np.nan))
    for name in outputs.column_names:
        if name.startswith(JUDGE):
            rows[name] = _numbers(outputs, name, np.nan)
    return rows


def judge_columns(rows: Columns) -> dict[str, str]:
    """Return the column of each judge by its name."""
    return {name.removeprefix(JUDGE): name for name in rows if name.startswith(JUDGE)}


def select(rows: Columns, keep: np.ndarray) -> Columns:
    """Return the rows for which ``keep``, bool (rows,), is true."""
    return {name: column[keep] for name, column in rows.items()}


def _numbers(outputs: pa.Table, name: str, absent: float = 0.0) -> np.ndarray:
    values: Any = outputs[name].to_pylist()
    return np.array([absent if value is None else value for value in values], dtype=float)
