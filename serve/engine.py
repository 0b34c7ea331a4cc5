"""The engine deployment: ray.serve.llm's vLLM server, made to load an exported student and to write drafts.

Importing this module imports vLLM (seconds, most of a gigabyte): only the builder and the engine's replicas do.
"""

import asyncio
import contextlib
import logging
import os
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any, cast

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine  # public nowhere; LLMServer takes a subclass
from ray.serve import Application
from ray.serve.llm import LLMConfig, LLMServer, build_llm_deployment
from vllm import RequestOutput, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from serve.drafts import Ask, Draft, Piece, Refused, SampleResult
from udrl import commands, storage
from udrl import tokenizer as tokenizers
from udrl.commands import Command, CommandVocabulary
from udrl.policies.engine_args import bundles, engine_kwargs, environment
from udrl.policies.policy import draws
from udrl.policies.student import fit
from udrl.recipe import Recipe, Sampling, Serve
from udrl.train.export import TRAINING

log = logging.getLogger("ray.serve")

GATHER_S = 0.05  # pieces of a stream go out no more often than this, after the first


class StudentEngine(VLLMEngine):
    """Ray's vLLM engine, which on a CPU runs the model in the engine's own process.

    Ray asks for a worker process there (get_initialization_kwargs in ray/llm/_internal/serve/engines/vllm/vllm_models.py). The
    two then wait for one another by spinning, on the cores that the model and the server need (docs/results/serving-cpu.md).
    """

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        arguments, frontend, config = super()._prepare_engine_config(callback_ctx)
        parallel = config.parallel_config
        if parallel.distributed_executor_backend == "mp" and parallel.world_size == 1:
            parallel.distributed_executor_backend = "uni"
        return arguments, frontend, config

    @property
    def client(self) -> AsyncLLM:
        """The engine itself. Its OpenAI front would make JSON of what is read again in this process, a chunk a token."""
        return cast(AsyncLLM, self._engine_client)


