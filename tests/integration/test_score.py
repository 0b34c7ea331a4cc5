"""Scoring a ledger on a local Ray: three passes, each of which resumes and gives the same rows wherever it was killed."""

import json
import math
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ray import cloudpickle

from benchmarks.dummy_engine import DummyEngine
from udrl import storage
from udrl.context import StageContext
from udrl.episodes import COMPLETIONS, EPISODES, REJECTS
from udrl.errors import UserError
from udrl.hashing import stable_id
from udrl.policies.ledger import list_parts, part_name
from udrl.recipe import Deduplicate, Rewards, RubricJudge
from udrl.run import Manifest, ScoringPaths
from udrl.scoring.filtering import FILTERED, filter_completions, filter_inputs, filter_shards, shard_file, start_deduplicator
from udrl.scoring.rubric import judge_relevance
from udrl.scoring.score import ScoringResult, score
from udrl.tasks import Example, Format, Task

pytestmark = pytest.mark.usefixtures("local_ray")
# Ray's workers cannot import the module of the engines below.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

EXAMPLES = [Example(intent=f"thing {i}", prompt=f"a thing number {i} in light") for i in range(3)]
TASKS = [
    Task(name=name, title=name, instruction="Write.", examples=EXAMPLES, format=Format(min_words=3, max_words=20))
    for name in ("paint", "find")
]
SHARDS, INTENTS, SAMPLES = 8, 3, 2
WORDS = "red fox snow light owl jazz poster bold soft night wide shot paper texture warm quiet forest gold blue".split()  # noqa: SIM905


def write_ledger(uri: str, seed: int = 0, shards: int = SHARDS) -> int:
    """Write completions of every kind, with many repeated prompts; return the number of requested prompts."""
    rng = np.random.default_rng(seed)
    prompts = [" ".join(rng.permutation(WORDS)[:9]) for _ in range(16)]
    requested = 0
    for shard in range(shards):
        rows = []
        for i in range(INTENTS):
            intent_id = shard * INTENTS + i
            for task in TASKS:
                for variation in range(SAMPLES):
                    texts = [str(rng.choice(prompts)) + ("" if rng.random() < 0.5 else " !") for _ in range(3)]
                    kind = int(rng.integers(6))
                    whole = json.dumps({"prompts": texts})
                    row = {"prompts": 3, "completion": whole} if kind == 0 else {"prompts": 1, "completion": texts[0]}
                    row |= {"completion": whole[:70]} if kind == 0 and variation else {}
                    row |= {"completion": ""} if kind == 1 else {}
                    row |= {"error": "boom", "finish_reason": "error", "completion": ""} if kind == 2 else {}
                    rows.append(blank() | {"finish_reason": "stop", "variation": 10 * variation, "task": task.name} | row)
                    rows[-1] |= {"intent_id": intent_id, "intent": f"poster of a fox {intent_id}"}
                    rows[-1]["episode_id"] = stable_id(seed, intent_id, task.name, variation)
                    requested += int(row["prompts"])
        rng.shuffle(rows)  # type: ignore[arg-type]
        for part in (rows[:5], rows[5:], rows[4:6]):  # a retried task wrote two rows again
            table = pa.Table.from_pylist(part, schema=COMPLETIONS)
            storage.write_table(storage.join(uri, part_name(shard, table)), table)
    return requested


def blank() -> dict[str, Any]:
    empty: dict[str, Any] = {"string": "", "int64": 0, "int32": -1}
    return {f.name: empty.get(str(f.type), []) for f in COMPLETIONS}


def table_of(folder: str) -> pa.Table:
    return pa.concat_tables(storage.iter_tables(folder))


def times(*folders: str) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for folder in folders for p in Path(folder).iterdir()}


@dataclass(frozen=True)
class Scored:
    """A ledger, the folders that were made from it, and the result."""

    ledger: str
    paths: ScoringPaths
    requested: int
    result: ScoringResult

    def copy_to(self, folder: Path) -> ScoringPaths:
        shutil.copytree(self.paths.folder, folder)
        return ScoringPaths(str(folder))


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    folder = tmp_path_factory.mktemp("score")
    ledger, paths = str(folder / "completions" / "abc"), ScoringPaths(str(folder / "run"))
    requested = write_ledger(ledger)
    return Scored(ledger, paths, requested, score(ledger, paths, TASKS, Rewards()))


