"""From the replay buffer to packed rows, on a real local Ray."""

import hashlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from fakes.fake_episodes import fill_with_episodes

from udrl import tokenizer
from udrl.commands import ANY, Command, CommandVocabulary
from udrl.errors import UserError
from udrl.recipe import Recipe, from_values
from udrl.run import EpisodeSource, PackedDataPaths, PackedDataSummary, Run, ValidationIntents
from udrl.train import packed_data
from udrl.train.packing import Batch
from udrl.train.replay_buffer import select_share

TASKS = ["text_to_image", "image_search"]
Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")
INTENTS, EPISODES = 120, 240  # of the three files that fill_with_episodes writes


def recipe(run: str, **sections: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {"name": "test", "storage": run, "tasks": TASKS, "intents": {"limit": INTENTS}, "seed": 4}
    student = {"depth": 1, "vocab_size": 500, "context": 96, "lowercase": True}
    train = {"validation": 0.2, "batch_tokens": 192}
    values |= {"student": student | sections.pop("student", {}), "train": train | sections.pop("train", {})}
    return from_values(values | sections, "test")


def prepare(
    run: str,
    out: Path,
    start: str | None = None,
    keep: Sequence[float] = (1.0,),
    pack_together: int = packed_data.PACK_TOGETHER,
    **sections: Any,
) -> PackedDataSummary:
    """Write rows under ``out``; the run's episodes are in the buffer as often as ``keep`` has entries."""
    paths = PackedDataPaths(str(out))
    sources = [EpisodeSource(folder=Run(run).scoring.episodes, keep=share) for share in keep]
    packed_data.prepare_packed_data(recipe(run, **sections), sources, paths, TASKS, start, pack_together)
    return PackedDataSummary.load(paths.summary)


def n_rows(out: Path, split: Split) -> int:
    return len(packed_data.load_packed_rows(PackedDataPaths(str(out)), split))


def rows(out: Path, split: Split = "train") -> Batch:
    loaded = packed_data.load_packed_rows(PackedDataPaths(str(out)), split)
    return loaded.take(np.arange(len(loaded)))


def sequences(out: Path, split: Split = "train") -> list[tuple[int, ...]]:
    """Return the examples of the packed rows, sorted."""
    pad = tokenizer.load_tokenizer(str(out / "tokenizer")).pad_token_id
    batch = rows(out, split)
    examples = []
    for ids, positions in zip(batch.tokens, batch.positions, strict=True):
        ends = [*np.flatnonzero(positions == 0)[1:], len(ids)]
        begin = 0
        for end in ends:
            if ids[begin] != pad:
                examples.append(tuple(ids[begin:end].tolist()))
            begin = end
    return sorted(examples)


def read_files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.*")) if p.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> tuple[str, Path]:
    """Return a run and the folder with the rows of its episodes under the plain recipe."""
    run, out = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("out")
    fill_with_episodes(str(run))
    prepare(str(run), out)
    return str(run), out


def test_rows_are_the_same_to_the_byte_however_many_tasks_run_at_once(
    prepared: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.data import DataContext, ExecutionResources

    run, _ = prepared
    options = DataContext.get_current().execution_options
    for cpus in (1, 3):
        monkeypatch.setattr(options, "resource_limits", ExecutionResources.for_limits(cpu=cpus))
        # Three tasks, which end in any order on three CPUs.
        prepare(run, tmp_path / str(cpus), pack_together=200, train={"swapped_copies": 1})
    assert len(list((tmp_path / "1" / "train").iterdir())) == 3
    assert read_files(tmp_path / "1") == read_files(tmp_path / "3")


def test_every_episode_is_trained_or_validated_on_and_counted(prepared: tuple[str, Path]) -> None:
    _, out = prepared
    summary = PackedDataSummary.load(PackedDataPaths(str(out)).summary)
    train, validation = sequences(out), sequences(out, "validation")
    assert len(train) + len(validation) == summary.episodes == EPISODES
    assert summary.trained == len(train)
    assert summary.tokens == sum(map(len, train))
    assert summary.rows == summary.budget_rows == n_rows(out, "train")
    assert summary.validation_rows == n_rows(out, "validation") > 0
    assert summary.padding == pytest.approx(1 - summary.tokens / (summary.rows * 96))
    assert summary.padding < 0.02
    assert summary.dropped == 0


def test_the_saved_validation_intents_are_not_trained_on(prepared: tuple[str, Path]) -> None:
    _, out = prepared
    saved = ValidationIntents.load(PackedDataPaths(str(out)).validation_intents).intents
    student_tokenizer, vocabulary = (
        tokenizer.load_tokenizer(str(out / "tokenizer")),
        CommandVocabulary.load(str(out / "tokenizer")),
    )
    assert {entry.task for entry in saved} == set(TASKS)
    assert len({(entry.task, entry.intent) for entry in saved}) == len(saved)
    assert all(0 < sum(entry.task == task for entry in saved) <= 32 for task in TASKS)
    train, validation = sequences(out), sequences(out, "validation")
    for entry in saved:
        request = tokenizer.encode_request(student_tokenizer, vocabulary, entry.intent, Command(task=entry.task))
        begin = tuple(request[:-2])  # intent and task
        assert any(ids[: len(begin)] == begin for ids in validation)
        assert not any(ids[: len(begin)] == begin for ids in train)


def test_a_killed_preparation_is_started_over(prepared: tuple[str, Path], tmp_path: Path) -> None:
    run, out = prepared
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    (tmp_path / "done.json").unlink()  # it is written last
    (tmp_path / "train" / "rows-000099.arrow").write_bytes(b"of the killed attempt")
    with pytest.raises(UserError, match=r"done\.json"):
        packed_data.load_packed_rows(PackedDataPaths(str(tmp_path)), "train")
    prepare(run, tmp_path)
    assert read_files(tmp_path) == read_files(out)


@pytest.mark.parametrize(
    ("rows_hash", "options"),
    [
        ("109f3848efa8049c", {}),
        ("a5a96924cb4631e9", {"train": {"swapped_copies": 1}}),
        ("79f9f8d0c1456d28", {"train": {"objective": "sft_top", "top_share": 0.3}}),
        ("668037bf9c00830e", {"keep": (1.0, 0.4), "commands": {"rank_within": "intent"}}),
    ],
)
@pytest.mark.usefixtures("local_ray")
def test_rows_are_those_of_earlier_versions(tmp_path: Path, rows_hash: str, options: dict[str, Any]) -> None:
    """A student's training data must not change under it; these hashes were computed with the version of 2026-11-25."""
    fill_with_episodes(str(tmp_path / "run"), rare_subjects=True)
    prepare(str(tmp_path / "run"), tmp_path / "out", **options)
    digest = hashlib.sha256()
    for split in SPLITS:
        batch = rows(tmp_path / "out", split)
        for array in (batch.tokens, batch.positions, batch.targets):
            digest.update(array.tobytes())
    assert digest.hexdigest()[:16] == rows_hash


@pytest.mark.usefixtures("local_ray")
def test_copies_of_an_episode_are_spread_over_the_rows(tmp_path: Path) -> None:
    fill_with_episodes(str(tmp_path / "run"), rare_subjects=True)
    prepare(str(tmp_path / "run"), tmp_path / "out", train={"swapped_copies": 4})
    pieces = tokenizer.load_tokenizer(str(tmp_path / "out" / "tokenizer"))
    # The numbers of an intent and its task name the episode in every copy.
    texts = [pieces.decode(row) for row in rows(tmp_path / "out").tokens]
    episodes = [re.findall(r"poster of an? \S+ (\d+ \d+)\s*<\|(task:\w+)", text) for text in texts]
    assert sum(map(len, episodes)) > 4 * EPISODES * 0.7
    assert sum(len(row) - len(set(row)) for row in episodes) / sum(map(len, episodes)) < 0.04


@pytest.mark.parametrize("objective", ["sft", "sft_top"])
def test_plain_fine_tuning_has_the_same_texts_and_budget_and_commands_only_the_task(
    prepared: tuple[str, Path], tmp_path: Path, objective: str
) -> None:
    run, out = prepared
    udrl = PackedDataSummary.load(PackedDataPaths(str(out)).summary)
    plain = prepare(run, tmp_path, train={"objective": objective, "top_share": 0.3})
    vocabulary = CommandVocabulary.load(str(tmp_path / "tokenizer"))
    student_tokenizer = tokenizer.load_tokenizer(str(tmp_path / "tokenizer"))
    any_ids = tuple(tokenizer.control_ids(student_tokenizer, vocabulary.tokens(Command(task=TASKS[0])))[1:])
    assert vocabulary.default(TASKS[0]) == Command(task=TASKS[0], words=ANY, reward=ANY)
    control = set(tokenizer.control_ids(student_tokenizer, vocabulary.control_tokens()))
    tasks = set(tokenizer.control_ids(student_tokenizer, [vocabulary.tokens(Command(task=task))[0] for task in TASKS]))

    def without_commands(ids: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(i for i in ids if i not in control or i in tasks)

    plain_sequences, udrl_sequences = sequences(tmp_path), sequences(out)
    assert all(tuple(i for i in ids if i in control - tasks)[:2] == any_ids for ids in plain_sequences)
    assert plain.budget_rows == udrl.rows
    if objective == "sft":
        assert plain.rows == udrl.rows
        assert sorted(map(without_commands, plain_sequences)) == sorted(map(without_commands, udrl_sequences))
    else:
        assert set(map(without_commands, plain_sequences)) < set(map(without_commands, udrl_sequences))
        assert plain.trained == len(plain_sequences)
        # 0.3 of all episodes; the validation intents may have more or fewer of them
        assert len(plain_sequences) / len(udrl_sequences) == pytest.approx(0.3, abs=0.08)
        assert plain.rows < udrl.rows


def test_a_thinned_source_is_counted_in_full(prepared: tuple[str, Path], tmp_path: Path) -> None:
    run, out = prepared
    single = PackedDataSummary.load(PackedDataPaths(str(out)).summary)
    double = prepare(run, tmp_path, keep=(1.0, 0.4))  # both sources have files of the same names
    assert double.episodes == 2 * EPISODES
    n_validation = EPISODES - single.trained
    assert single.trained < double.trained < 2 * single.trained
    n_selected = select_share(np.arange(EPISODES), 0.4).sum()
    assert n_selected - n_validation <= double.trained - single.trained <= n_selected
    counts = [CommandVocabulary.load(str(folder / "tokenizer")).tasks[TASKS[0]].counts for folder in (out, tmp_path)]
    assert sum(counts[1]) == 2 * sum(counts[0])
    assert [source.keep for source in double.sources] == [1.0, 0.4]


def test_training_that_continues_from_a_student_keeps_its_tokenizer(prepared: tuple[str, Path], tmp_path: Path) -> None:
    run, out = prepared
    student = str(out / "tokenizer")
    more = prepare(run, tmp_path / "more", start=student, student={"vocab_size": 450}, train={"validation": 0.0})
    assert (tmp_path / "more" / "tokenizer" / "tokenizer.json").read_bytes() == (
        out / "tokenizer" / "tokenizer.json"
    ).read_bytes()
    assert more.validation_rows == 0
    assert n_rows(tmp_path / "more", "validation") == 0
    assert ValidationIntents.load(PackedDataPaths(str(tmp_path / "more")).validation_intents).intents == []
    with pytest.raises(UserError, match="reward_bins"):
        prepare(run, tmp_path / "other", start=student, commands={"reward_bins": 3})


def test_a_pretrained_tokenizer_keeps_its_pieces(prepared: tuple[str, Path], tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, PreTrainedTokenizerFast

    run, _ = prepared
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([" poster of a fox in soft light"] * 3, vocab_size=300, special_tokens=["<|endoftext|>"])
    bpe.save(str(tmp_path / "bpe.json"))
    pretrained = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "bpe.json"), eos_token="<|endoftext|>")
    pretrained.save_pretrained(tmp_path / "gpt2")
    GPT2Config(vocab_size=300).save_pretrained(tmp_path / "gpt2")
    summary = prepare(run, tmp_path / "out", student={"init": str(tmp_path / "gpt2"), "context": 160})
    student_tokenizer = tokenizer.load_tokenizer(str(tmp_path / "out" / "tokenizer"))
    text = "a fox in the forest"
    assert tokenizer.encode_text(student_tokenizer, [text]) == tokenizer.encode_text(pretrained, [text])
    assert len(sequences(tmp_path / "out")) == summary.trained
    assert all(ids[-1] == student_tokenizer.eos_token_id for ids in sequences(tmp_path / "out"))


def test_both_passes_rank_alike_within_the_intent(prepared: tuple[str, Path], tmp_path: Path) -> None:
    run, _ = prepared
    prepare(run, tmp_path, commands={"rank_within": "intent", "reward_bins": 2, "dropout": 0}, train={"validation": 0})
    vocabulary = CommandVocabulary.load(str(tmp_path / "tokenizer"))
    student_tokenizer = tokenizer.load_tokenizer(str(tmp_path / "tokenizer"))
    control = {
        task: tokenizer.control_ids(student_tokenizer, [f"<|task:{task}|>", "<|reward:0|>", "<|reward:1|>"]) for task in TASKS
    }
    for task, (task_id, *bins) in control.items():
        of_task = [ids for ids in sequences(tmp_path) if task_id in ids]
        labeled = [sum(b in ids for ids in of_task) for b in bins]
        assert labeled == vocabulary.tasks[task].counts  # the first pass counted the bins that the second one labeled


def test_a_task_without_episodes_is_named(prepared: tuple[str, Path], tmp_path: Path) -> None:
    run, _ = prepared
    sources, paths = [EpisodeSource(folder=Run(run).scoring.episodes)], PackedDataPaths(str(tmp_path))
    with pytest.raises(UserError, match="no episode of text_to_video"):
        packed_data.prepare_packed_data(recipe(run), sources, paths, [*TASKS, "text_to_video"])
    with pytest.raises(UserError, match="no episodes"):
        packed_data.prepare_packed_data(recipe(run), [EpisodeSource(folder=str(tmp_path / "absent"))], paths, TASKS)


def test_rows_too_short_for_any_episode_are_a_user_error(prepared: tuple[str, Path], tmp_path: Path) -> None:
    run, _ = prepared
    settings = recipe(run).model_copy(deep=True)
    settings.student.context = 8
    sources = [EpisodeSource(folder=Run(run).scoring.episodes)]
    with pytest.raises(UserError, match=r"student\.context"):
        packed_data.prepare_packed_data(settings, sources, PackedDataPaths(str(tmp_path)), TASKS)
    with pytest.raises(UserError, match=r"train\.validation"):
        prepare(run, tmp_path, keep=[0.0])
