"""Files of random episodes."""

from typing import Any

import numpy as np
import pyarrow as pa

from udrl import storage
from udrl.episodes import COMPONENTS, EPISODES
from udrl.hashing import stable_id
from udrl.run import GenerateSummary, Run
from udrl.text import count_words

SUBJECTS = "owl fox lynx otter heron newt violin kettle lantern bicycle".split()  # noqa: SIM905
WORDS = "soft light snow night bold type wide shot gold blue quiet forest paper texture warm".split()  # noqa: SIM905


def blank_episode() -> dict[str, Any]:
    """Return an episode without text, whose rewards are 0.5."""
    blank = {"string": "", "int64": 0, "int32": 0, "float": 0.5}
    return {column.name: blank[str(column.type)] for column in EPISODES}


def write_episodes(folder: str, rows: list[dict[str, Any]], files: int = 1) -> str:
    """Write episodes of the task ``paint``, if the rows do not name another, as several Parquet files; return ``folder``."""
    episodes = [{**blank_episode(), "episode_id": i, "task": "paint", **row} for i, row in enumerate(rows)]
    for part in range(files):
        table = pa.Table.from_pylist(episodes[part::files], schema=EPISODES)
        storage.write_table(storage.join(folder, f"part-{part:08d}.parquet"), table)
    return folder


def fill_with_episodes(uri: str, files: int = 3, rows: int = 80, rare_subjects: bool = False) -> None:
    """Fill a run's storage as a finished generate stage leaves it: episodes of two tasks and ``generate.json``.

    With ``rare_subjects`` few intents share a subject, so that episodes can have swapped copies.
    """
    run = Run(uri)
    rng = np.random.default_rng(0)
    for part in range(files):
        table = []
        for i in range(rows):
            subject = SUBJECTS[i % len(SUBJECTS)]
            if rare_subjects:
                subject += f"{chr(97 + i // len(SUBJECTS) % 26)}{chr(97 + part)}"
            intent = f"poster of a {subject} {part} {i // 2}"
            prompt = " ".join([subject, *rng.choice(WORDS, rng.integers(3, 12))])
            row = blank_episode()
            row |= {"intent": intent, "intent_id": stable_id(intent), "prompt": prompt, "n_words": count_words(prompt)}
            row |= {"task": ["text_to_image", "image_search"][i % 2], "episode_id": part * rows + i}
            row |= {c: float(rng.random()) for c in COMPONENTS} | {"reward": float(rng.random())}
            table.append(row)
        uri_part = storage.join(run.scoring.episodes, f"part-{part:08d}.parquet")
        storage.write_table(uri_part, pa.Table.from_pylist(table, schema=EPISODES))
    GenerateSummary(ledger="made-up", scoring="made-up", accepted=files * rows).save(run.generate_summary)
