"""Commands: the desired task, length and reward of a prompt, encoded as control tokens.

A training sequence is ``intent, task, words, reward, prompt, <|end|>``: the command stands directly before the text that it
governs. Length is commanded as an exact number of words, because it is free of noise; reward is noisy, so it is commanded as a
quantile bin, 0 being the lowest. The vocabulary, the bin edges, the mean that each bin achieved and the default command are
saved with the model in ``commands.json``. How they are fitted to episodes: :mod:`udrl.train.hindsight`.
"""

import json
import os

from pydantic import BaseModel, ConfigDict, Field

END = "<|end|>"
PAD = "<|pad|>"
ANY = -1  # no preference: the length or reward of an unconditioned request

_FILE_NAME = "commands.json"


class Command(BaseModel):
    """The desired task, length and reward bin; ``words`` and ``reward`` may be :data:`ANY`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    task: str
    words: int = Field(ANY, ge=ANY)
    reward: int = Field(ANY, ge=ANY)


class TaskCommands(BaseModel):
    """One task's reward bins, the outcomes of its training episodes, and its default command."""

    model_config = ConfigDict(extra="forbid")
    edges: list[float] = Field(
        description="reward_bins - 1 inner edges, of reward or of its rank within the intent; a value on an edge lies above it"
    )
    achieved_reward: list[float] = Field(description="mean reward of the training episodes per bin")
    achieved_relevance: list[float] = Field(description="mean relevance of the training episodes per bin")
    counts: list[int] = Field(description="training episodes per bin")
    words: list[int] = Field(description="p5, median, p95 of the training episodes' lengths")
    default_words: int
    default_reward: int


class CommandVocabulary(BaseModel):
    """The control tokens of one student and their meaning."""

    model_config = ConfigDict(extra="forbid")
    version: int = 1
    max_words: int
    reward_bins: int
    rank_within: str
    lowercase: bool = False
    objective: str = Field("udrl", description="training objective; only 'udrl' students follow length and reward commands")
    tasks: dict[str, TaskCommands]

    def control_tokens(self) -> list[str]:
        """Return all control tokens in the order of their ids."""
        words = [word_token(n) for n in [ANY, *range(1, self.max_words + 1)]]
        rewards = [reward_token(b) for b in [ANY, *range(self.reward_bins)]]
        return [END, PAD, *(task_token(t) for t in self.tasks), *words, *rewards]

    def tokens(self, command: Command) -> list[str]:
        """Return the three control tokens of a command.

        Raises:
            ValueError: the task, length or bin is not in this vocabulary.
        """
        if command.task not in self.tasks:
            raise ValueError(f"task {command.task!r} is not one of {', '.join(self.tasks)}")
        if command.words > self.max_words or command.words == 0:
            raise ValueError(f"words {command.words} lies outside 1..{self.max_words}")
        if command.reward >= self.reward_bins:
            raise ValueError(f"reward bin {command.reward} lies outside 0..{self.reward_bins - 1}")
        return [task_token(command.task), word_token(command.words), reward_token(command.reward)]

    def default(self, task: str) -> Command:
        """Return the best in-distribution command of a task; students that follow no other commands get only the task."""
        task_commands = self.tasks[task]
        return Command(task=task, words=task_commands.default_words, reward=task_commands.default_reward)

    def save(self, folder: str) -> None:
        with open(os.path.join(folder, _FILE_NAME), "w", encoding="utf-8") as out:
            json.dump(self.model_dump(), out, indent=2)

    @classmethod
    def load(cls, folder: str) -> "CommandVocabulary":
        with open(os.path.join(folder, _FILE_NAME), encoding="utf-8") as source:
            return cls.model_validate_json(source.read())


def task_token(task: str) -> str:
    return f"<|task:{task}|>"


def word_token(words: int) -> str:
    return f"<|words:{'any' if words == ANY else words}|>"


def reward_token(reward: int) -> str:
    return f"<|reward:{'any' if reward == ANY else reward}|>"
