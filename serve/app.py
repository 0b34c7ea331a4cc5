"""Serve a run's student: ``python -m serve.app recipes/quickstart.yaml [dotted.key=value ...]``.

On a cluster, ``serve deploy serve/config.yaml`` deploys the same application through :func:`build`. It has two deployments:
the engine (serve/engine.py), which scales, and the ingress in front of it (serve/ingress.py).
"""

import contextlib
import errno
import json
import logging
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
from udrl import cluster, internals, storage
from udrl.command_line import load, parse_recipe
from udrl.commands import CommandVocabulary
from udrl.errors import UserError, exit_code
from udrl.recipe import Recipe, problem_line
from udrl.run import Run, StudentPaths

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

log = logging.getLogger(__name__)

APPLICATION_NAME = "udrl"


class ApplicationArguments(BaseModel):
    """``args`` of the application in a Serve config file."""

    model_config = ConfigDict(extra="forbid")
    recipe: str
    overrides: list[str] = Field(default_factory=list, description="dotted.key=value, as on the command line")
    storage: str | None = Field(None, description="the run's storage, instead of the recipe's")
    model: str | None = Field(None, description="the exported student itself, instead of the one under storage")


def build(args: dict[str, Any]) -> "Application":
    """Return the Serve application of a config file's ``args`` (:class:`ApplicationArguments`).

    Raises:
        UserError: the arguments or the recipe are wrong, or there is no student.
    """
    try:
        arguments = ApplicationArguments.model_validate(args)
    except ValidationError as error:
        raise UserError("\n".join(problem_line("serve config: args", problem) for problem in error.errors())) from error
    recipe = load(arguments.recipe, arguments.overrides)
    return build_application(recipe, arguments.model or locate_student(arguments.storage or recipe.storage))


def locate_student(run_storage: str) -> str:
    """Return the path or URI of a run's exported student."""
    return Run(storage.absolute(run_storage)).student.folder


def build_application(recipe: Recipe, student: str) -> "Application":
    """Return the engine and the ingress in front of it as one application. Ray must be initialized.

    Raises:
        UserError: there is no student, or the recipe's serve section does not fit it.
    """
    context, _ = check_student(recipe, student)
    keys = load_keys(recipe)
    from serve.engine import build_engine
    from serve.ingress import build_ingress

    try:
        engine = build_engine(recipe, student, context)
    except ValueError as error:  # Ray's checks of engine.kwargs and placement.accelerator
        raise UserError(f"serve: {' '.join(str(error).split())[:300]}; correct serve.engine or serve.placement") from error
    return build_ingress(recipe, student, engine, keys)


def load_keys(recipe: Recipe) -> KeyRing | None:
    """Return the keys that the server accepts; None if the recipe turns keys off.

    Raises:
        UserError: there is no key, or keys are off on an address that other machines can reach.
    """
    serve = recipe.serve
    if serve.require_keys:
        return KeyRing.read(serve.keys_file, os.environ)
    if not is_loopback(serve.host):
        raise UserError(
            f"serve.host: other machines can reach {serve.host} while keys are off;"
            " set serve.require_keys=true, or serve.host=127.0.0.1"
        )
    return None


def check_student(recipe: Recipe, student: str) -> tuple[int, CommandVocabulary]:
    """Check a student before anything starts; return the engine's context in tokens and the command vocabulary.

    Raises:
        UserError: as :func:`build_application`.
    """
    paths = StudentPaths(student)
    missing = [path for path in (paths.commands, paths.config) if not storage.exists(path)]
    if missing:
        raise UserError(
            f"student: no exported model in {student} ({missing[0]} is missing);"
            " train one with `python -m jobs.train RECIPE`, or set storage=<a run that has one>"
        )
    try:
        vocabulary = CommandVocabulary.model_validate(storage.read_json(paths.commands))
        positions = int(storage.read_json(paths.config)["n_positions"])
    except (ValueError, KeyError) as error:
        raise UserError(f"student: cannot read {student} ({str(error).splitlines()[0]}); export it again") from error
    # vLLM does not start with a longer context than the student's positions.
    context = min(recipe.serve.engine.max_model_len, positions)
    max_tokens = recipe.serve.sampling.max_tokens
    if max_tokens >= context:
        raise UserError(
            f"serve.sampling.max_tokens: {max_tokens} leaves no room for an intent in {context} tokens; set a smaller number"
        )
    return context, vocabulary


