"""An engine that answers at once: all that Ray Data, the ledger and the files cost, without a model."""

import asyncio
from typing import Any

from ray.llm._internal.batch.stages.base import StatefulStageUDF

from udrl.policies.actor import NOTHING, Answering, Row

WORDS = "soft wide golden quiet misty bold paper velvet harbor lantern meadow copper winter signal orchard ribbon".split()  # noqa: SIM905


class DummyEngine(Answering, StatefulStageUDF):
    """Stands in for ``udrl.policies.actor.EngineActor`` in ``engine.complete(..., actor=DummyEngine)``."""

    def __init__(
        self, data_column: str, expected_input_keys: list[str], *, engine_kwargs: dict[str, Any], **settings: Any
    ) -> None:
        super().__init__(data_column, expected_input_keys)
        self.begin(engine_kwargs["max_num_seqs"])

    async def answer(self, row: Row) -> Row:
        for name in ("prompt", "tokenized_prompt", "sampling_params"):
            row.pop(name, None)
        await asyncio.sleep(0)
        chosen = [WORDS[(row["episode_id"] >> shift) % len(WORDS)] for shift in range(0, 44, 4)]
        completion = f" {row['intent']}, {' '.join(chosen)}"
        return {**NOTHING, "completion": completion, "finish_reason": "stop", "input_tokens": 200, "output_tokens": 16}
