"""From the buffer to packed rows, on a real local Ray: the same rows everywhere, labels by objective, kept tokenizers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from episodes_made_up import fill_with_episodes

from udrl import storage, tokenizer
from udrl.commands import ANY, Command, CommandVocabulary
from udrl.errors import UserError
from udrl.recipe import Recipe, validate
from udrl.train import dataset
from udrl.train.packing import Batch
from udrl.train.replay_buffer import Source, kept

TASKS = ["text_to_image", "image_search"]
INTENTS, EPISODES = 120, 240  # of conftest's three files


def recipe(run: str, **sections: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {"name": "test", "storage": run, "tasks": TASKS, "intents": {"limit": INTENTS}, "seed": 4}
    student = {"depth": 1, "vocab_size": 500, "context": 96, "lowercase": True}
    train = {"validation": 0.2, "batch_tokens": 192}
    values |= {"student": student | sections.pop("student", {}), "train": train | sections.pop("train", {})}
    return validate(values | sections, "test")


def prepare(run: str, out: Path, start: str | None = None, keep: Sequence[float] = (1.0,), **sections: Any) -> dict[str, Any]:
    """Make rows under ``out``, from the run's episodes as often as ``keep`` has entries."""
    sources = [Source(storage.join(run, "episodes"), share) for share in keep]
    dataset.prepare(recipe(run, **sections), sources, str(out), TASKS, start)
    return dataset.facts(str(out))


def rows(out: Path, split: str = "train") -> Batch:
    loaded = dataset.load_rows(str(out), split)
    return loaded.take(np.arange(len(loaded)))


def sequences(out: Path, split: str = "train") -> list[tuple[int, ...]]:
    """The examples of the packed rows, one by one, sorted."""
    pad = tokenizer.load(str(out / "tokenizer")).pad_token_id
    batch = rows(out, split)
    found = []
    for ids, positions in zip(batch.tokens, batch.positions, strict=True):
        ends = [*np.flatnonzero(positions == 0)[1:], len(ids)]
        begin = 0
        for end in ends:
            if ids[begin] != pad:
                found.append(tuple(ids[begin:end].tolist()))
            begin = end
    return sorted(found)


def files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.*")) if p.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> tuple[str, Path]:
    """A run, and the rows of its episodes under the plain recipe."""
    run, out = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("out")
    fill_with_episodes(str(run))
    prepare(str(run), out)
    return str(run), out


