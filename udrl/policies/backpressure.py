"""Engines wait for the files: what is generated and not yet written is lost with the run."""

from typing import Any

from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

# Blocks on their way to a file, for each engine. Ray's own policies count bytes: completions are so small that a slow
# storage would let hours of them pile up in memory.
UNWRITTEN = 2


class WrittenFirst(BackpressurePolicy):
    """No new shard for the engines while too many wait to be written."""

    def can_add_input(self, op: Any) -> bool:
        if not isinstance(op, ActorPoolMapOperator) or not op.output_dependencies:
            return True
        (writer,) = op.output_dependencies
        unwritten = self._topology[writer].total_enqueued_input_blocks() + writer.num_active_tasks()
        return unwritten < UNWRITTEN * max(1, op.get_actor_info().running)


def apply(dataset: Any) -> None:
    """Add the policy to this dataset's own, and to no other's."""
    policies = [*ENABLED_BACKPRESSURE_POLICIES, WrittenFirst]
    dataset.context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, policies)
