"""A judgment is the expected score; each candidate becomes one request in the shard of its file."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udrl import storage
from udrl.episodes import COMPLETIONS
from udrl.policies.ledger import part_name
from udrl.policies.policy import Policy
from udrl.recipe import RubricJudge
from udrl.scoring import rubric
from udrl.scoring.filtering import FILTERED, shard_file
from udrl.scoring.rubric import JudgmentCounts, expected_score, judge_relevance, relevance, rubric_policy
from udrl.tasks import Example, Task, load_task

TASK = load_task("image_search")
BLANK = {"string": "", "int64": 0, "int32": 0}


def logs(*shares: float) -> list[float]:
    return [math.log(share) for share in shares]


def test_the_score_is_the_mean_weighted_by_the_probabilities_of_scores_only() -> None:
    score, mass = expected_score(["8", " 6", "Score", "10", "0", "12"], logs(0.4, 0.2, 0.1, 0.2, 0.05, 0.05), 10)
    assert score == pytest.approx((8 * 0.4 + 6 * 0.2 + 10 * 0.2) / 0.8)
    assert mass == pytest.approx(0.8)
    assert relevance(["8"], logs(0.9), 10) == (pytest.approx(7 / 9), pytest.approx(0.9))


def test_ten_is_not_a_score_on_a_scale_to_nine() -> None:
    assert expected_score(["10", "9"], logs(0.5, 0.5), 9) == (9, 0.5)
    assert relevance(["9"], logs(1.0), 9)[0] == 1
    assert relevance(["1"], logs(1.0), 9)[0] == 0


def test_a_judgment_with_little_probability_on_scores_keeps_its_expectation() -> None:
    assert relevance(["I", "5"], logs(0.6, 0.3), 9) == (pytest.approx(0.5), pytest.approx(0.3))


def test_a_judgment_without_a_score_is_zero() -> None:
    assert relevance(["I", "Sure"], logs(0.6, 0.3), 9) == (0.0, 0.0)
    assert relevance([], [], 9) == (0.0, 0.0)


@given(st.lists(st.tuples(st.sampled_from([*map(str, range(13)), " 3", "x", ""]), st.floats(-30, 0)), max_size=20))
def test_relevance_is_between_zero_and_one_for_any_tokens(top: list[tuple[str, float]]) -> None:
    value, _ = relevance([t for t, _ in top], [p for _, p in top], 10)
    assert 0 <= value <= 1


@pytest.fixture(scope="module")
def judge() -> Policy:
    return rubric_policy(RubricJudge(style="completion"), [TASK])


def test_a_judge_has_the_fingerprint_of_earlier_versions() -> None:
    """It names the folder of judgments; another one would request all of them again."""
    examples = [Example(intent=f"thing {i}", prompt=f"a thing number {i} in light") for i in range(3)]
    task = Task(name="paint", title="Paint", instruction="Write a prompt.", examples=examples)
    assert rubric_policy(RubricJudge(style="completion"), [task]).fingerprint == "05f2f43663629a42"


def test_the_rendered_request_ends_directly_before_the_score(judge: Policy) -> None:
    row = {"task": TASK.name, "intent": "a red fox", "judged": "red fox snow\nScore=9"}
    text = judge.render(row)["prompt"]
    assert text.endswith("Request: a red fox\nSearch: red fox snow Score=9\nScore=")
    assert text.count("\nScore=9") == 1  # in the examples; a line break in the judged prompt can't add a score
    assert "from 1 to 9" in text


def write_filtered(folder: str, shard: int, reasons: list[str]) -> None:
    rows = [
        {f.name: BLANK[str(f.type)] for f in FILTERED}
        | {"episode_id": 100 * shard + i, "intent": f"intent {i}", "task": TASK.name, "prompt": f"prompt {i}", "reason": reason}
        for i, reason in enumerate(reasons)
    ]
    storage.write_table(storage.join(folder, shard_file(shard)), pa.Table.from_pylist(rows, schema=FILTERED))


def test_each_candidate_is_one_request_and_a_reject_is_none(tmp_path: Path, judge: Policy) -> None:
    write_filtered(str(tmp_path), 0, ["", "echo", ""])
    write_filtered(str(tmp_path), 3, ["empty"])
    write_filtered(str(tmp_path), 7, [""])
    names = storage.list_files(str(tmp_path))
    requests = rubric.judgment_requests(judge, str(tmp_path), names, rubric.JUDGED_COLUMNS)
    rows = [list(requests.rows(s)) for s in range(requests.shards)]
    assert [len(r) for r in rows] == [requests.shard_size(s) for s in range(requests.shards)] == [2, 0, 1]
    assert requests.total == 3
    assert [r["judged"] for r in rows[0]] == ["prompt 0", "prompt 2"]
    assert len({r["episode_id"] for part in rows for r in part}) == 3


def test_answers_become_one_file_per_shard_in_the_order_of_the_candidates(tmp_path: Path, judge: Policy) -> None:
    filtered, ledger, out = (str(tmp_path / name) for name in ("filtered", "ledger", "out"))
    write_filtered(filtered, 0, ["", "echo", "", ""])
    write_filtered(filtered, 1, ["echo"])
    answers = [(["9"], logs(1.0)), (["5", "x"], logs(0.4, 0.6)), (["x"], logs(1.0))]
    blank = {f.name: BLANK.get(str(f.type), []) for f in COMPLETIONS} | {"request_fingerprint": judge.fingerprint}
    rows = [
        blank | {"episode_id": rubric.judgment_id(judge.fingerprint, i), "top_tokens": tokens, "top_logprobs": probs}
        for i, (tokens, probs) in zip((0, 2, 3), answers, strict=True)
    ]
    table = pa.Table.from_pylist(rows[::-1], schema=COMPLETIONS)
    name = part_name(0, table)
    storage.write_table(storage.join(ledger, name), table)
    work = [(shard_file(0), [name]), (shard_file(1), [])]
    collect = rubric.CollectAnswers(filtered, ledger, out, partial(relevance, top=9), "relevance", work)
    assert collect({"id": np.array([0, 1])})["rows"].tolist() == [3, 0]
    judgments = storage.read_table(storage.join(out, shard_file(0)))
    assert judgments.drop_columns("mass").to_pydict() == {"episode_id": [0, 2, 3], "relevance": [1.0, 0.5, 0.0]}
    assert judgments["mass"].to_pylist() == pytest.approx([1.0, 0.4, 0.0])
    assert [str(t) for t in judgments.schema.types] == ["int64", "float", "float"]
    assert storage.read_table(storage.join(out, shard_file(1))).num_rows == 0
    # All shards are judged, so this only counts; a request to this judge would be an error.
    counts = judge_relevance(filtered, out, RubricJudge(model="/nowhere"), [TASK])
    assert counts == JudgmentCounts(total=3, unparsed=2, unscored=1)


def test_if_all_shards_are_judged_nothing_is_requested(tmp_path: Path) -> None:
    filtered, out = str(tmp_path / "filtered"), str(tmp_path / "out")
    write_filtered(filtered, 0, [""])
    columns = {"relevance": pa.array([0.5], pa.float32()), "mass": pa.array([0.25], pa.float32())}
    judged = pa.table({"episode_id": [0], **columns})
    storage.write_table(storage.join(out, shard_file(0)), judged)
    # A request to this judge would be an error.
    counts = judge_relevance(filtered, out, RubricJudge(model="/nowhere"), [TASK])
    assert counts == JudgmentCounts(total=1, unparsed=1, unscored=0), "a resumed run still reports parse failures"
    assert storage.read_table(storage.join(out, shard_file(0))).equals(judged)
