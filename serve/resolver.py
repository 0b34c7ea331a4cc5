"""Resolve a request against the model's vocabulary and the recipe's limits: commands, accepted lengths, defaults."""

import time
import uuid
from dataclasses import dataclass, field, replace

from serve import schemas
from serve.drafts import GenerationCost, PromptSpec
from serve.engine_protocol import SampleRequest, SamplingOptions
from serve.request_errors import RequestError
from serve.schemas import ALL_TASKS, ANY_VALUE, LengthRange
from udrl.commands import ANY, Command, CommandVocabulary
from udrl.recipe import Serve

RANGE_MARGIN = 2  # words; a student misses a commanded length by about this much


@dataclass
class ResolvedRequest:
    """A validated request: one spec per task, and the cost so far."""

    intent: str
    specs: list[PromptSpec]
    id: str = field(default_factory=lambda: f"prm-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    cost: GenerationCost = field(default_factory=GenerationCost)

    @property
    def n_prompts(self) -> int:
        return sum(spec.request.n for spec in self.specs)

    def usage(self) -> schemas.Usage:
        usage = schemas.Usage()
        usage.add(self.cost.prompt_tokens, self.cost.completion_tokens, self.cost.drafts)
        return usage


class RequestResolver:
    """Resolves requests for one student; ``settings`` is the recipe's serve section."""

    def __init__(self, vocabulary: CommandVocabulary, settings: Serve) -> None:
        self.vocabulary, self.settings = vocabulary, settings

    def resolve(
        self,
        intent: str,
        fields: schemas.CommandFields,
        n: int,
        options: SamplingOptions,
        *,
        reject_cut: bool = True,
        reject_duplicates: bool = True,
        param: str = "intent",
    ) -> ResolvedRequest:
        """Resolve a request against the model's vocabulary; missing fields become the task's defaults.

        Args:
            param: the key of the request that held the intent.

        Raises:
            RequestError: the task, length, reward, n or intent cannot be served.
        """
        limits = self.settings.limits
        if len(intent) > limits.intent_characters:
            raise RequestError(f"{param}: too long ({len(intent)} characters); use at most {limits.intent_characters}", param)
        if n > limits.prompts:
            raise RequestError(f"n: too many prompts ({n}); ask for at most {limits.prompts}", "n")
        if options.temperature is None:
            options = replace(options, temperature=self.settings.sampling.temperature)
        if options.temperature == 0 and n > 1:
            raise RequestError("n: must be 1 at temperature 0, because all prompts would be equal", "n")
        specs = []
        for task in self._select_tasks(fields):
            command, min_words, max_words = self._choose_command(task, fields)
            request = SampleRequest(intent, command, n, options)
            specs.append(PromptSpec(request, min_words, max_words, reject_cut, reject_duplicates))
        return ResolvedRequest(intent, specs)

    def require_total_within_limit(self, requests: list[ResolvedRequest]) -> None:
        """Check the number of prompts that one HTTP request asks for.

        Raises:
            RequestError: it exceeds ``serve.limits.total``.
        """
        total, limit = sum(request.n_prompts for request in requests), self.settings.limits.total
        if total > limit:
            raise RequestError(
                f"n: too many prompts over all intents and tasks ({total}); ask for at most {limit} per request", "n"
            )

    def _select_tasks(self, fields: schemas.CommandFields) -> list[str]:
        model_tasks = list(self.vocabulary.tasks)
        names = ", ".join(model_tasks)
        if fields.task is None:
            if len(model_tasks) > 1:
                raise RequestError(f"task: must be given; use one or more of {names}, or {ALL_TASKS!r}", "task")
            return model_tasks
        if fields.task == ALL_TASKS:
            return model_tasks
        tasks = [fields.task] if isinstance(fields.task, str) else fields.task
        if not tasks:
            raise RequestError(f"task: the list is empty; use one or more of {names}", "task")
        if len(set(tasks)) < len(tasks):
            raise RequestError("task: a task is listed twice; list each once", "task")
        if not set(tasks) <= set(model_tasks):
            raise RequestError(f"task: this model does not have the task; use one of {names}", "task")
        return tasks

    def _choose_command(self, task: str, fields: schemas.CommandFields) -> tuple[Command, int | None, int | None]:
        """Return the command for the student and the accepted range of words (None, None: any length)."""
        default = self.vocabulary.default(task)
        min_words, max_words = self._check_length(fields.length)
        words = default.words
        if fields.length == ANY_VALUE:
            words = ANY
        elif min_words is not None and max_words is not None:
            # Command a length a little inside the range, as near to the usual length as possible.
            margin = min(RANGE_MARGIN, (max_words - min_words) // 2)
            usual = default.words if default.words != ANY else min_words
            words = min(max(usual, min_words + margin), max_words - margin)
        return (
            Command(task=task, words=words, reward=self._choose_reward_bin(default.reward, fields.reward)),
            min_words,
            max_words,
        )

    def _check_length(self, length: schemas.Length) -> tuple[int | None, int | None]:
        if isinstance(length, LengthRange):
            bounds = {"length.max": length.max, "length.min": length.min}
        elif isinstance(length, int):
            bounds = {"length": length}
        else:
            return None, None
        for param, words in bounds.items():
            if not 1 <= words <= self.vocabulary.max_words:
                raise RequestError(f"{param}: out of range ({words} words); use 1..{self.vocabulary.max_words}", param)
        return min(bounds.values()), max(bounds.values())

    def _choose_reward_bin(self, default: int, reward: schemas.Reward) -> int:
        if reward is None:
            return default
        if reward == ANY_VALUE:
            return ANY
        if not 0 <= reward < self.vocabulary.reward_bins:
            raise RequestError(f"reward: not a reward bin ({reward}); use 0..{self.vocabulary.reward_bins - 1}", "reward")
        return reward
