"""Serve a run's student: ``python -m serve.app recipes/quickstart.yaml [dotted.key=value ...]``.

On a cluster the same application is deployed by ``serve deploy serve/config.yaml``, which calls :func:`build`. Two
deployments: the engine (serve/engine.py), which scales, and the ingress in front of it (serve/ingress.py).
"""

import contextlib
import errno
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve.guard import is_loopback
from serve.keys import KeyRing
from udrl import cluster, commands, storage
from udrl.command_line import load, parse_recipe
from udrl.commands import CommandVocabulary
from udrl.errors import UserError, exit_code
from udrl.recipe import Recipe, problem_line

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

NAME = "udrl"


class Arguments(BaseModel):
    """``args`` of the application in a Serve config file."""

    model_config = ConfigDict(extra="forbid")
    recipe: str
    overrides: list[str] = Field(default_factory=list, description="dotted.key=value, as on the command line")
    storage: str | None = Field(None, description="the run's storage, instead of the recipe's")
    model: str | None = Field(None, description="the exported student itself, instead of the one under storage")


def build(args: dict[str, Any]) -> "Application":
    """The Serve application of a config file's ``args`` (see :class:`Arguments`).

    Raises:
        UserError: the arguments or the recipe are wrong, or no student is there.
    """
    try:
        arguments = Arguments.model_validate(args)
    except ValidationError as error:
        raise UserError("\n".join(problem_line("serve config: args", problem) for problem in error.errors())) from error
    recipe = load(arguments.recipe, arguments.overrides)
    return application(recipe, arguments.model or student_uri(arguments.storage or recipe.storage))


def student_uri(run: str) -> str:
    """Where a run's exported student lies."""
    return storage.join(storage.absolute(run), "student")


def application(recipe: Recipe, student: str) -> "Application":
    """The engine and the ingress in front of it. Ray must be initialised.

    Raises:
        UserError: no student is there, or the recipe's serve section does not fit it.
    """
    context, _ = inspect_student(recipe, student)
    keys = read_keys(recipe)
    from serve import engine, ingress

    try:
        llm = engine.deployment(recipe, student, context)
    except ValueError as error:  # Ray's checks of engine.kwargs and placement.accelerator
        raise UserError(f"serve: {' '.join(str(error).split())[:300]}; mend serve.engine or serve.placement") from error
    return ingress.deployment(recipe, student, llm, keys)


def read_keys(recipe: Recipe) -> KeyRing | None:
    """The keys that the server takes; None where the recipe turns them off.

    Raises:
        UserError: no key is there, or keys are off on an address that others reach.
    """
    serve = recipe.serve
    if serve.require_keys:
        return KeyRing.read(serve.keys_file, os.environ)
    if not is_loopback(serve.host):
        raise UserError(
            f"serve.host: {serve.host} is reachable by others and keys are off;"
            " set serve.require_keys=true, or serve.host=127.0.0.1"
        )
    return None


def inspect_student(recipe: Recipe, student: str) -> tuple[int, CommandVocabulary]:
    """Check before anything is started; return the tokens that the engine will hold, and the command vocabulary.

    Raises:
        UserError: as :func:`application`.
    """
    missing = [name for name in (commands.FILE, "config.json") if not storage.exists(storage.join(student, name))]
    if missing:
        raise UserError(
            f"student {student}: no exported model here ({missing[0]} is missing);"
            " train one with `python -m jobs.train RECIPE`, or set storage=<the run that has one>"
        )
    try:
        vocabulary = CommandVocabulary.model_validate(storage.read_json(storage.join(student, commands.FILE)))
        positions = int(storage.read_json(storage.join(student, "config.json"))["n_positions"])
    except (ValueError, KeyError) as error:
        raise UserError(f"student {student}: unreadable ({str(error).splitlines()[0]}); export it again") from error
    serve = recipe.serve
    # A student with fewer positions than the recipe's engine would stop vLLM at start; the model is the one to follow.
    context = min(serve.engine.max_model_len, positions)
    if serve.sampling.max_tokens >= context:
        raise UserError(
            f"serve.sampling.max_tokens: {serve.sampling.max_tokens} leaves no room for an intent in {context} tokens"
        )
    return context, vocabulary