def test_every_requested_prompt_is_an_episode_or_a_reject(scored: Scored) -> None:
    result = scored.result
    episodes, rejects = table_of(scored.paths.episodes), table_of(scored.paths.rejects)
    assert episodes.schema.equals(EPISODES)
    assert rejects.schema.equals(REJECTS)
    ids = episodes["episode_id"].to_pylist() + rejects["episode_id"].to_pylist()
    assert len(set(ids)) == len(ids) == scored.requested == result.total
    assert result.accepted == episodes.num_rows
    assert result.reasons == Counter(rejects["reason"].to_pylist())
    assert {"empty", "engine_error", "missing", "duplicate", "near_duplicate"} <= set(result.reasons)
    copies = Counter(zip(episodes["task"].to_pylist(), episodes["prompt"].to_pylist(), strict=True))
    assert max(copies.values()) == 1
    assert all(0 <= r <= 1 for r in episodes["reward"].to_pylist())


def test_a_finished_pass_is_not_repeated(scored: Scored) -> None:
    paths = scored.paths
    folders = (paths.filtered, paths.relevance, paths.episodes, paths.rejects)
    before = times(*folders)
    placement = {"placement": {"cpus": 2, "threads": 1}, "batch_size": 3}  # must not matter
    assert score(scored.ledger, paths, TASKS, Rewards.model_validate(placement)) == scored.result
    assert times(*folders) == before


def test_a_run_scored_by_an_earlier_version_is_not_scored_again(scored: Scored, tmp_path: Path) -> None:
    paths = scored.copy_to(tmp_path / "run")
    rename_files_as_before_2026_11_25(paths)
    before = times(paths.sifted, paths.relevance, paths.episodes, paths.rejects)
    assert score(scored.ledger, paths, TASKS, Rewards()) == scored.result
    assert times(paths.sifted, paths.relevance, paths.episodes, paths.rejects) == before
    assert not storage.exists(paths.filtered)


def test_new_weights_keep_the_relevance_of_an_earlier_version(scored: Scored, tmp_path: Path) -> None:
    paths = scored.copy_to(tmp_path / "run")
    rename_files_as_before_2026_11_25(paths)
    before = times(paths.relevance)
    novel = Rewards.model_validate({"weights": {"relevance": 0, "novelty": 1, "repetition": 0, "format": 0}})
    assert score(scored.ledger, paths, TASKS, novel).accepted == scored.result.accepted
    assert times(paths.relevance) == before
    assert table_of(paths.filtered).equals(table_of(scored.paths.filtered))
    assert not storage.exists(paths.sifted), "its successor is complete"


def rename_files_as_before_2026_11_25(paths: ScoringPaths) -> None:
    shutil.move(paths.filtered, paths.sifted)
    for folder in (paths.sifted, paths.relevance, paths.episodes, paths.rejects):
        manifest = Manifest.load_from(folder)
        assert manifest
        about = manifest.inputs | ({"fingerprint": manifest.fingerprint} if folder == paths.sifted else {})
        storage.write_json(storage.join(folder, "about.json"), about)
        storage.remove(storage.join(folder, "manifest.json"))


def test_new_weights_and_preferences_repeat_only_the_last_pass(scored: Scored, tmp_path: Path) -> None:
    paths = scored.copy_to(tmp_path / "run")
    before = times(paths.filtered, paths.relevance)
    novel = Rewards.model_validate({"weights": {"relevance": 0, "novelty": 1, "repetition": 0, "format": 0}})
    tasks = [t.model_copy(update={"format": t.format.model_copy(update={"prefer": ["fox"]})}) for t in TASKS]
    result = score(scored.ledger, paths, tasks, novel)
    assert (result.accepted, result.reasons) == (scored.result.accepted, scored.result.reasons)
    assert result.fingerprint != scored.result.fingerprint
    assert times(paths.filtered, paths.relevance) == before
    episodes = table_of(paths.episodes)
    assert episodes["reward"].to_pylist() == pytest.approx(episodes["novelty"].to_pylist())
    assert set(episodes["format"].to_pylist()) == {0.0, 1.0}


@pytest.mark.parametrize("lost", [{0}, {3, 4}, {1, 5, 7}, set(range(2, SHARDS))])
def test_a_run_that_was_killed_anywhere_ends_with_the_same_rows(scored: Scored, tmp_path: Path, lost: set[int]) -> None:
    """Shards are written in parallel, so a kill may leave any of them missing, in any of the folders."""
    paths = scored.copy_to(tmp_path / "run")
    for i, shard in enumerate(sorted(lost)):
        incomplete = [
            (paths.filtered, paths.relevance, paths.episodes, paths.rejects),
            (paths.relevance, paths.rejects),
            (paths.filtered, paths.rejects),
        ]
        for folder in incomplete[i % 3]:
            Path(folder, shard_file(shard)).unlink()
    assert score(scored.ledger, paths, TASKS, Rewards()) == scored.result
    for name in ("filtered", "episodes", "rejects"):
        assert table_of(getattr(paths, name)).equals(table_of(getattr(scored.paths, name)))


