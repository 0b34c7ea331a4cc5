"""A student small enough for any test, and where to serve it."""

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from fakes.vocabularies import fit_to

from udrl import commands, storage
from udrl import tokenizer as student_tokenizer
from udrl.train.export import TRAINING

TASKS = ["text_to_image", "image_search"]
MAX_WORDS = 12
# What the loopback object store lets in: anything, but something.
STORE = {
    "AWS_ACCESS_KEY_ID": "none",
    "AWS_SECRET_ACCESS_KEY": "none",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def export_tiny_student(folder: Path, seed: int = 0) -> str:
    """An untrained GPT-2 exported as a real student is: weights, tokenizer, commands.json, and the revision returned."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    rng = np.random.default_rng(0)
    columns = {
        "task": np.repeat(TASKS, 40),
        "intent_id": np.arange(80) // 4,
        "n_words": rng.integers(3, MAX_WORDS, 80),
        "reward": rng.random(80),
        "relevance": rng.random(80),
    }
    vocabulary = fit_to(TASKS, columns, max_words=MAX_WORDS)
    words = ["watercolour", "dinosaur", "birthday", "card", "poster", "lighthouse", "soft", "morning", "light", "garden"]
    texts = [" " + " ".join(rng.choice(words, 6)) for _ in range(200)]
    tokenizer = student_tokenizer.train(texts, vocabulary, vocab_size=400)
    end, pad = student_tokenizer.control_ids(tokenizer, [commands.END, commands.PAD])
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=128,
        n_layer=2,
        n_head=2,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=pad,
    )
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    vocabulary.save(str(folder))
    revision = f"weights-{seed}"
    (folder / TRAINING).write_text(json.dumps({"weights": revision}))
    return revision


@contextlib.contextmanager
def in_an_object_store(folder: Path) -> Iterator[str]:
    """The student in ``folder``, put into an S3 server on loopback; its URI. Processes started meanwhile have a way in."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    kept = {name: os.environ.get(name) for name in STORE}
    os.environ.update(STORE)
    try:
        query = f"?scheme=http&endpoint_override={host}:{port}&allow_bucket_creation=true"
        storage.open_filesystem(f"s3://models{query}")[0].create_dir("models")
        for file in folder.iterdir():
            storage.write_bytes(f"s3://models/tiny/student/{file.name}{query}", file.read_bytes())
        yield f"s3://models/tiny/student{query}"
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        server.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
