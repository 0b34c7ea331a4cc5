"""A driver for the kill tests: ``python driver.py RECIPE ENGINE [all]``, the whole generate stage or only its engine part.

The engines log every request that they take, so that a test can count the requests that were generated twice.
"""

import asyncio
import os
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.dummy_engine import DummyEngine
from udrl.context import StageContext
from udrl.errors import exit_code


def log(row: dict[str, Any]) -> None:
    import ray

    # One write of a short line to a file opened for appending is atomic.
    with open(os.environ["UDRL_REQUEST_LOG"], "a", encoding="utf-8") as out:
        out.write(f"{row['episode_id']} {os.getpid()} {ray.get_runtime_context().get_node_id()}\n")


class LoggedDummy(DummyEngine):
    async def answer(self, row: dict[str, Any]) -> dict[str, Any]:
        log(row)
        return await super().answer(row)


class Stuck(DummyEngine):
    """Take requests and never answer."""

    async def answer(self, row: dict[str, Any]) -> dict[str, Any]:
        self.never = asyncio.get_running_loop().create_future()  # an attribute, or it would be garbage-collected
        return await self.never


def logged_engine() -> type:
    """Return the class of a real engine. The workers of the others are spared the import of vLLM, eight seconds each."""
    from udrl.policies.engine_actor import EngineActor

    class LoggedEngine(EngineActor):
        async def answer(self, row: dict[str, Any]) -> dict[str, Any]:
            log(row)
            return await super().answer(row)

    return LoggedEngine


ENGINES: dict[str, Callable[[], type]] = {"vllm": logged_engine, "dummy": lambda: LoggedDummy, "stuck": lambda: Stuck}


def main(argv: list[str]) -> None:
    from udrl import cluster
    from udrl.command_line import load
    from udrl.generate import stage as generate
    from udrl.policies.stage import complete

    if argv[1] != "vllm":  # Ray's builder of the stage would import it for a class of errors: eight seconds
        sys.modules["vllm"] = None  # type: ignore[assignment]
    recipe, engine = load(argv[0]), ENGINES[argv[1]]()
    if "all" in argv:
        generate.run(recipe, engine_actor=engine)
    else:
        prepared = generate.prepare_generation(recipe)
        cluster.connect()
        complete(prepared.policy, prepared.requests, prepared.ledger, "generate", context=StageContext.of(recipe, engine))


if __name__ == "__main__":
    # As a module of its own name, so that the workers can import the classes.
    import driver

    sys.exit(exit_code(driver.main))  # type: ignore[arg-type]
