"""The engine deployment: ray.serve.llm's vLLM server, extended to load an exported student and to write drafts.

Importing this module imports vLLM (seconds, most of a gigabyte): only the builder and the engine replicas do.
"""

import asyncio
import contextlib
import logging
import os
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import asdict
from typing import Any

from ray.serve import Application
from ray.serve.llm import LLMConfig, LLMServer, build_llm_deployment
from vllm import RequestOutput, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from serve.engine_protocol import Draft, Refusal, SampleRequest, SampleResult, TextDelta
from udrl import commands, internals, storage
from udrl import tokenizer as tokenizers
from udrl.commands import Command, CommandVocabulary
from udrl.policies.policy import engine_environment, engine_kwargs, resource_bundles, sampling_kwargs
from udrl.policies.student import engine_for_student
from udrl.recipe import Recipe, Sampling, Serve
from udrl.run import StudentPaths, TrainingSummary

log = logging.getLogger("ray.serve")  # Serve writes its own logger's records to the replica's log file

DELTA_INTERVAL = 0.05  # seconds between the messages of a stream, after the first; fewer messages cost less CPU


class StudentServer(LLMServer):
    """Ray's LLM server for a student under any URI that pyarrow opens, with methods that take an intent and a command.

    Ray's own download accepts only s3, gs, abfss and azure, caches by model id (it would mix a retrained student of the same
    name with the old files) and only logs a failure.

    The tokenizer and the command vocabulary are loaded with the weights: while an update replaces engines one by one, no
    engine receives token ids of another student.
    """

    async def __init__(self, llm_config: LLMConfig, student: str, sampling: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits constructors
        folder = await asyncio.to_thread(fetch_student, student)
        internals.set_model_folder(llm_config, folder)
        self.sampling = Sampling(**sampling)
        self.context = int(llm_config.engine_kwargs["max_model_len"])  # tokens
        self.tokenizer, self.vocabulary = tokenizers.load_tokenizer(folder), CommandVocabulary.load(folder)
        self.end_token_id = tokenizers.control_ids(self.tokenizer, [commands.END])[0]
        training = TrainingSummary.load_if_exists(StudentPaths(folder).training)
        self.revision: str | None = (training.weights or None) if training else None
        self.in_flight, self.aborted = 0, 0  # requests of this replica; `aborted` ended before their result
        await super().__init__(llm_config, engine_cls=internals.in_process_vllm_engine())
        await self._warm_up()

    async def _warm_up(self) -> None:
        """Write once with small and large batches, so that no client waits for compiled kernels and cold caches."""
        command = Command(task=next(iter(self.vocabulary.tasks)))
        for n in (1, 8):
            await self.sample(SampleRequest("warm up", command, n))

    async def sample(self, request: SampleRequest) -> SampleResult | Refusal:
        """Write the drafts of one request and return them together.

        Raises:
            RuntimeError: the engine failed at this request. If the engine is dead, this process exits and Serve replaces it.
        """
        prompt_ids = self._encode(request)
        if isinstance(prompt_ids, Refusal):
            return prompt_ids
        with self._track_request():
            outputs = [output async for output in self._generate(prompt_ids, request, RequestOutputKind.FINAL_ONLY)]
            completions = outputs[-1].outputs
            drafts = {completion.index: _finish_draft(completion.text, completion.finish_reason) for completion in completions}
            n_tokens = sum(len(completion.token_ids) for completion in completions)
        return self._to_result(drafts, len(prompt_ids), n_tokens)

    async def stream(self, request: SampleRequest) -> AsyncIterator[list[TextDelta] | SampleResult | Refusal]:
        """Yield the drafts' text as it grows, in intervals of 50 ms, and last the result of :meth:`sample`."""
        prompt_ids = self._encode(request)
        if isinstance(prompt_ids, Refusal):
            yield prompt_ids
            return
        with self._track_request():
            texts: dict[int, str] = {}
            finish_reasons: dict[int, str | None] = {}
            pending: dict[int, str] = {}  # text that has not been sent
            n_tokens, sent_at = 0, 0.0
            # aclosing: closing this iteration must abort the generation at once, not when it is garbage-collected
            async with contextlib.aclosing(self._generate(prompt_ids, request, RequestOutputKind.DELTA)) as outputs:
                async for output in outputs:
                    for completion in output.outputs:
                        index = completion.index
                        n_tokens += len(completion.token_ids)
                        # The first word comes with a leading space.
                        text = completion.text if texts.get(index) else completion.text.lstrip()
                        texts[index] = texts.get(index, "") + text
                        pending[index] = pending.get(index, "") + text
                        finish_reasons[index] = completion.finish_reason or finish_reasons.get(index)
                    if time.monotonic() - sent_at > DELTA_INTERVAL and (deltas := _to_deltas(pending)):
                        yield deltas
                        pending, sent_at = {}, time.monotonic()
            if deltas := _to_deltas(pending):
                yield deltas
            drafts = {index: _finish_draft(text, finish_reasons[index]) for index, text in texts.items()}
            yield self._to_result(drafts, len(prompt_ids), n_tokens)

    def state(self) -> dict[str, Any]:
        """Return the revision, the process id and the request counts of this replica, for tests and operators."""
        return {"revision": self.revision, "in_flight": self.in_flight, "aborted": self.aborted, "pid": os.getpid()}

    @contextlib.contextmanager
    def _track_request(self) -> Iterator[None]:
        self.in_flight += 1
        try:
            yield
        except EngineDeadError:
            log.error("the engine is dead; exiting this replica")  # at level ERROR, Serve flushes its buffered log
            # Serve would send this replica requests until three health checks have failed; it notices a dead actor at once.
            os._exit(1)
        except Exception as error:
            self.aborted += 1
            log.exception("the engine failed")
            # A built-in exception: unpickling one of vLLM's would import vLLM in the ingress.
            raise RuntimeError(f"the engine failed: {type(error).__name__}") from None
        except BaseException:  # cancelled
            self.aborted += 1
            raise
        finally:
            self.in_flight -= 1

    def _encode(self, request: SampleRequest) -> list[int] | Refusal:
        """Return the token ids of intent and command, or a refusal."""
        try:
            ids: list[int] = tokenizers.encode_request(self.tokenizer, self.vocabulary, request.intent, request.command)
        except ValueError as error:  # during an update the ingress may have the vocabulary of another student
            return Refusal(str(error), param=None, retryable=True)
        limit = self.context - self.sampling.max_tokens
        if len(ids) > limit:
            message = f"too long for this model ({len(ids)} tokens with its command); use at most {limit} tokens"
            return Refusal(message, param="intent", retryable=False)
        return ids

    def _generate(
        self, prompt_ids: list[int], request: SampleRequest, kind: RequestOutputKind
    ) -> AsyncGenerator[RequestOutput, None]:
        """Start the generation. Closing the iteration aborts it."""
        options = {name: value for name, value in asdict(request.options).items() if value is not None}
        kwargs = sampling_kwargs(self.sampling) | options
        kwargs["max_tokens"] = min(options.get("max_tokens", self.sampling.max_tokens), self.sampling.max_tokens)
        params = SamplingParams(**kwargs, n=request.n, stop_token_ids=[self.end_token_id], output_kind=kind)
        engine: Any = self.engine
        return engine.async_llm.generate(TokensPrompt(prompt_token_ids=prompt_ids), params, uuid.uuid4().hex)

    def _to_result(self, drafts: dict[int, Draft], prompt_tokens: int, completion_tokens: int) -> SampleResult:
        ordered = [drafts[index] for index in sorted(drafts)]
        return SampleResult(ordered, prompt_tokens, completion_tokens, self.revision)


def _finish_draft(text: str, finish_reason: str | None) -> Draft:
    """Return a finished draft.

    Raises:
        RuntimeError: vLLM ended the text for a reason of its own (``error``, ``abort``).
    """
    if finish_reason not in ("stop", "length"):
        raise RuntimeError(f"the engine ended a draft: {finish_reason}")
    return Draft(text.strip(), "stop" if finish_reason == "stop" else "length")


def _to_deltas(pending: dict[int, str]) -> list[TextDelta]:
    return [TextDelta(index, text) for index, text in pending.items() if text]


def fetch_student(student: str) -> str:
    """Return the student's local folder: itself, or a new copy of a remote one, which never mixes with an older copy."""
    return storage.download_folder(student, "" if storage.is_local(student) else tempfile.mkdtemp(prefix="udrl-student-"))


def build_engine(recipe: Recipe, student: str, context: int) -> Application:
    """Return the engine deployment of ``student`` (path or URI), placed and scaled as the recipe's serve section says.

    Ray must be initialized: Ray's builder asks for the driver's runtime environment.
    """
    settings = recipe.serve
    config = LLMConfig(
        model_loading_config={"model_id": recipe.name},
        accelerator_type=settings.placement.accelerator,
        placement_group_config={"bundles": _bundles_without_zeros(settings)},
        runtime_env={"env_vars": engine_environment(settings.placement)},
        engine_kwargs=engine_kwargs(engine_for_student(settings.engine, context), settings.placement),
        deployment_config={
            # Ray adds the replica actor's CPUs (default 1) to the first bundle: on two cores that would take both.
            "ray_actor_options": {"num_cpus": 0},
            "max_ongoing_requests": max(settings.target_ongoing_requests, settings.engine.max_num_seqs),
            "max_queued_requests": settings.queue,
            "autoscaling_config": {
                "min_replicas": settings.min_replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.target_ongoing_requests,
                "upscale_delay_s": settings.upscale_delay_s,
                "downscale_delay_s": settings.downscale_delay_s,
                "downscale_to_zero_delay_s": settings.to_zero_delay_s,
                # Deprecated, but Ray 2.60.0 does not read the variables that its warning names (tests/unit/test_internals.py).
                "metrics_interval_s": 1,
                "look_back_period_s": 5,
            },
            # In an update a new engine is warm before an old one stops, and the old one completes its requests.
            "max_surge_percent": 100,
            "graceful_shutdown_wait_loop_s": 0.5,
            "graceful_shutdown_timeout_s": settings.request_timeout_s + 5,
            "health_check_period_s": 2,
            "health_check_timeout_s": 30,
        },
    )
    kwargs = {"student": student, "sampling": settings.sampling.model_dump()}
    return build_llm_deployment(config, deployment_cls=StudentServer, bind_kwargs=kwargs)


def _bundles_without_zeros(settings: Serve) -> list[dict[str, float]]:
    # Ray takes an engine for a CPU engine only if its bundles have no GPU key (infer_hardware_kind_from_bundles).
    return [
        {name: amount for name, amount in bundle.items() if amount or name == "CPU"}
        for bundle in resource_bundles(settings.engine, settings.placement)
    ]
