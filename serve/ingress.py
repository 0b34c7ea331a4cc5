"""The ingress deployment: HTTP in front of the engines. It validates, asks an engine and says what was achieved.

It imports no vLLM: a replica starts in seconds and holds no model.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from serve import web
from serve.api import RequestError
from serve.drafts import Ask, Piece, SampleResult
from serve.guard import is_loopback
from serve.keys import KeyRing
from serve.prometheus import RayMeters
from serve.service import Service
from udrl import commands, storage
from udrl.commands import CommandVocabulary
from udrl.errors import UserError
from udrl.recipe import Recipe, Serve

log = logging.getLogger("ray.serve")


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Say what a failed call of an engine means to the client: all of it is worth another try."""
    try:
        yield
    except BackPressureError:
        raise RequestError("too many requests are waiting; try again", None, 503, "overloaded", 1) from None
    except (DeploymentUnavailableError, ReplicaUnavailableError, RayActorError) as error:
        log.warning("an engine was lost: %s", error)
        raise RequestError("the engine that wrote this was lost; try again", None, 503, "engine_lost", 1) from None
    except Exception:
        # What the engine raised, or gRPC on the way: with it, Serve hands on both as they are.
        log.exception("an engine failed")
        raise RequestError("the engine failed; try again", None, 503, "engine_lost", 1) from None


def _accepted(answer: Any) -> Any:
    """Raises:
    RequestError: the engine refused what it was asked.
    """
    if isinstance(answer, dict) and "refused" in answer:
        if answer["retry"]:
            raise RequestError(f"the model is being replaced ({answer['refused']}); try again", None, 503, "updating", 2)
        raise RequestError(f"{answer['param']}: {answer['refused']}", answer["param"])
    return answer


class HandleEngine:
    """The engines behind a Serve handle. Giving up a call cancels what the engine writes for it."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle
        self.streams = handle.options(stream=True)

    async def draw(self, ask: Ask) -> SampleResult:
        response = self.handle.draw.remote(ask)
        try:
            with told():
                answer = await response
            return _accepted(answer)
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def stream(self, ask: Ask) -> AsyncGenerator[list[Piece] | SampleResult, None]:
        response = self.streams.stream.remote(ask)
        ended = False
        try:
            while True:
                with told():
                    item = await anext(response, None)
                if item is None:
                    break
                yield _accepted(item)
            ended = True
        finally:
            if not ended:
                response.cancel()


class Readiness:
    """Whether an engine runs, as Serve's controller has it; asked once a second at most."""

    def __init__(self, application: str, deployment: str) -> None:
        self.application, self.deployment = application, deployment
        self.asked, self.known = -1.0, False

    async def __call__(self) -> bool:
        if time.monotonic() - self.asked > 1:
            self.known = await asyncio.to_thread(self._ask)
            self.asked = time.monotonic()
        return self.known

    def _ask(self) -> bool:
        application = ray_serve.status().applications.get(self.application)
        engine = application.deployments.get(self.deployment) if application else None
        # A replica is RUNNING once its constructor is through, which ends with the warm-up. Scaled to zero, the next request
        # starts one.
        return engine is not None and (
            engine.replica_states.get("RUNNING", 0) > 0 or (not engine.replica_states and str(engine.status.value) == "HEALTHY")
        )


def require_loopback() -> None:
    """Refuse to run without keys where Serve itself listens to others, whatever the recipe says of its host.

    The guard looks at each caller's address. Behind HAProxy (RAY_SERVE_ENABLE_HA_PROXY), on the same node, that is always this
    machine's.

    Raises:
        UserError: Serve's HTTP host is not loopback.
    """
    from ray.serve.context import _get_global_client  # public nowhere: the address that Serve was started with

    host = _get_global_client().http_config.host
    if not is_loopback(host or ""):
        raise UserError(f"http_options.host: {host} is reachable by others and keys are off; set serve.require_keys=true")


@ray_serve.ingress()
class Ingress:
    """Answers for one student.

    Args:
        engine: handle of :class:`serve.engine.StudentServer`.
        student: path or URI of the exported student.
        settings: the recipe's serve section, as plain values.
        keys: names and hashes of the keys; None: keys are off.
    """

    def __init__(
        self, engine: DeploymentHandle, model: str, student: str, settings: dict[str, Any], keys: dict[str, str] | None
    ) -> None:
        vocabulary = CommandVocabulary.model_validate(storage.read_json(storage.join(student, commands.FILE)))
        self.service = Service(HandleEngine(engine), model, vocabulary, Serve(**settings), RayMeters())
        self.keys = None if keys is None else KeyRing(keys)
        if self.keys is None:
            require_loopback()
        self.ready = Readiness(ray_serve.get_replica_context().app_name, engine.deployment_name)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        return web.create(self.service, self.keys, self.ready)


def deployment(recipe: Recipe, student: str, engine: Any, keys: KeyRing | None) -> Any:
    """The ingress in front of ``engine``, as a Serve application."""
    wanted = recipe.serve
    made: Any = ray_serve.deployment(
        name="Ingress",
        num_replicas=wanted.ingress_replicas,
        # No whole CPU: the engine's placement group may hold every one.
        ray_actor_options={"num_cpus": 0},
        # What is too much is said by us, in our error shape: Serve's own limit lies beyond it.
        max_ongoing_requests=10_000,
        max_surge_percent=100,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=wanted.request_timeout_s + 5,
        health_check_period_s=2,
    )(Ingress)
    return made.bind(engine, recipe.name, student, wanted.model_dump(), None if keys is None else keys.entries)
