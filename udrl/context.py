"""Settings that a stage passes unchanged through all of its layers."""

from dataclasses import dataclass

from udrl.recipe import Recipe


@dataclass(frozen=True)
class StageContext:
    """The settings that every layer of a stage takes in addition to its own arguments.

    ``engine_actor`` replaces the vLLM actor by another ``udrl.policies.actor.RequestActor``; benchmarks and tests use it to
    measure or exercise everything except the engine.
    """

    watchdog_minutes: float = 30.0
    engine_actor: type | None = None

    @classmethod
    def of(cls, recipe: Recipe, engine_actor: type | None = None) -> "StageContext":
        return cls(recipe.watchdog_minutes, engine_actor)


DEFAULT_CONTEXT = StageContext()
