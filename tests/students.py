"""A student small enough for any test, and where to serve it."""

import json
import socket
from pathlib import Path

import numpy as np

from udrl import commands
from udrl.student import tokenizer as student_tokenizer
from udrl.student.export import TRAINING

TASKS = ["text_to_image", "image_search"]
MAX_WORDS = 12


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
    vocabulary, _ = commands.learn(TASKS, columns, max_words=MAX_WORDS, reward_bins=5, rank_within="task")
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
