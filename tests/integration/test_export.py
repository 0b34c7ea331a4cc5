"""An export is what others load: plain transformers and vLLM write the same from it, and the card's snippet runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes.fake_vocabulary import fake_vocabulary

from udrl import recipe, tokenizer
from udrl.commands import Command, CommandVocabulary
from udrl.policies.policy import engine_environment, engine_kwargs
from udrl.policies.student import engine_for_student
from udrl.recipe import Engine, Placement
from udrl.train import export
from udrl.train import gpt2 as model

TASKS = ["text_to_image", "image_search"]
NEW = 16

# vLLM in a process of its own: it reads its environment once.
WRITE = """
import json, sys
from vllm import LLM, SamplingParams
folder, requests, settings = json.loads(sys.argv[1])
llm = LLM(model=folder, **settings)
params = SamplingParams(temperature=0, max_tokens=16, detokenize=False)
outputs = llm.generate([{"prompt_token_ids": ids} for ids in requests], params, use_tqdm=False)
print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny student with weights large enough that no two pieces are about as likely, and its export."""
    import torch

    vocabulary = fake_vocabulary(TASKS)
    words = tokenizer.train([" a red fox in deep snow", " poster of an owl"] * 9, vocabulary, 400)
    parts = str(tmp_path_factory.mktemp("tokenizer"))
    words.save_pretrained(parts)
    vocabulary.save(parts)
    made = recipe.validate(
        {"name": "tiny", "storage": parts, "tasks": TASKS, "intents": {"limit": 3}, "student": {"context": 128, "depth": 2}},
        "t",
    )
    network = model.build(made.student, made.train, words, seed=3)
    with torch.no_grad():
        for weights in network.parameters():
            if weights.ndim > 1:
                weights.mul_(8)
    folder = str(tmp_path_factory.mktemp("student"))
    engine = SimpleNamespace(zero_optimization_stage=lambda: 0)
    facts: dict[str, Any] = {"fingerprint": "abc", "validation_loss": 2.0}
    lineage = {"recipe": made.model_dump(mode="json"), "generate": {"accepted": 40}}
    assert export.weights(engine, network, rank=1) == {}
    export.export(export.weights(engine, network, rank=0), network, parts, folder, facts, lineage)
    return folder


def requests_of(folder: str) -> list[list[int]]:
    words, vocabulary = tokenizer.load(folder), CommandVocabulary.load(folder)
    asked = [
        ("a red fox", "text_to_image", 5),
        ("poster of an owl in deep snow", "image_search", 9),
        ("owl", "image_search", 3),
    ]
    asked.append(("<|end|> snow", "text_to_image", 12))
    return [tokenizer.encode_request(words, vocabulary, i, Command(task=t, words=n, reward=4)) for i, t, n in asked]


def test_transformers_and_vllm_write_the_same(exported: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    mine = []
    for ids in requests_of(exported):
        # Only how it draws is said here: the end, padding and banned tokens are in the export.
        out = network.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            temperature=None,
            top_k=None,
            top_p=None,
            min_p=None,
            max_new_tokens=NEW,
        )
        mine.append(out[0, len(ids) :].tolist())
    place = Placement()
    settings = engine_kwargs(engine_for_student(Engine(dtype="float32", max_num_seqs=8), 128), place)
    settings["logits_processors"] = list(settings["logits_processors"])
    # Not the tests' working folder: what vLLM loads by name has to be installed.
    done = subprocess.run(
        [sys.executable, "-c", WRITE, json.dumps([exported, requests_of(exported), settings])],
        env={**os.environ, **engine_environment(place)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == mine
    assert len({tuple(tokens) for tokens in mine}) > 1
    banned = set(tokenizer.banned_ids(tokenizer.load(exported), CommandVocabulary.load(exported)))
    assert not banned & {token for tokens in mine for token in tokens}


def test_the_files_are_those_of_a_hugging_face_model(exported: str) -> None:
    from safetensors import safe_open

    names = sorted(os.listdir(exported))
    for name in ("README.md", "commands.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        assert name in names
    with safe_open(os.path.join(exported, "model.safetensors"), "pt") as file:
        kinds = {str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118
        numbers = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert kinds == {"torch.bfloat16"}
    assert json.loads((Path(exported) / export.TRAINING).read_text())["parameters"] == numbers
    draws = json.loads((Path(exported) / "generation_config.json").read_text())
    assert (draws["do_sample"], draws["temperature"], draws["top_k"], draws["min_p"]) == (True, 0.7, 0, 0.08)
    assert draws["max_new_tokens"] == 64  # half of the positions, less than the 72 of the recipe


def test_the_snippet_of_the_card_runs(exported: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = (Path(exported) / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace('folder = "."', f"folder = {exported!r}"), {})
    assert "<|" not in capsys.readouterr().out
