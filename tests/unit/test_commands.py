"""Commands: control tokens, and the file that is saved with the model."""

from pathlib import Path

import pytest
from fakes.fake_vocabulary import fake_vocabulary
from pydantic import ValidationError

from udrl.commands import ANY, Command, CommandVocabulary


def test_control_tokens_are_distinct_and_cover_every_command() -> None:
    vocabulary = fake_vocabulary()
    tokens = vocabulary.control_tokens()
    assert len(tokens) == len(set(tokens))
    for words in (ANY, 1, 16):
        for reward in (ANY, 0, 4):
            assert set(vocabulary.tokens(Command(task="find", words=words, reward=reward))) <= set(tokens)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (Command(task="sing"), "sing"),
        (Command(task="find", words=17), "17"),
        (Command(task="find", words=0), "0"),
        (Command(task="find", reward=5), "5"),
    ],
)
def test_a_command_outside_the_vocabulary_is_refused_by_name(command: Command, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        fake_vocabulary().tokens(command)


def test_numbers_below_any_are_not_commands() -> None:
    with pytest.raises(ValidationError):
        Command(task="find", words=-2)


def test_the_default_command_is_in_distribution() -> None:
    default = fake_vocabulary().default("paint")
    assert default.reward == 4
    assert 3 <= default.words <= 16


@pytest.mark.parametrize("objective", ["sft", "sft_top"])
def test_students_without_hindsight_get_only_the_task_as_default_command(objective: str) -> None:
    vocabulary = fake_vocabulary(objective=objective)
    assert vocabulary.default("paint") == Command(task="paint", words=ANY, reward=ANY)
    assert vocabulary.control_tokens() == fake_vocabulary().control_tokens()  # the same tokenizer serves every objective


def test_a_saved_vocabulary_loads_unchanged(tmp_path: Path) -> None:
    vocabulary = fake_vocabulary()
    vocabulary.save(str(tmp_path))
    assert CommandVocabulary.load(str(tmp_path)) == vocabulary
