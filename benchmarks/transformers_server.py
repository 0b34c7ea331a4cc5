"""The rival of ``benchmarks.serving``: a student behind FastAPI and transformers' ``generate``, as is written in an afternoon.

With ``most`` above 1, requests that wait are gathered into one batch of so many at most, with padding on the left.
"""

import asyncio
from contextlib import asynccontextmanager
from typing import Any


def create(student: str, most: int) -> Any:
    """A FastAPI application with ``POST /v1/completions`` of the student in the folder ``student``."""
    import torch
    from fastapi import FastAPI
    from transformers import GPT2LMHeadModel

    from udrl import commands
    from udrl import tokenizer as tokenizers
    from udrl.commands import CommandVocabulary

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network: Any = GPT2LMHeadModel.from_pretrained(student, dtype=torch.bfloat16)
    network.to(device).eval()
    tokenizer, vocabulary = tokenizers.load(student), CommandVocabulary.load(student)
    command = vocabulary.default(next(iter(vocabulary.tasks)))
    end, pad = tokenizers.control_ids(tokenizer, [commands.END, commands.PAD])
    queue: asyncio.Queue[tuple[dict[str, Any], asyncio.Future[dict[str, Any]]]] = asyncio.Queue()

    def write(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = [tokenizers.encode_request(tokenizer, vocabulary, body["prompt"], command) for body in bodies]
        width, limit = max(map(len, rows)), max(body["max_tokens"] for body in bodies)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        with torch.inference_mode():
            made = network.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                temperature=0.7,
                min_p=0.08,
                top_k=0,
                max_new_tokens=limit,
                eos_token_id=end,
                pad_token_id=pad,
            )
        answers = []
        for row in made[:, width:].tolist():
            written = [token for token in row if token != pad]
            text = tokenizer.decode(written, skip_special_tokens=True)
            answers.append({"choices": [{"text": text}], "usage": {"completion_tokens": len(written)}})
        return answers

    async def work() -> None:
        while True:
            batch = [await queue.get()]
            while len(batch) < most:
                try:
                    batch.append(await asyncio.wait_for(queue.get(), 0.01))
                except TimeoutError:
                    break
            answers = await asyncio.to_thread(write, [body for body, _ in batch])
            for (_, future), answer in zip(batch, answers, strict=True):
                future.set_result(answer)

    @asynccontextmanager
    async def life(_: Any) -> Any:
        worker = asyncio.create_task(work())
        yield
        worker.cancel()

    app = FastAPI(lifespan=life)

    @app.post("/v1/completions")
    async def completions(body: dict[str, Any]) -> dict[str, Any]:
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        queue.put_nowait((body, future))
        return await future

    return app
