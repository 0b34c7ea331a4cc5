"""A driver for the kill tests: ``python driver.py RECIPE ENGINE [all]``, the whole generate stage or its engine part alone.

The engines log every request that they take, so a test can count what was paid for twice.
"""

import asyncio
import os
import sys
from typing import Any

from benchmarks.dummy_engine import DummyEngine
from udrl.context import StageContext
from udrl.errors import exit_code
from udrl.policies.actor import EngineActor


def log(row: dict[str, Any]) -> None:
    import ray

    # One write of a short line to a file opened for appending is atomic.
    with open(os.environ["UDRL_REQUEST_LOG"], "a", encoding="utf-8") as out:
        out.write(f"{row['episode_id']} {os.getpid()} {ray.get_runtime_context().get_node_id()}\n")


class LoggedEngine(EngineActor):
    async def answer(self, row: dict[str, Any]) -> dict[str, Any]:
        log(row)
        return await super().answer(row)


class LoggedDummy(DummyEngine):
    async def answer(self, row: dict[str, Any]) -> dict[str, Any]:
        log(row)
        return await super().answer(row)


class Stuck(DummyEngine):
    """Takes requests and never answers."""

    async def answer(self, row: dict[str, Any]) -> dict[str, Any]:
        self.never = asyncio.get_running_loop().create_future()  # kept, or it would be collected and the wait with it
        return await self.never


ENGINES: dict[str, type] = {"vllm": LoggedEngine, "dummy": LoggedDummy, "stuck": Stuck}


def main(argv: list[str]) -> None:
    from udrl import cluster
    from udrl.command_line import load
    from udrl.generate import stage as generate
    from udrl.generate.prepare import prepare
    from udrl.policies.stage import complete

    recipe, engine = load(argv[0]), ENGINES[argv[1]]
    if "all" in argv:
        generate.run(recipe, engine_actor=engine)
    else:
        work = prepare(recipe)
        cluster.connect()
        complete(work.policy, work.requests, work.ledger, "generate", context=StageContext.of(recipe, engine))


if __name__ == "__main__":
    # As a module of its own name, so that the workers can import the classes.
    import driver

    sys.exit(exit_code(driver.main))  # type: ignore[arg-type]
