"""A run's episodes without a teacher: made-up words, for parts that look at speed and not at language."""

import numpy as np
import pyarrow as pa

from udrl import storage
from udrl.episodes import COMPONENTS, EPISODES
from udrl.hashing import stable_id
from udrl.text import count_words

SYLLABLES = [c + v for c in "bdfghjklmnprstvwz" for v in ("a", "e", "i", "o", "u")]


def write_episodes(uri: str, tasks: list[str], n: int, distinct: int, files: int = 4) -> None:
    """Write the outputs of a finished generate stage with ``n`` episodes under ``uri``; prompts have 3 to 40 words.

    ``distinct`` words are drawn from; about as many pieces can a tokenizer learn from them.
    """
    rng = np.random.default_rng(0)
    pool = np.array(sorted({"".join(rng.choice(SYLLABLES, rng.integers(2, 5))) for _ in range(distinct)}))
    blank = {"string": "", "int64": 0, "int32": 0, "float": 0.5}
    empty = {field.name: blank.get(str(field.type)) for field in EPISODES}
    for file in range(files):
        rows = []
        for i in range(file, n, files):
            intent = " ".join(rng.choice(pool, rng.integers(3, 9)))
            prompt = " ".join(rng.choice(pool, rng.integers(3, 41)))
            texts = {"intent": intent, "intent_id": stable_id(intent), "prompt": prompt, "n_words": count_words(prompt)}
            scores = dict(zip((*COMPONENTS, "reward"), rng.random(len(COMPONENTS) + 1).tolist(), strict=True))
            rows.append({**empty, **texts, **scores, "task": tasks[i // files % len(tasks)], "episode_id": i})
        table = pa.Table.from_pylist(rows, schema=EPISODES)
        storage.write_table(storage.join(uri, "episodes", f"part-{file:08d}.parquet"), table)
    storage.write_json(storage.join(uri, "generate.json"), {"ledger": "made-up", "scoring": "made-up", "accepted": n})
