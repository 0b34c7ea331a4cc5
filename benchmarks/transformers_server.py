"""The baseline of ``benchmarks.serving``: a student behind FastAPI and transformers' ``generate``, the simplest server."""

import asyncio
from contextlib import asynccontextmanager
from typing import Any


def create_transformers_app(student: str, batch_size: int) -> Any:
    """Return a FastAPI application with ``POST /v1/completions`` for the student in a local folder.

    Waiting requests are generated together, at most ``batch_size`` at a time, with padding on the left.
    """
    import torch
    from fastapi import FastAPI
    from transformers import GPT2LMHeadModel

    from udrl import commands
    from udrl import tokenizer as tokenizers
    from udrl.commands import CommandVocabulary

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network: Any = GPT2LMHeadModel.from_pretrained(student, dtype=torch.bfloat16)
    network.to(device).eval()
    tokenizer, vocabulary = tokenizers.load_tokenizer(student), CommandVocabulary.load(student)
    command = vocabulary.default(next(iter(vocabulary.tasks)))
    end, pad = tokenizers.control_ids(tokenizer, [commands.END, commands.PAD])
    queue: asyncio.Queue[tuple[dict[str, Any], asyncio.Future[dict[str, Any]]]] = asyncio.Queue()

    def generate(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = [tokenizers.encode_request(tokenizer, vocabulary, body["prompt"], command) for body in bodies]
        width, limit = max(map(len, rows)), max(body["max_tokens"] for body in bodies)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        with torch.inference_mode():
            output = network.generate(
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
        responses = []
        for row in output[:, width:].tolist():
            tokens = [token for token in row if token != pad]
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            responses.append({"choices": [{"text": text}], "usage": {"completion_tokens": len(tokens)}})
        return responses

    async def generate_batches() -> None:
        while True:
            batch = [await queue.get()]
            while len(batch) < batch_size:
                try:
                    batch.append(await asyncio.wait_for(queue.get(), 0.01))
                except TimeoutError:
                    break
            responses = await asyncio.to_thread(generate, [body for body, _ in batch])
            for (_, future), response in zip(batch, responses, strict=True):
                future.set_result(response)

    @asynccontextmanager
    async def lifespan(_: Any) -> Any:
        worker = asyncio.create_task(generate_batches())
        yield
        worker.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/completions")
    async def completions(body: dict[str, Any]) -> dict[str, Any]:
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        queue.put_nowait((body, future))
        return await future

    return app