def get_engine_handle(model: str) -> "DeploymentHandle":
    """Return a handle of a running application's engines that a script without an event loop can use."""
    from ray import serve as ray_serve

    handle = ray_serve.get_deployment_handle(f"StudentServer:{model}", APPLICATION_NAME)
    internals.use_own_event_loop(handle)
    return handle


def require_free_port(host: str, port: int) -> None:
    """Check that the server can listen on an address.

    Raises:
        UserError: the port is in use, or the address is not one of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"serve.port: {host}:{port} is in use; set serve.port=<a free port>") from error
        reason = error.strerror or error
        raise UserError(f"serve.host: cannot listen on {host}:{port} ({reason}); set an address of this machine") from error


def format_curl_line(url: str, vocabulary: CommandVocabulary) -> str:
    """Return an example request to paste into a shell."""
    task, task_commands = next(iter(vocabulary.tasks.items()))
    intent = "birthday invitation for a five-year-old who loves dinosaurs"
    length = {"length": task_commands.default_words} if task_commands.default_words > 0 else {}
    body = json.dumps({"intent": intent, "task": task, **length, "n": 2})
    return f"curl -s {url}/v1/prompts -H 'Content-Type: application/json' -d '{body}'"


def main(argv: Sequence[str]) -> None:
    recipe = parse_recipe(argv, "Serve a run's student over HTTP, with a playground page.")
    student = locate_student(recipe.storage)
    _, vocabulary = check_student(recipe, student)
    host, port = recipe.serve.host, recipe.serve.port
    require_free_port(host, port)

    cluster.ensure_auth_token()  # this and the next line before Ray is imported
    cluster.set_serve_env()
    import ray
    from ray import serve as ray_serve

    log.info("serve: starting %s from %s; this takes half a minute or more", recipe.name, student)
    started = time.monotonic()
    try:
        cluster.connect()
        # After ray.init, which installs handlers of its own: SIGTERM would abort with a native stack trace. SIGINT too,
        # because shell scripts start background jobs with SIGINT ignored.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _raise_keyboard_interrupt)
        cluster.require_resources("serve.placement", recipe.serve.placement.cpus, recipe.serve.placement.gpus)
        ray_serve.start(http_options={"host": host, "port": port})
        try:
            ray_serve.run(build_application(recipe, student), name=APPLICATION_NAME)
        except RuntimeError as error:
            cause = _find_start_failure(error)
            raise UserError(f"serve: the application did not start ({cause}); see /tmp/ray/session_latest/logs") from error
        log.info("serve: ready after %.0f s", time.monotonic() - started)
        url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        print(
            f"\n  playground  {url}/\n  try         {format_curl_line(url, vocabulary)}\n\nCtrl-C stops the server.", flush=True
        )
        while True:
            signal.pause()
    except KeyboardInterrupt:
        log.info("serve: stopping")
    finally:
        if ray.is_initialized():
            with contextlib.suppress(Exception):  # Serve may not have started
                ray_serve.delete(APPLICATION_NAME)  # waits for requests in flight, unlike shutdown
            ray_serve.shutdown()
            ray.shutdown()


def _raise_keyboard_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _find_start_failure(error: BaseException) -> str:
    """Return the last line of a failed replica's traceback, which is only in the deployment's status, not in ``error``."""
    from ray import serve as ray_serve

    application = ray_serve.status().applications.get(APPLICATION_NAME)
    messages = [deployment.message for deployment in application.deployments.values()] if application else []
    failures = [message for message in messages if "Error" in message]
    lines = [line.strip() for line in (failures or [str(error)])[0].splitlines() if line.strip()]
    return lines[-1][:400] if lines else type(error).__name__


if __name__ == "__main__":
    # Under -m this file is the module __main__, which Ray's workers cannot import: run the importable one.
    from serve import app

    sys.exit(exit_code(app.main))