def engine_handle(model: str) -> "DeploymentHandle":
    """A handle of the engines of a running application, for a script: one that needs no event loop around it."""
    from ray import serve as ray_serve

    handle = ray_serve.get_deployment_handle(f"StudentServer:{model}", NAME)
    if not handle.is_initialized:  # Serve gives out the one that it gave before
        handle._init(_run_router_in_separate_loop=True)  # else cluster.SERVE_ENV has it share its caller's loop
    return handle


def require_free_port(host: str, port: int) -> None:
    """Raises:
    UserError: the address is taken, or not one of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"serve.port: {host}:{port} is in use; set serve.port=<a free port>") from error
        raise UserError(f"serve.host: {host}:{port} can't be listened on ({error.strerror or error})") from error


def curl_line(url: str, vocabulary: CommandVocabulary) -> str:
    """A request to paste into a shell."""
    task, learnt = next(iter(vocabulary.tasks.items()))
    intent = "birthday invitation for a five-year-old who loves dinosaurs"
    length = {"length": learnt.default_words} if learnt.default_words > 0 else {}
    body = json.dumps({"intent": intent, "task": task, **length, "n": 2})
    return f"curl -s {url}/v1/prompts -H 'Content-Type: application/json' -d '{body}'"


def main(argv: Sequence[str]) -> None:
    recipe = parse_recipe(argv, "Serve a run's student over HTTP, with a playground page.")
    student = student_uri(recipe.storage)
    _, vocabulary = inspect_student(recipe, student)
    host, port = recipe.serve.host, recipe.serve.port
    require_free_port(host, port)

    cluster.ensure_auth_token()  # this and the next before Ray is imported
    cluster.set_serve_env()
    import ray
    from ray import serve as ray_serve

    print(f"serve: starting {recipe.name} from {student} (half a minute or more) ...", flush=True)
    started = time.monotonic()
    try:
        cluster.connect()
        # After ray.init, which puts handlers of its own there: SIGTERM would abort with a native stack trace. SIGINT too,
        # since a shell script starts background jobs with it ignored.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
        cluster.require_resources("serve.placement", recipe.serve.placement.cpus, recipe.serve.placement.gpus)
        ray_serve.start(http_options={"host": host, "port": port})
        try:
            ray_serve.run(application(recipe, student), name=NAME)
        except RuntimeError as error:
            raise UserError(
                f"serve: did not start: {_cause(error)}; /tmp/ray/session_latest/logs has the whole story"
            ) from error
        url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        print(f"serve: ready after {time.monotonic() - started:.0f} s")
        print(f"\n  playground  {url}/\n  try         {curl_line(url, vocabulary)}\n")
        print("Ctrl-C stops it.", flush=True)
        while True:
            signal.pause()
    except KeyboardInterrupt:
        print("serve: stopping", flush=True)
    finally:
        if ray.is_initialized():
            with contextlib.suppress(Exception):  # it may never have come up
                ray_serve.delete(NAME)  # lets requests in flight end, which shutdown does not
            ray_serve.shutdown()
            ray.shutdown()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _cause(error: BaseException) -> str:
    """The last line of a failed replica's traceback, which Serve keeps in the deployment's status, not in its error."""
    from ray import serve as ray_serve

    application = ray_serve.status().applications.get(NAME)
    messages = [deployment.message for deployment in application.deployments.values()] if application else []
    failed = [message for message in messages if "Error" in message]
    lines = [line.strip() for line in (failed or [str(error)])[0].splitlines() if line.strip()]
    return lines[-1][:400] if lines else type(error).__name__


if __name__ == "__main__":
    # Under -m this file is the module __main__, which Ray's workers can't import: run the importable one.
    from serve import app

    sys.exit(exit_code(app.main))
