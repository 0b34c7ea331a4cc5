"""Answering requests with an engine: what a request means, its drafts, its deadline, its answer. No Ray, no HTTP here."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from serve import api
from serve.api import ALL, ANYTHING, RequestError, Words
from serve.drafts import Ask, Cost, Draft, Effort, Engine, Event, Grown, PromptSpec, Redrafted, Settled, write
from serve.prometheus import Meters
from udrl.commands import ANY, Command, CommandVocabulary
from udrl.recipe import Serve
from udrl.text import count_words


@dataclass(frozen=True)
class TaskEvent:
    """An event of one task's prompts; ``base`` is the place of the task's first prompt in the whole answer."""

    wanted: PromptSpec
    base: int
    event: Event

    @property
    def index(self) -> int:
        return self.base + self.event.index


@dataclass
class Work:
    """A request, understood: one :class:`PromptSpec` a task, and what it has cost so far."""

    intent: str
    wanted: list[PromptSpec]
    ask: Ask
    id: str = field(default_factory=lambda: f"prm-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    cost: Cost = field(default_factory=Cost)

    @property
    def size(self) -> int:
        return sum(wanted.n for wanted in self.wanted)

    def usage(self) -> api.Usage:
        usage = api.Usage()
        usage.add(self.cost.prompt_tokens, self.cost.completion_tokens, self.cost.drafts)
        return usage


class Service:
    """Answers for one student.

    Args:
        engine: who writes.
        model: the name that clients know it by.
        settings: the recipe's serve section.
    """

    def __init__(self, engine: Engine, model: str, vocabulary: CommandVocabulary, settings: Serve, meters: Meters) -> None:
        self.engine, self.model, self.vocabulary, self.settings, self.meters = engine, model, vocabulary, settings, meters
        redraft, limits = settings.redraft, settings.limits
        self.effort = Effort(redraft.rounds, redraft.samples, limits.prompts, settings.request_timeout_s / 2)
        self.created = int(time.time())

    def understand(
        self,
        intent: str,
        request: api.Commanding,
        n: int,
        sampling: Ask,
        *,
        whole: bool = True,
        distinct: bool = True,
        param: str = "intent",
    ) -> Work:
        """Resolve a request against the model's vocabulary; what it leaves out is the task's default of ``commands.json``.

        Args:
            sampling: ``temperature``, ``seed`` and the like, as far as they were given.
            param: the key that the intent came under.

        Raises:
            RequestError: the task, length, reward, n or intent can't be served.
        """
        limits = self.settings.limits
        if len(intent) > limits.intent_characters:
            raise RequestError(f"{param}: {len(intent)} characters, at most {limits.intent_characters}", param)
        if n > limits.prompts:
            raise RequestError(f"n: {n} prompts, at most {limits.prompts}", "n")
        temperature = sampling.get("temperature", self.settings.sampling.temperature)
        if temperature == 0 and n > 1:
            raise RequestError("n: must be 1 at temperature 0, where every prompt would be the same", "n")
        wanted = [self._wanted(task, request, n, whole, distinct) for task in self._tasks(request)]
        return Work(intent, wanted, {**sampling, "intent": intent, "temperature": temperature})

    def bound(self, works: list[Work]) -> list[Work]:
        """The works of one request, if they do not want too much together.

        Raises:
            RequestError: they do.
        """
        wanted, most = sum(work.size for work in works), self.settings.limits.total
        if wanted > most:
            raise RequestError(f"n: {wanted} prompts over all intents and tasks, at most {most} a request", "n")
        return works

    def _tasks(self, request: api.Commanding) -> list[str]:
        known = list(self.vocabulary.tasks)
        if request.task is None:
            if len(known) > 1:
                raise RequestError(f"task: must be given, one or more of {', '.join(known)}, or {ALL!r}", "task")
            return known
        if request.task == ALL:
            return known
        asked = [request.task] if isinstance(request.task, str) else request.task
        if not asked:
            raise RequestError("task: names no task", "task")
        if len(set(asked)) < len(asked):
            raise RequestError("task: names a task twice", "task")
        if not set(asked) <= set(known):
            raise RequestError(f"task: not one of this model's: {', '.join(known)}", "task")
        return asked

    def _wanted(self, task: str, request: api.Commanding, n: int, whole: bool, distinct: bool) -> PromptSpec:
        vocabulary, length = self.vocabulary, request.length
        default = vocabulary.default(task)
        words, least, most = default.words, None, None
        if length == ANYTHING:
            words = ANY
        elif isinstance(length, Words):
            least, most = length.min, length.max
            # The student misses by a word or two, so it is commanded a little inside of the range, as near its usual as may be.
            margin = min(2, (most - least) // 2)
            words = min(max(default.words if default.words != ANY else least, least + margin), most - margin)
        elif isinstance(length, int):
            words = least = most = length
        for key, asked in (("length.max", most), ("length.min", least)):
            if asked is not None and not 1 <= asked <= vocabulary.max_words:
                param = key if isinstance(length, Words) else "length"
                raise RequestError(f"{param}: {asked} lies outside 1..{vocabulary.max_words} words", param)
        reward = default.reward if request.reward is None else ANY if request.reward == ANYTHING else request.reward
        if request.reward != ANYTHING and request.reward is not None and not 0 <= request.reward < vocabulary.reward_bins:
            raise RequestError(f"reward: {request.reward} lies outside bins 0..{vocabulary.reward_bins - 1}", "reward")
        return PromptSpec(Command(task=task, words=words, reward=reward), n, least, most, whole, distinct)

    async def events(self, work: Work, *, live: bool) -> AsyncGenerator[TaskEvent, None]:
        """All tasks' events as they come. Ends the generation where the iteration is given up.

        Raises:
            RequestError: from the engine, or 504 past the deadline.
        """
        queue: asyncio.Queue[TaskEvent | BaseException | None] = asyncio.Queue()
        deadline = time.monotonic() + self.settings.request_timeout_s

        async def run(wanted: PromptSpec, base: int) -> None:
            try:
                async with contextlib.aclosing(write(self.engine, work.ask, wanted, self.effort, work.cost, live=live)) as made:
                    async for event in made:
                        queue.put_nowait(TaskEvent(wanted, base, event))
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        bases = [sum(wanted.n for wanted in work.wanted[:place]) for place in range(len(work.wanted))]
        running = [asyncio.create_task(run(wanted, base)) for wanted, base in zip(work.wanted, bases, strict=True)]
        left, done = len(running), False
        try:
            while left:
                try:
                    item = await asyncio.wait_for(queue.get(), max(deadline - time.monotonic(), 0))
                except TimeoutError:
                    raise RequestError(
                        f"not answered within {self.settings.request_timeout_s:g} s; ask for less or try later",
                        None,
                        504,
                        "timeout",
                    ) from None
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                    continue
                self._count(item)
                yield item
            done = True
        finally:
            for task in running:
                task.cancel()
            self.meters.tokens(work.cost.prompt_tokens, work.cost.completion_tokens)
            if not done:
                self.meters.cancelled()
                # What is cancelled must have told the engine so before this returns.
                await asyncio.gather(*running, return_exceptions=True)

    async def prompts(self, work: Work) -> api.PromptsResponse:
        """The whole answer at once. Raises as :meth:`events`."""
        settled = {
            item.index: self.prompt(item) async for item in self.events(work, live=False) if isinstance(item.event, Settled)
        }
        return api.PromptsResponse(
            id=work.id,
            created=work.created,
            model=self.model,
            revision=work.cost.revision,
            intent=work.intent,
            prompts=[settled[index] for index in sorted(settled)],
            missing=work.size - len(settled),
            usage=work.usage(),
        )

    async def batch(self, works: list[Work]) -> list[api.PromptsResponse | RequestError]:
        """Many requests, as many at a time as an engine is meant to have; one that fails does not spoil the others.

        Raises:
            RequestError: nothing was answered, and all for the same overload.
        """
        slots = asyncio.Semaphore(self.settings.target_ongoing_requests)

        async def one(work: Work) -> api.PromptsResponse | RequestError:
            async with slots:
                try:
                    return await self.prompts(work)
                except RequestError as error:
                    return error

        answers = await asyncio.gather(*(one(work) for work in works))
        failed = [answer for answer in answers if isinstance(answer, RequestError)]
        if len(failed) == len(answers) and failed[0].status == 503:
            raise failed[0]
        return list(answers)

    def prompt(self, item: TaskEvent) -> api.Prompt:
        """A settled place as it is answered with."""
        assert isinstance(item.event, Settled)
        return self._answered(item.wanted, item.event.draft)

    @staticmethod
    def _answered(wanted: PromptSpec, draft: Draft) -> api.Prompt:
        words, command = count_words(draft["text"]), wanted.command
        return api.Prompt(
            task=command.task,
            text=draft["text"],
            words=words,
            command=api.CommandMeant(
                words=None if command.words == ANY else command.words, reward=None if command.reward == ANY else command.reward
            ),
            on_length=None if wanted.least is None else wanted.miss(words) == 0,
            finish_reason=draft["finish_reason"],
        )

    def _count(self, item: TaskEvent) -> None:
        task = item.wanted.command.task
        match item.event:
            case Redrafted(reason=reason):
                self.meters.redrafted(task, reason)
            case Settled(draft=draft):
                missed = item.wanted.miss(count_words(draft["text"])) > 0
                self.meters.prompt(task, missed=missed, cut=draft["finish_reason"] == "length")
            case Grown():
                pass

    def cards(self) -> list[api.ModelCard]:
        """The model, and under ``model:task`` each of its tasks, so that a client that can only name a model can choose one."""
        tasks = {
            name: api.TaskCard(default_words=t.default_words, default_reward=t.default_reward, usual_words=t.words)
            for name, t in self.vocabulary.tasks.items()
        }
        limits = self.settings.limits
        return [
            api.ModelCard(
                id=self.model if task is None else f"{self.model}:{task}",
                created=self.created,
                task=task,
                max_words=self.vocabulary.max_words,
                reward_bins=self.vocabulary.reward_bins,
                max_prompts=limits.prompts,
                max_intent_characters=limits.intent_characters,
                tasks=tasks if task is None else {task: tasks[task]},
            )
            for task in (None, *tasks)
        ]
