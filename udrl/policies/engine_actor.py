"""The request actor that owns a vLLM engine.

Importing this module imports vLLM, which takes eight seconds; only the code that builds the stage and its workers do.
"""

from typing import Any

from udrl import internals
from udrl.policies.actor import RequestActor
from udrl.policies.policy import Row

_EngineStage: Any = internals.engine_stage_class()


class EngineActor(RequestActor, _EngineStage):
    """Ray Data LLM's vLLM stage, with finish reasons, cached tokens and times."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        max_num_seqs = internals.max_num_seqs(self)
        self.prepare(
            max_num_seqs + max(8, max_num_seqs // 8)
        )  # a few wait in the engine, so that a free place is filled at once

    async def answer(self, row: Row) -> Row:
        output = await internals.generate_final_output(self, row)
        completion = output.outputs[0]
        top = sorted(completion.logprobs[0].values(), key=lambda t: -t.logprob) if completion.logprobs else []
        return {
            "completion": completion.text,
            "finish_reason": completion.finish_reason or "",
            "input_tokens": len(output.prompt_token_ids),
            "cached_tokens": output.num_cached_tokens or 0,
            "output_tokens": len(completion.token_ids),
            "first_token_seconds": output.metrics.first_token_latency if output.metrics else 0.0,
            "top_tokens": [token.decoded_token or "" for token in top],
            "top_logprobs": [float(token.logprob) for token in top],
            "error": "",
        }
