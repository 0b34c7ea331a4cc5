"""The ingress deployment: HTTP in front of the engines. It validates requests and reports the result of each prompt.

It does not import vLLM: a replica starts in seconds and holds no model.
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
from serve.engine_protocol import Refusal, SampleRequest, SampleResult, TextDelta
from serve.guard import is_loopback
from serve.keys import KeyRing
from serve.prometheus import RayMetrics
from serve.request_errors import RequestError
from serve.service import PromptService
from udrl import internals, storage
from udrl.commands import CommandVocabulary
from udrl.errors import UserError
from udrl.recipe import Recipe, Serve
from udrl.run import StudentPaths

log = logging.getLogger("ray.serve")  # Serve writes its own logger's records to the replica's log file


@contextlib.contextmanager
def engine_errors_as_503() -> Iterator[None]:
    """Turn any failure of an engine call into a 503: the request may succeed at another engine.

    Raises:
        RequestError: the call failed.
    """
    try:
        yield
    except BackPressureError:
        raise RequestError("too many requests are waiting; try again", None, 503, "overloaded", 1) from None
    except (DeploymentUnavailableError, ReplicaUnavailableError, RayActorError) as error:
        log.warning("an engine was lost: %s", error)
        raise RequestError("the engine of this request was lost; try again", None, 503, "engine_lost", 1) from None
    except Exception:
        # With gRPC between replicas, Serve raises the engine's own exceptions and gRPC's unwrapped.
        log.exception("an engine failed")
        raise RequestError("the engine failed; try again", None, 503, "engine_lost", 1) from None


def _raise_if_refused(answer: Any) -> Any:
    if not isinstance(answer, Refusal):
        return answer
    if answer.retryable:
        raise RequestError(f"the model is being replaced ({answer.message}); try again", None, 503, "updating", 2)
    raise RequestError(f"{answer.param}: {answer.message}", answer.param)


class EngineClient:
    """The engines behind a Serve handle. Cancelling a call cancels its generation."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle
        self.streaming_handle = handle.options(stream=True)

    async def sample(self, request: SampleRequest) -> SampleResult:
        response = self.handle.sample.remote(request)
        try:
            with engine_errors_as_503():
                answer = await response
            return _raise_if_refused(answer)
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def stream(self, request: SampleRequest) -> AsyncGenerator[list[TextDelta] | SampleResult, None]:
        response = self.streaming_handle.stream.remote(request)
        complete = False
        try:
            while True:
                with engine_errors_as_503():
                    item = await anext(response, None)
                if item is None:
                    break
                yield _raise_if_refused(item)
            complete = True
        finally:
            if not complete:
                response.cancel()


class Readiness:
    """Reports whether an engine runs, according to Serve's controller; asks it at most once per second."""

    def __init__(self, application: str, deployment: str) -> None:
        self.application, self.deployment = application, deployment
        self.checked_at, self.is_ready = -1.0, False

    async def __call__(self) -> bool:
        if time.monotonic() - self.checked_at > 1:
            self.is_ready = await asyncio.to_thread(self._check)
            self.checked_at = time.monotonic()
        return self.is_ready

    def _check(self) -> bool:
        application = ray_serve.status().applications.get(self.application)
        engine = application.deployments.get(self.deployment) if application else None
        if engine is None:
            return False
        # A replica is RUNNING when its constructor has returned, and the constructor ends with the warm-up.
        if engine.replica_states.get("RUNNING", 0) > 0:
            return True
        # Scaled to zero: the next request starts an engine.
        return not engine.replica_states and str(engine.status.value) == "HEALTHY"


def require_loopback_host() -> None:
    """Refuse to run without keys if Serve's HTTP proxies listen to other machines, even if the recipe's host is loopback.

    The guard checks each caller's address, but behind HAProxy (RAY_SERVE_ENABLE_HA_PROXY), which runs on the same node, every
    caller has this machine's address.

    Raises:
        UserError: Serve's HTTP host is not loopback.
    """
    host = internals.serve_http_host()
    if not is_loopback(host or ""):
        raise UserError(f"http_options.host: other machines can reach {host} while keys are off; set serve.require_keys=true")


@ray_serve.ingress()
class Ingress:
    """Answers HTTP requests for one student.

    Args:
        engine: handle of :class:`serve.engine.StudentServer`.
        student: path or URI of the exported student.
        settings: the recipe's serve section, as plain values.
        keys: names and hashes of the keys; None: keys are off.
    """

    def __init__(
        self, engine: DeploymentHandle, model: str, student: str, settings: dict[str, Any], keys: dict[str, str] | None
    ) -> None:
        vocabulary = CommandVocabulary.model_validate(storage.read_json(StudentPaths(student).commands))
        self.service = PromptService(EngineClient(engine), model, vocabulary, Serve(**settings), RayMetrics())
        self.keys = None if keys is None else KeyRing(keys)
        if self.keys is None:
            require_loopback_host()
        self.is_ready = Readiness(ray_serve.get_replica_context().app_name, engine.deployment_name)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        return web.create_app(self.service, self.keys, self.is_ready)


def build_ingress(recipe: Recipe, student: str, engine: Any, keys: KeyRing | None) -> Any:
    """Return the ingress in front of ``engine`` as a Serve application."""
    settings = recipe.serve
    deployment: Any = ray_serve.deployment(
        name="Ingress",
        num_replicas=settings.ingress_replicas,
        # A placement group of an engine may hold every CPU.
        ray_actor_options={"num_cpus": 0},
        # Serve's own limit is out of reach: overload is reported by the engines' queue, in our error shape.
        max_ongoing_requests=10_000,
        max_surge_percent=100,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.request_timeout_s + 5,
        health_check_period_s=2,
    )(Ingress)
    return deployment.bind(engine, recipe.name, student, settings.model_dump(), None if keys is None else keys.entries)
