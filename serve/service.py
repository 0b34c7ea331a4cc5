"""Answer resolved requests with an engine: generate within a deadline, count, build the responses."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from serve import schemas
from serve.drafts import DraftAccepted, DraftEvent, DraftRejected, PromptSpec, RetryBudget, write_prompts
from serve.engine_protocol import Draft, SamplingEngine, TextDelta
from serve.prometheus import ServerMetrics
from serve.request_errors import RequestError
from serve.resolver import RequestResolver, ResolvedRequest
from udrl.commands import ANY, CommandVocabulary
from udrl.recipe import Serve
from udrl.text import count_words


@dataclass(frozen=True)
class TaskEvent:
    """An event of one task's prompts. ``offset`` is the index of the task's first prompt in the response."""

    spec: PromptSpec
    offset: int
    event: DraftEvent

    @property
    def index(self) -> int:
        return self.offset + self.event.index


class PromptService:
    """Answers requests for one student, known to clients as ``model``; ``settings`` is the recipe's serve section."""

    def __init__(
        self, engine: SamplingEngine, model: str, vocabulary: CommandVocabulary, settings: Serve, metrics: ServerMetrics
    ) -> None:
        self.engine, self.model, self.vocabulary, self.settings, self.metrics = engine, model, vocabulary, settings, metrics
        self.resolver = RequestResolver(vocabulary, settings)
        self.budget = RetryBudget(
            rounds=settings.redraft.rounds,
            drafts_per_slot=settings.redraft.samples,
            max_drafts=settings.limits.prompts,
            seconds=settings.request_timeout_s / 2,
        )
        self.created = int(time.time())

    async def events(self, request: ResolvedRequest, *, live: bool) -> AsyncGenerator[TaskEvent, None]:
        """Yield the events of all tasks as they come. Closing the iteration cancels the generation.

        Args:
            live: also yield text deltas.

        Raises:
            RequestError: the engine failed, or 504 when the deadline has passed.
        """
        queue: asyncio.Queue[TaskEvent | Exception | None] = asyncio.Queue()  # None: a task is complete
        deadline = time.monotonic() + self.settings.request_timeout_s

        async def run_task(spec: PromptSpec, offset: int) -> None:
            try:
                events = write_prompts(self.engine, spec, self.budget, request.cost, live=live)
                async with contextlib.aclosing(events):
                    async for event in events:
                        queue.put_nowait(TaskEvent(spec, offset, event))
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        offsets = [sum(spec.request.n for spec in request.specs[:i]) for i in range(len(request.specs))]
        workers = [asyncio.create_task(run_task(spec, offset)) for spec, offset in zip(request.specs, offsets, strict=True)]
        n_running, complete = len(workers), False
        try:
            while n_running:
                try:
                    item = await asyncio.wait_for(queue.get(), max(deadline - time.monotonic(), 0))
                except TimeoutError:
                    raise self._timeout_error() from None
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    n_running -= 1
                    continue
                self._count(item)
                yield item
            complete = True
        finally:
            for worker in workers:
                worker.cancel()
            self.metrics.count_tokens(request.cost.prompt_tokens, request.cost.completion_tokens)
            if not complete:
                self.metrics.count_cancelled()
                # The engine must have received the cancellation before this returns.
                await asyncio.gather(*workers, return_exceptions=True)

    def _timeout_error(self) -> RequestError:
        seconds = self.settings.request_timeout_s
        return RequestError(f"timed out after {seconds:g} s; ask for fewer prompts or try later", None, 504, "timeout")

    async def answer(self, request: ResolvedRequest) -> schemas.PromptsResponse:
        """Generate all prompts and return the response. Raises as :meth:`events`."""
        prompts: dict[int, schemas.Prompt] = {}
        async for item in self.events(request, live=False):
            if isinstance(item.event, DraftAccepted):
                prompts[item.index] = to_prompt(item.spec, item.event.draft)
        return schemas.PromptsResponse(
            id=request.id,
            created=request.created,
            model=self.model,
            revision=request.cost.revision,
            intent=request.intent,
            prompts=[prompts[index] for index in sorted(prompts)],
            missing=request.n_prompts - len(prompts),
            usage=request.usage(),
        )

    async def answer_all(self, requests: list[ResolvedRequest]) -> list[schemas.PromptsResponse | RequestError]:
        """Answer several requests, at most ``serve.target_ongoing_requests`` at a time; one failure leaves the others intact.

        Raises:
            RequestError: 503, if no request was answered because of overload.
        """
        slots = asyncio.Semaphore(self.settings.target_ongoing_requests)

        async def answer_one(request: ResolvedRequest) -> schemas.PromptsResponse | RequestError:
            async with slots:
                try:
                    return await self.answer(request)
                except RequestError as error:
                    return error

        answers = await asyncio.gather(*(answer_one(request) for request in requests))
        errors = [answer for answer in answers if isinstance(answer, RequestError)]
        if len(errors) == len(answers) and errors[0].status == 503:
            raise errors[0]
        return list(answers)

    def _count(self, item: TaskEvent) -> None:
        match item.event:
            case DraftRejected(reason=reason):
                self.metrics.count_redraft(item.spec.task, reason)
            case DraftAccepted(draft=draft):
                missed = item.spec.count_words_off(count_words(draft.text)) > 0
                self.metrics.count_prompt(item.spec.task, missed=missed, cut=draft.finish_reason == "length")
            case TextDelta():
                pass

    def model_cards(self) -> list[schemas.ModelCard]:
        """Return the model and one ``model:task`` per task, for clients that can only name a model."""
        tasks = {
            name: schemas.TaskCard(default_words=t.default_words, default_reward=t.default_reward, usual_words=t.words)
            for name, t in self.vocabulary.tasks.items()
        }
        limits = self.settings.limits
        return [
            schemas.ModelCard(
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


def to_prompt(spec: PromptSpec, draft: Draft) -> schemas.Prompt:
    """Return an accepted draft as clients receive it."""
    words, command = count_words(draft.text), spec.request.command
    return schemas.Prompt(
        task=command.task,
        text=draft.text,
        words=words,
        command=schemas.PromptCommand(
            words=None if command.words == ANY else command.words, reward=None if command.reward == ANY else command.reward
        ),
        on_length=None if spec.min_words is None else spec.count_words_off(words) == 0,
        finish_reason=draft.finish_reason,
    )
