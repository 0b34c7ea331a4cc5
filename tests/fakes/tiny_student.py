"""A student that is small enough for any test, and an object store and a port to serve it with."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fakes.fake_vocabulary import fit_to
from udrl import commands, storage
from udrl import tokenizer as student_tokenizer
from udrl.run import StudentPaths, TrainingSummary

TASKS = ["text_to_image", "image_search"]
MAX_WORDS = 12
# The loopback object store accepts any credentials, but requires some.
STORE_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "none",
    "AWS_SECRET_ACCESS_KEY": "none",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def export_tiny_student(folder: Path, seed: int = 0) -> str:
    """Export an untrained GPT-2 as the train stage exports a student; return its revision."""
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
    words = ["watercolor", "dinosaur", "birthday", "card", "poster", "lighthouse", "soft", "morning", "light", "garden"]
    texts = [" " + " ".join(rng.choice(words, 6)) for _ in range(200)]
    tokenizer = student_tokenizer.train_tokenizer(texts, vocabulary, vocab_size=400)
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
    summary = TrainingSummary(fingerprint="tiny", weights=f"weights-{seed}")
    summary.save(StudentPaths(str(folder)).training)
    return summary.weights


@contextlib.contextmanager
def in_object_store(folder: Path) -> Iterator[str]:
    """Copy the student in ``folder`` to an S3 server on loopback; yield its URI.

    Processes that start meanwhile inherit credentials for it.
    """
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs one line per request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    previous = {name: os.environ.get(name) for name in STORE_ENVIRONMENT}
    os.environ.update(STORE_ENVIRONMENT)
    try:
        query = f"?scheme=http&endpoint_override={host}:{port}&allow_bucket_creation=true"
        storage.open_filesystem(f"s3://models{query}")[0].create_dir("models")
        for file in folder.iterdir():
            storage.write_bytes(f"s3://models/tiny/student/{file.name}{query}", file.read_bytes())
        yield f"s3://models/tiny/student{query}"
    finally:
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        server.stop()


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
