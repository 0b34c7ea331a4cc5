"""From a ledger to episodes for real: three passes on a local Ray, each resumable, none depending on where it was cut."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from udrl import storage
from udrl.episodes import COMPLETIONS, EPISODES, REJECTS, iter_tables
from udrl.errors import UserError
from udrl.hashing import stable_id
from udrl.policies.ledger import list_parts, part_name
from udrl.recipe import Deduplicate, Rewards
from udrl.scoring import filtering as sift
from udrl.scoring.score import score
from udrl.tasks import Example, Format, Task

pytestmark = pytest.mark.usefixtures("local_ray")

EXAMPLES = [Example(intent=f"thing {i}", prompt=f"a thing number {i} in light") for i in range(3)]
TASKS = [
    Task(name=name, title=name, instruction="Write.", examples=EXAMPLES, format=Format(min_words=3, max_words=20))
    for name in ("paint", "find")
]
SHARDS, INTENTS, SAMPLES = 8, 3, 2
WORDS = "red fox snow light owl jazz poster bold soft night wide shot paper texture warm quiet forest gold blue".split()  # noqa: SIM905


def write_ledger(uri: str, seed: int = 0, shards: int = SHARDS) -> int:
    """Completions of every kind, many said twice over shards; the number of prompts that they were asked for."""
    rng = np.random.default_rng(seed)
    said = [" ".join(rng.permutation(WORDS)[:9]) for _ in range(16)]
    asked = 0
    for shard in range(shards):
        rows = []
        for i in range(INTENTS):
            intent_id = shard * INTENTS + i
            for task in TASKS:
                for variation in range(SAMPLES):
                    texts = [str(rng.choice(said)) + ("" if rng.random() < 0.5 else " !") for _ in range(3)]
                    kind = int(rng.integers(6))
                    whole = json.dumps({"prompts": texts})
                    row = {"prompts": 3, "completion": whole} if kind == 0 else {"prompts": 1, "completion": texts[0]}
                    row |= {"completion": whole[:70]} if kind == 0 and variation else {}
                    row |= {"completion": ""} if kind == 1 else {}
                    row |= {"error": "boom", "finish_reason": "error", "completion": ""} if kind == 2 else {}
                    rows.append(blank() | {"finish_reason": "stop", "variation": 10 * variation, "task": task.name} | row)
                    rows[-1] |= {"intent_id": intent_id, "intent": f"poster of a fox {intent_id}"}
                    rows[-1]["episode_id"] = stable_id(seed, intent_id, task.name, variation)
                    asked += int(row["prompts"])
        rng.shuffle(rows)  # type: ignore[arg-type]
        for part in (rows[:5], rows[5:], rows[4:6]):  # a retried task wrote two rows again
            table = pa.Table.from_pylist(part, schema=COMPLETIONS)
            storage.write_table(storage.join(uri, part_name(shard, table)), table)
    return asked


def blank() -> dict[str, Any]:
    empty: dict[str, Any] = {"string": "", "int64": 0, "int32": -1}
    return {f.name: empty.get(str(f.type), []) for f in COMPLETIONS}


def table_of(root: str, name: str) -> pa.Table:
    return pa.concat_tables(list(iter_tables(storage.join(root, name))))


def times(root: str, *names: str) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for name in names for p in Path(root, name).iterdir()}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, int, Counter[str]]:
    folder = tmp_path_factory.mktemp("score")
    ledger, root = str(folder / "completions" / "abc"), str(folder / "run")
    asked = write_ledger(ledger)
    return ledger, root, asked, score(ledger, root, TASKS, Rewards())


def test_every_prompt_that_was_asked_for_is_an_episode_or_a_reject(scored: tuple[str, str, int, Counter[str]]) -> None:
    _, root, asked, counts = scored
    episodes, rejects = table_of(root, "episodes"), table_of(root, "rejects")
    assert episodes.schema.equals(EPISODES)
    assert rejects.schema.equals(REJECTS)
    ids = episodes["episode_id"].to_pylist() + rejects["episode_id"].to_pylist()
    assert len(set(ids)) == len(ids) == asked == counts.total()
    assert counts["accepted"] == episodes.num_rows
    assert counts == {"accepted": episodes.num_rows, **Counter(rejects["reason"].to_pylist())}
    assert {"empty", "engine_error", "missing", "duplicate", "near_duplicate"} <= set(counts)
    said = Counter(zip(episodes["task"].to_pylist(), episodes["prompt"].to_pylist(), strict=True))
    assert max(said.values()) == 1
    assert all(0 <= r <= 1 for r in episodes["reward"].to_pylist())


def test_a_finished_pass_is_not_done_again(scored: tuple[str, str, int, Counter[str]]) -> None:
    ledger, root, _, counts = scored
    everything = ("sifted", "relevance", "episodes", "rejects")
    before = times(root, *everything)
    elsewhere = {"placement": {"cpus": 2, "threads": 1}, "batch_size": 3}  # where it runs does not matter
    assert score(ledger, root, TASKS, Rewards.model_validate(elsewhere)) == counts
    assert times(root, *everything) == before


def test_other_weights_and_preferences_mix_anew_and_load_no_embedder(
    scored: tuple[str, str, int, Counter[str]], tmp_path: Path
) -> None:
    ledger, root, _, counts = scored
    mine = str(tmp_path / "run")
    shutil.copytree(root, mine)
    before = times(mine, "sifted", "relevance")
    novel = Rewards.model_validate({"weights": {"relevance": 0, "novelty": 1, "repetition": 0, "format": 0}})
    tasks = [t.model_copy(update={"format": t.format.model_copy(update={"prefer": ["fox"]})}) for t in TASKS]
    about = storage.read_json(storage.join(mine, "episodes", "about.json"))
    assert score(ledger, mine, tasks, novel) == counts
    assert times(mine, "sifted", "relevance") == before
    episodes = table_of(mine, "episodes")
    assert episodes["reward"].to_pylist() == pytest.approx(episodes["novelty"].to_pylist())
    assert set(episodes["format"].to_pylist()) == {0.0, 1.0}
    assert storage.read_json(storage.join(mine, "episodes", "about.json"))["scoring"] != about["scoring"]


@pytest.mark.parametrize("lost", [{0}, {3, 4}, {1, 5, 7}, set(range(2, SHARDS))])
def test_a_run_that_was_cut_anywhere_ends_the_same(
    scored: tuple[str, str, int, Counter[str]], tmp_path: Path, lost: set[int]
) -> None:
    """Shards are written side by side, so a kill may leave any of them missing, in any of the folders."""
    ledger, root, _, counts = scored
    mine = str(tmp_path / "run")
    shutil.copytree(root, mine)
    for i, shard in enumerate(sorted(lost)):
        gone = [("sifted", "relevance", "episodes", "rejects"), ("relevance", "rejects"), ("sifted", "rejects")][i % 3]
        for folder in gone:
            Path(mine, folder, sift.part_name(shard)).unlink()
    assert score(ledger, mine, TASKS, Rewards()) == counts
    for folder in ("sifted", "episodes", "rejects"):
        assert table_of(mine, folder).equals(table_of(root, folder))


def test_a_changed_rule_never_mixes_with_old_rows(scored: tuple[str, str, int, Counter[str]], tmp_path: Path) -> None:
    ledger, root, asked, counts = scored
    mine = str(tmp_path / "run")
    shutil.copytree(root, mine)
    exact = Rewards(deduplicate=Deduplicate(near=None))
    more = score(ledger, mine, TASKS, exact)
    assert more.total() == asked
    assert more["near_duplicate"] == 0
    assert more["accepted"] > counts["accepted"]
    everything = score(ledger, mine, TASKS, exact, deduplicate=False)
    assert everything["accepted"] > more["accepted"]
    assert everything["duplicate"] == 0
    assert everything.total() == asked


def test_what_an_earlier_round_said_is_said_before(scored: tuple[str, str, int, Counter[str]], tmp_path: Path) -> None:
    _, root, _, _ = scored
    ledger = str(tmp_path / "completions" / "next")
    asked = write_ledger(ledger, seed=0)  # the same texts over again
    known = [storage.join(root, "episodes")]
    again = score(ledger, str(tmp_path / "run"), TASKS, Rewards(), known=known)
    assert again["accepted"] == 0
    assert again.total() == asked


def test_a_dead_memory_ends_the_pass_and_what_is_done_is_kept(tmp_path: Path) -> None:
    import ray

    ledger, out, whole = (str(tmp_path / name) for name in ("ledger", "cut", "whole"))
    write_ledger(ledger, shards=40)
    facts = sift.sift(ledger, whole, TASKS, Deduplicate())
    sift.bind(out, storage.read_json(storage.join(whole, sift.ABOUT)))
    parts = list_parts(ledger)
    steps = sift._run(ledger, out, parts, set(parts), TASKS, Deduplicate(), [])
    next(steps)
    ray.kill(steps.gi_frame.f_locals["said"])  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="the actor that remembers what was said died"):
        list(steps)
    kept = list(Path(out).glob("part-*"))
    assert 0 < len(kept) < 40
    before = {p: p.stat().st_mtime_ns for p in kept}
    assert sift.sift(ledger, out, TASKS, Deduplicate()) == facts
    assert {p: p.stat().st_mtime_ns for p in kept} == before
    assert table_of(str(tmp_path), "cut").equals(table_of(str(tmp_path), "whole"))