def test_rows_are_the_same_to_the_byte_however_many_tasks_run_at_once(
    made: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.data import DataContext, ExecutionResources

    run, _ = made
    monkeypatch.setattr(dataset, "PACK_TOGETHER", 200)  # three tasks, which end in any order on three CPUs
    options = DataContext.get_current().execution_options
    for cpus in (1, 3):
        monkeypatch.setattr(options, "resource_limits", ExecutionResources.for_limits(cpu=cpus))
        prepare(run, tmp_path / str(cpus), train={"swapped_copies": 1})
    assert len(list((tmp_path / "1" / "train").iterdir())) == 3
    assert files(tmp_path / "1") == files(tmp_path / "3")


def test_every_episode_is_trained_or_validated_on_and_told(made: tuple[str, Path]) -> None:
    _, out = made
    facts = dataset.facts(str(out))
    train, validation = sequences(out), sequences(out, "validation")
    assert len(train) + len(validation) == facts["episodes"] == EPISODES
    assert facts["trained"] == len(train)
    assert facts["tokens"] == sum(map(len, train))
    assert facts["rows"] == facts["budget_rows"] == len(dataset.load_rows(str(out), "train"))
    assert facts["validation_rows"] == len(dataset.load_rows(str(out), "validation")) > 0
    assert facts["padding"] == pytest.approx(1 - facts["tokens"] / (facts["rows"] * 96))
    assert facts["padding"] < 0.02
    assert facts["dropped"] == 0


def test_intents_to_look_at_are_validation_s_own(made: tuple[str, Path]) -> None:
    _, out = made
    held = storage.read_json(str(out / "held.json"))
    words, vocabulary = tokenizer.load(str(out / "tokenizer")), CommandVocabulary.load(str(out / "tokenizer"))
    assert {entry["task"] for entry in held} == set(TASKS)
    assert len({tuple(entry.values()) for entry in held}) == len(held)
    assert all(0 < sum(entry["task"] == task for entry in held) <= 32 for task in TASKS)
    train, validation = sequences(out), sequences(out, "validation")
    for entry in held:
        request = tokenizer.encode_request(words, vocabulary, entry["intent"], Command(task=entry["task"]))
        begin = tuple(request[:-2])  # intent and task
        assert any(ids[: len(begin)] == begin for ids in validation)
        assert not any(ids[: len(begin)] == begin for ids in train)


def test_a_preparation_that_was_killed_is_done_anew(
    made: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = made

    class Killed(Exception):
        pass

    write = storage.write_json

    def die(uri: str, value: Any) -> None:
        if uri.endswith(dataset.DONE):
            raise Killed
        write(uri, value)

    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "rows-000099.arrow").write_bytes(b"of an older attempt")
    with monkeypatch.context() as patched:
        patched.setattr(storage, "write_json", die)
        with pytest.raises(Killed):
            prepare(run, tmp_path)
    with pytest.raises(UserError, match=r"done\.json"):
        dataset.load_rows(str(tmp_path), "train")
    prepare(run, tmp_path)
    assert files(tmp_path) == files(out)


@pytest.mark.parametrize("objective", ["sft", "sft_top"])
def test_plain_fine_tuning_has_the_same_texts_and_budget_and_commands_the_task_alone(
    made: tuple[str, Path], tmp_path: Path, objective: str
) -> None:
    run, out = made
    udrl, plain = dataset.facts(str(out)), prepare(run, tmp_path, train={"objective": objective, "top_share": 0.3})
    vocabulary = CommandVocabulary.load(str(tmp_path / "tokenizer"))
    words = tokenizer.load(str(tmp_path / "tokenizer"))
    any_ids = tuple(tokenizer.control_ids(words, vocabulary.tokens(Command(task=TASKS[0])))[1:])
    assert vocabulary.default(TASKS[0]) == Command(task=TASKS[0], words=ANY, reward=ANY)
    control = set(tokenizer.control_ids(words, vocabulary.control_tokens()))
    tasks = set(tokenizer.control_ids(words, [vocabulary.tokens(Command(task=task))[0] for task in TASKS]))

    def bare(ids: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(i for i in ids if i not in control or i in tasks)

    mine, theirs = sequences(tmp_path), sequences(out)
    assert all(tuple(i for i in ids if i in control - tasks)[:2] == any_ids for ids in mine)
    assert plain["budget_rows"] == udrl["rows"]
    if objective == "sft":
        assert plain["rows"] == udrl["rows"]
        assert sorted(map(bare, mine)) == sorted(map(bare, theirs))
    else:
        assert set(map(bare, mine)) < set(map(bare, theirs))
        assert plain["trained"] == len(mine)
        assert len(mine) / len(theirs) == pytest.approx(0.3, abs=0.08)  # 0.3 of all; which intents are held out is chance
        assert plain["rows"] < udrl["rows"]


def test_a_source_is_thinned_by_its_ids_and_counted_whole(made: tuple[str, Path], tmp_path: Path) -> None:
    run, out = made
    whole = dataset.facts(str(out))
    facts = prepare(run, tmp_path, keep=(1.0, 0.4))  # files of the same names in both
    assert facts["episodes"] == 2 * EPISODES
    held = EPISODES - whole["trained"]
    assert whole["trained"] < facts["trained"] < 2 * whole["trained"]
    of_all = kept(np.arange(EPISODES), 0.4).sum()
    assert of_all - held <= facts["trained"] - whole["trained"] <= of_all
    counts = [CommandVocabulary.load(str(folder / "tokenizer")).tasks[TASKS[0]].counts for folder in (out, tmp_path)]
    assert sum(counts[1]) == 2 * sum(counts[0])
    assert [source["keep"] for source in facts["sources"]] == [1.0, 0.4]


def test_going_on_from_a_student_keeps_its_tokenizer(made: tuple[str, Path], tmp_path: Path) -> None:
    run, out = made
    student = str(out / "tokenizer")
    more = prepare(run, tmp_path / "more", start=student, student={"vocab_size": 450}, train={"validation": 0.0})
    assert (tmp_path / "more" / "tokenizer" / "tokenizer.json").read_bytes() == (
        out / "tokenizer" / "tokenizer.json"
    ).read_bytes()
    assert more["validation_rows"] == 0
    assert len(dataset.load_rows(str(tmp_path / "more"), "validation")) == 0
    assert storage.read_json(str(tmp_path / "more" / "held.json")) == []
    with pytest.raises(UserError, match="reward_bins"):
        prepare(run, tmp_path / "other", start=student, commands={"reward_bins": 3})


def test_a_pretrained_tokenizer_keeps_its_pieces(made: tuple[str, Path], tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, PreTrainedTokenizerFast

    run, _ = made
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([" poster of a fox in soft light"] * 3, vocab_size=300, special_tokens=["<|endoftext|>"])
    bpe.save(str(tmp_path / "bpe.json"))
    pretrained = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "bpe.json"), eos_token="<|endoftext|>")
    pretrained.save_pretrained(tmp_path / "gpt2")
    GPT2Config(vocab_size=300).save_pretrained(tmp_path / "gpt2")
    facts = prepare(run, tmp_path / "out", student={"init": str(tmp_path / "gpt2"), "context": 160})
    words = tokenizer.load(str(tmp_path / "out" / "tokenizer"))
    text = "a fox in the forest"
    assert tokenizer.encode_text(words, [text]) == tokenizer.encode_text(pretrained, [text])
    assert len(sequences(tmp_path / "out")) == facts["trained"]
    assert all(ids[-1] == words.eos_token_id for ids in sequences(tmp_path / "out"))


def test_ranked_within_the_intent_both_passes_agree(made: tuple[str, Path], tmp_path: Path) -> None:
    run, _ = made
    prepare(run, tmp_path, commands={"rank_within": "intent", "reward_bins": 2, "dropout": 0}, train={"validation": 0})
    vocabulary = CommandVocabulary.load(str(tmp_path / "tokenizer"))
    words = tokenizer.load(str(tmp_path / "tokenizer"))
    control = {task: tokenizer.control_ids(words, [f"<|task:{task}|>", "<|reward:0|>", "<|reward:1|>"]) for task in TASKS}
    for task, (task_id, *bins) in control.items():
        mine = [ids for ids in sequences(tmp_path) if task_id in ids]
        labelled = [sum(b in ids for ids in mine) for b in bins]
        assert labelled == vocabulary.tasks[task].counts  # what was counted is what was labelled


def test_a_task_without_episodes_is_named(made: tuple[str, Path], tmp_path: Path) -> None:
    run, _ = made
    sources = [Source(storage.join(run, "episodes"))]
    with pytest.raises(UserError, match="no episode of text_to_video"):
        dataset.prepare(recipe(run), sources, str(tmp_path), [*TASKS, "text_to_video"])
    with pytest.raises(UserError, match="no episodes"):
        dataset.prepare(recipe(run), [Source(str(tmp_path / "nothing"))], str(tmp_path), TASKS)


def test_a_row_too_short_for_any_episode_is_a_user_s_error(made: tuple[str, Path], tmp_path: Path) -> None:
    run, _ = made
    settings = recipe(run).model_copy(deep=True)
    settings.student.context = 8
    with pytest.raises(UserError, match=r"student\.context"):
        dataset.prepare(settings, [Source(storage.join(run, "episodes"))], str(tmp_path), TASKS)
    with pytest.raises(UserError, match=r"train\.validation"):
        prepare(run, tmp_path, keep=[0.0])
