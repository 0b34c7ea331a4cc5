"""Exports load in plain transformers and vLLM, which generate the same tokens, and the card's snippet runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes.fake_vocabulary import fake_vocabulary

from udrl import recipe, tokenizer
from udrl.commands import Command, CommandVocabulary
from udrl.policies.policy import engine_environment, engine_kwargs
from udrl.policies.student import engine_for_student
from udrl.recipe import Engine, Placement
from udrl.run import GenerateSummary, StudentPaths, TrainingSummary
from udrl.train import gpt2
from udrl.train.export import Lineage, export_student, gather_weights

TASKS = ["text_to_image", "image_search"]
NEW_TOKENS = 16

# Runs vLLM in a process of its own, because it reads its environment only once.
GENERATE = """
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
    """Export a tiny student whose weights are so large that no two tokens are about equally likely."""
    import torch

    vocabulary = fake_vocabulary(TASKS)
    student_tokenizer = tokenizer.train_tokenizer([" a red fox in deep snow", " poster of an owl"] * 9, vocabulary, 400)
    tokenizer_folder = str(tmp_path_factory.mktemp("tokenizer"))
    student_tokenizer.save_pretrained(tokenizer_folder)
    vocabulary.save(tokenizer_folder)
    config = recipe.from_values(
        {
            "name": "tiny",
            "storage": tokenizer_folder,
            "tasks": TASKS,
            "intents": {"limit": 3},
            "student": {"context": 128, "depth": 2},
        },
        "t",
    )
    network = gpt2.build_network(config.student, config.train, student_tokenizer, seed=3)
    with torch.no_grad():
        for weights in network.parameters():
            if weights.ndim > 1:
                weights.mul_(8)
    folder = str(tmp_path_factory.mktemp("student"))
    engine = SimpleNamespace(zero_optimization_stage=lambda: 0)
    assert gather_weights(engine, network, rank=1) == {}
    weights = gather_weights(engine, network, rank=0)
    summary = TrainingSummary(fingerprint="abc", validation_loss=2.0)
    lineage = Lineage(config, GenerateSummary(accepted=40, ledger="", scoring=""))
    export_student(weights, network, tokenizer_folder, folder, summary, lineage)
    return folder


def requests_of(folder: str) -> list[list[int]]:
    student_tokenizer, vocabulary = tokenizer.load_tokenizer(folder), CommandVocabulary.load(folder)
    requests = [
        ("a red fox", "text_to_image", 5),
        ("poster of an owl in deep snow", "image_search", 9),
        ("owl", "image_search", 3),
        ("<|end|> snow", "text_to_image", 12),
    ]
    return [
        tokenizer.encode_request(student_tokenizer, vocabulary, intent, Command(task=task, words=n, reward=4))
        for intent, task, n in requests
    ]


def test_transformers_and_vllm_generate_the_same_tokens(exported: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    expected = []
    for ids in requests_of(exported):
        # Only the sampling is overridden: the end, padding and banned tokens come from the export.
        out = network.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            temperature=None,
            top_k=None,
            top_p=None,
            min_p=None,
            max_new_tokens=NEW_TOKENS,
        )
        expected.append(out[0, len(ids) :].tolist())
    placement = Placement()
    settings = engine_kwargs(engine_for_student(Engine(dtype="float32", max_num_seqs=8), 128), placement)
    settings["logits_processors"] = list(settings["logits_processors"])
    # Without the tests' path: vLLM must find the logits processor in the installed package.
    process = subprocess.run(
        [sys.executable, "-c", GENERATE, json.dumps([exported, requests_of(exported), settings])],
        env={**os.environ, **engine_environment(placement)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert json.loads(process.stdout.splitlines()[-1]) == expected
    assert len({tuple(tokens) for tokens in expected}) > 1
    banned = set(tokenizer.banned_ids(tokenizer.load_tokenizer(exported), CommandVocabulary.load(exported)))
    assert not banned & {token for tokens in expected for token in tokens}


def test_an_export_has_the_files_of_a_hugging_face_model(exported: str) -> None:
    from safetensors import safe_open

    names = sorted(os.listdir(exported))
    for name in ("README.md", "commands.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        assert name in names
    with safe_open(os.path.join(exported, "model.safetensors"), "pt") as file:
        dtypes = {str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert dtypes == {"torch.bfloat16"}
    assert TrainingSummary.load(StudentPaths(exported).training).parameters == parameters
    sampling = json.loads((Path(exported) / "generation_config.json").read_text())
    assert (sampling["do_sample"], sampling["temperature"], sampling["top_k"], sampling["min_p"]) == (True, 0.7, 0, 0.08)
    assert sampling["max_new_tokens"] == 64  # half of the positions, which is less than the recipe's 72


def test_the_card_s_snippet_runs(exported: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = (Path(exported) / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace('folder = "."', f"folder = {exported!r}"), {})
    assert "<|" not in capsys.readouterr().out