def test_changed_rules_never_mix_with_old_rows(scored: Scored, tmp_path: Path) -> None:
    paths = scored.copy_to(tmp_path / "run")
    exact = Rewards(deduplicate=Deduplicate(near=None))
    without_near = score(scored.ledger, paths, TASKS, exact)
    assert without_near.total == scored.requested
    assert "near_duplicate" not in without_near.reasons
    assert without_near.accepted > scored.result.accepted
    everything = score(scored.ledger, paths, TASKS, exact, deduplicate=False)
    assert everything.accepted > without_near.accepted
    assert "duplicate" not in everything.reasons
    assert everything.total == scored.requested


def test_prompts_of_an_earlier_round_are_duplicates(scored: Scored, tmp_path: Path) -> None:
    ledger = str(tmp_path / "completions" / "next")
    requested = write_ledger(ledger, seed=0)  # the same texts as in the earlier round
    again = score(ledger, ScoringPaths(str(tmp_path / "run")), TASKS, Rewards(), earlier=[scored.paths.episodes])
    assert again.accepted == 0
    assert again.total == requested


def test_when_the_deduplicator_dies_finished_shards_are_kept(tmp_path: Path) -> None:
    import ray

    ledger, cut, whole = str(tmp_path / "ledger"), ScoringPaths(str(tmp_path / "cut")), ScoringPaths(str(tmp_path / "whole"))
    write_ledger(ledger, shards=40)
    parts, config = list_parts(ledger), Deduplicate()
    filter_completions(ledger, whole, TASKS, config)
    Manifest.of(filter_inputs(ledger, parts, TASKS, config, [])).claim(cut.filtered)
    deduplicator = start_deduplicator(ledger, parts, [], config)
    steps = filter_shards(ledger, cut.filtered, parts, set(parts), TASKS, deduplicator, config.near, [])
    next(steps)
    ray.kill(deduplicator)
    with pytest.raises(UserError, match="deduplication: the actor died"):
        list(steps)
    finished = list(Path(cut.filtered).glob("part-*"))
    assert 0 < len(finished) < 40
    before = {p: p.stat().st_mtime_ns for p in finished}
    filter_completions(ledger, cut, TASKS, config)
    assert {p: p.stat().st_mtime_ns for p in finished} == before
    assert table_of(cut.filtered).equals(table_of(whole.filtered))


class Undecided(DummyEngine):
    """A judge that says 9 with a tenth of probability for each owl, and something else with a probability of 0.4."""

    async def answer(self, row: dict[str, Any]) -> dict[str, Any]:
        nine = int(row["intent"].split()[3]) / 10
        answer = await super().answer(row)
        return answer | {"top_tokens": ["9", " 1", "x"], "top_logprobs": [math.log(nine), math.log(0.6 - nine), math.log(0.4)]}


class NoEngine(DummyEngine):
    """Fail when it starts."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise AssertionError("an engine was started")


def test_a_rubric_judge_scores_each_candidate_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With a dummy engine; test_judging.py has the same judge with vLLM."""
    filtered, out = str(tmp_path / "filtered"), str(tmp_path / "out")
    for shard in range(2):
        table = [
            {f.name: {"string": "", "int64": 0, "int32": 0}[str(f.type)] for f in FILTERED}
            | {"episode_id": 10 * shard + i, "intent": f"a poster of {i} owls", "task": TASKS[0].name}
            | {"prompt": f"{i} owls on a branch, moonlight, woodcut", "reason": "" if i else "echo"}
            for i in range(4)
        ]
        storage.write_table(storage.join(filtered, f"part-{shard:08d}.parquet"), pa.Table.from_pylist(table, schema=FILTERED))
    judge_relevance(filtered, out, RubricJudge(), TASKS, StageContext(engine_actor=Undecided))
    scored = {name: storage.read_table(storage.join(out, name)) for name in storage.list_files(out)}
    assert [table["episode_id"].to_pylist() for table in scored.values()] == [[1, 2, 3], [11, 12, 13]]
    for table in scored.values():
        # Expectations over 9 and 1, mapped to 0..1, not samples.
        assert table["relevance"].to_pylist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert "6 judgments; parse failures 0.0%" in capfd.readouterr().err
    storage.remove(storage.join(out, "part-00000001.parquet"))
    judge_relevance(filtered, out, RubricJudge(), TASKS, StageContext(engine_actor=NoEngine))
    assert storage.read_table(storage.join(out, "part-00000001.parquet")).equals(scored["part-00000001.parquet"])
