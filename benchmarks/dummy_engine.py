"""An engine that answers at once, to measure the cost of everything else: Ray Data, the ledger and the files."""

import asyncio
from typing import Any

from udrl import internals
from udrl.policies.actor import EMPTY_ANSWER, RequestActor
from udrl.policies.policy import Row

WORDS = "soft wide golden quiet misty bold paper velvet harbor lantern meadow copper winter signal orchard ribbon".split()  # noqa: SIM905

_Stage: Any = internals.stage_class()


class DummyEngine(RequestActor, _Stage):
    """Replace ``EngineActor``: ``StageContext(engine_actor=DummyEngine)``."""

    def __init__(
        self, data_column: str, expected_input_keys: list[str], *, engine_kwargs: dict[str, Any], **settings: Any
    ) -> None:
        super().__init__(data_column, expected_input_keys)
        self.prepare(engine_kwargs["max_num_seqs"])

    async def answer(self, row: Row) -> Row:
        for name in ("prompt", "tokenized_prompt", "sampling_params"):
            row.pop(name, None)
        await asyncio.sleep(0)
        words = [WORDS[(row["episode_id"] >> shift) % len(WORDS)] for shift in range(0, 44, 4)]
        completion = f" {row['intent']}, {' '.join(words)}"
        return {**EMPTY_ANSWER, "completion": completion, "finish_reason": "stop", "input_tokens": 200, "output_tokens": 16}