class StudentServer(LLMServer):
    """Ray's LLM server for a student under any URI that pyarrow opens, with methods that take an intent and a command.

    Ray's own mirror takes s3, gs, abfss and azure alone, caches by model id (a retrained student of the same name would be
    mixed with the old files) and only logs a failed download (CloudModelDownloader.get_model in
    ray/llm/_internal/common/utils/download_utils.py).

    The tokenizer and the command vocabulary are those of the weights here: while an update replaces engines one by one, none
    is sent the token ids of another student.
    """

    async def __init__(self, llm_config: LLMConfig, student: str, sampling: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits constructors
        # hf_model_id is where Ray itself puts a downloaded model's folder (initialize_node in
        # ray/llm/_internal/serve/utils/node_initialization_utils.py); the engine then loads it as a local path.
        engine_config: Any = llm_config.get_engine_config()
        folder = await asyncio.to_thread(local_folder, student)
        engine_config.hf_model_id = folder
        self.sampling = Sampling(**sampling)
        self.context = int(llm_config.engine_kwargs["max_model_len"])
        self.tokenizer, self.vocabulary = tokenizers.load(folder), CommandVocabulary.load(folder)
        self.end = tokenizers.control_ids(self.tokenizer, [commands.END])[0]
        facts = storage.join(folder, TRAINING)
        self.revision: str | None = storage.read_json(facts).get("weights") if storage.exists(facts) else None
        self.writing, self.given_up = 0, 0  # requests in this replica; those that ended before their answer
        await super().__init__(llm_config, engine_cls=StudentEngine)
        await self._warm_up()

    async def _warm_up(self) -> None:
        """Write once at the sizes that come: kernels are compiled and caches touched before a client waits for it."""
        task = next(iter(self.vocabulary.tasks))
        for n in (1, 8):
            await self.draw(Ask(intent="warm up", task=task, words=commands.ANY, reward=commands.ANY, n=n))

    async def draw(self, ask: Ask) -> SampleResult | Refused:
        """Write drafts; all of them at once.

        Raises:
            RuntimeError: the engine failed at this request. If it is gone, so is this process, and Serve makes another.
        """
        ids = self._ids(ask)
        if isinstance(ids, dict):
            return ids
        with self._counted():
            answers = [answer async for answer in self._generate(ids, ask, RequestOutputKind.FINAL_ONLY)]  # one, with all
            outputs = answers[-1].outputs
            made = {output.index: _draft(output.text, output.finish_reason) for output in outputs}
        return self._drawn(made, len(ids), sum(len(output.token_ids) for output in outputs))

    async def stream(self, ask: Ask) -> AsyncIterator[list[Piece] | SampleResult | Refused]:
        """As :meth:`draw`, with the pieces of the drafts before it, gathered over 50 ms."""
        ids = self._ids(ask)
        if isinstance(ids, dict):
            yield ids
            return
        with self._counted():
            texts: dict[int, str] = {}
            reasons: dict[int, str | None] = {}
            grown: dict[int, str] = {}
            written, sent = 0, 0.0
            # Giving up this iteration must end the other at once, not when it is collected.
            async with contextlib.aclosing(self._generate(ids, ask, RequestOutputKind.DELTA)) as answers:
                async for answer in answers:
                    for output in answer.outputs:
                        written += len(output.token_ids)
                        # The first word is written with its leading space.
                        text = output.text if texts.get(output.index) else output.text.lstrip()
                        texts[output.index] = texts.get(output.index, "") + text
                        grown[output.index] = grown.get(output.index, "") + text
                        reasons[output.index] = output.finish_reason or reasons.get(output.index)
                    if time.monotonic() - sent > GATHER_S and (pieces := _pieces(grown)):
                        yield pieces
                        grown, sent = {}, time.monotonic()
            if pieces := _pieces(grown):
                yield pieces
            yield self._drawn({index: _draft(text, reasons[index]) for index, text in texts.items()}, len(ids), written)

    def state(self) -> dict[str, Any]:
        """For tests and for people: what this replica serves and how many requests it is at."""
        return {"revision": self.revision, "writing": self.writing, "given_up": self.given_up, "pid": os.getpid()}

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self.writing += 1
        try:
            yield
        except EngineDeadError:
            log.error("the engine is dead; ending this replica")  # an error: it brings out what Serve's log still holds back
            # Three failed health checks would pass before Serve replaces this replica, and it would be sent requests meanwhile.
            # That an actor is dead, Serve sees at once.
            os._exit(1)
        except Exception as error:
            self.given_up += 1
            log.exception("the engine failed")
            # A plain one: what is sent to the ingress must not make it import vLLM.
            raise RuntimeError(f"the engine failed: {type(error).__name__}") from None
        except BaseException:  # cancelled
            self.given_up += 1
            raise
        finally:
            self.writing -= 1

    def _ids(self, ask: Ask) -> list[int] | Refused:
        """Intent and command as token ids, or why they can't be."""
        command = Command(task=ask["task"], words=ask["words"], reward=ask["reward"])
        try:
            ids: list[int] = tokenizers.encode_request(self.tokenizer, self.vocabulary, ask["intent"], command)
        except ValueError as error:  # the ingress has another student's vocabulary: an update is under way
            return Refused(refused=str(error), param=None, retry=True)
        room = self.context - self.sampling.max_tokens
        if len(ids) > room:
            said = f"too long for this model: {len(ids)} tokens with its command, at most {room}"
            return Refused(refused=said, param="intent", retry=False)
        return ids

    def _generate(self, ids: list[int], ask: Ask, kind: RequestOutputKind) -> AsyncGenerator[RequestOutput, None]:
        """Giving the iteration up aborts the request."""
        drawn = draws(self.sampling) | {name: ask[name] for name in ("temperature", "top_p", "seed") if name in ask}
        drawn["max_tokens"] = min(ask.get("max_tokens", self.sampling.max_tokens), self.sampling.max_tokens)
        params = SamplingParams(**drawn, n=ask["n"], stop_token_ids=[self.end], output_kind=kind)
        return cast(StudentEngine, self.engine).client.generate(TokensPrompt(prompt_token_ids=ids), params, uuid.uuid4().hex)

    def _drawn(self, made: dict[int, Draft], prompt_tokens: int, completion_tokens: int) -> SampleResult:
        drafts = [made[index] for index in sorted(made)]
        return SampleResult(
            drafts=drafts, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, revision=self.revision
        )


def _draft(text: str, reason: str | None) -> Draft:
    """Raises:
    RuntimeError: vLLM ended the text for a reason of its own (``error``, ``abort``): it is no answer.
    """
    if reason not in ("stop", "length"):
        raise RuntimeError(f"the engine ended a draft: {reason}")
    return Draft(text=text.strip(), finish_reason="stop" if reason == "stop" else "length")


def _pieces(grown: dict[int, str]) -> list[Piece]:
    return [Piece(index=index, text=text) for index, text in grown.items() if text]


def local_folder(student: str) -> str:
    """The student as a local folder: itself where it is local, else a fresh copy, so that no older one is mixed in."""
    return storage.download_folder(student, "" if storage.is_local(student) else tempfile.mkdtemp(prefix="udrl-student-"))


def deployment(recipe: Recipe, student: str, context: int) -> Application:
    """The engine deployment of ``student`` (path or URI), placed and scaled as the recipe's serve section says.

    Ray must be initialised: Ray's builder asks for the driver's runtime environment.
    """
    wanted = recipe.serve
    config = LLMConfig(
        model_loading_config={"model_id": recipe.name},
        accelerator_type=wanted.placement.accelerator,
        placement_group_config={"bundles": _bundles(wanted)},
        runtime_env={"env_vars": environment(wanted.placement)},
        engine_kwargs=engine_kwargs(fit(wanted.engine, context), wanted.placement),
        deployment_config={
            # Ray adds the replica actor's CPUs (1 unless said) to the first bundle: on two cores that would take both.
            "ray_actor_options": {"num_cpus": 0},
            "max_ongoing_requests": max(wanted.target_ongoing_requests, wanted.engine.max_num_seqs),
            "max_queued_requests": wanted.queue,
            "autoscaling_config": {
                "min_replicas": wanted.min_replicas,
                "max_replicas": wanted.max_replicas,
                "target_ongoing_requests": wanted.target_ongoing_requests,
                "upscale_delay_s": wanted.upscale_delay_s,
                "downscale_delay_s": wanted.downscale_delay_s,
                "downscale_to_zero_delay_s": wanted.to_zero_delay_s,
                "metrics_interval_s": 1,
                "look_back_period_s": 5,
            },
            # A new engine stands warm before an old one is stopped, and that one ends what it has begun.
            "max_surge_percent": 100,
            "graceful_shutdown_wait_loop_s": 0.5,
            "graceful_shutdown_timeout_s": wanted.request_timeout_s + 5,
            "health_check_period_s": 2,
            "health_check_timeout_s": 30,
        },
    )
    kwargs = {"student": student, "sampling": wanted.sampling.model_dump()}
    return build_llm_deployment(config, deployment_cls=StudentServer, bind_kwargs=kwargs)


def _bundles(wanted: Serve) -> list[dict[str, float]]:
    # A bundle without GPU is what tells Ray that this is a CPU engine (infer_hardware_kind_from_bundles).
    return [{k: v for k, v in bundle.items() if v or k == "CPU"} for bundle in bundles(wanted.engine, wanted.placement)]
