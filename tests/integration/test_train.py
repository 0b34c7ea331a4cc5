"""Training for real: Ray Train, DeepSpeed, a tiny GPT-2. What is killed meanwhile: ``test_train_kill.py``."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from udrl import storage, tokenizer
from udrl.commands import Command, CommandVocabulary
from udrl.errors import UserError
from udrl.recipe import Recipe
from udrl.train import fit as train

pytestmark = pytest.mark.usefixtures("local_ray")


def recipe(run: str, **more: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "tiny",
        "storage": run,
        "resume": "if_possible",
        "tasks": ["text_to_image", "image_search"],
        "intents": {"limit": 10},
        "student": {"depth": 2, "width": 128, "vocab_size": 500, "context": 64},
        "train": {"epochs": 2, "batch_tokens": 512, "checkpoint_every": 10, **more.pop("train", {})},
        "evaluate": {"lengths": [6, 10]},
    }
    return Recipe.model_validate(values | more)


def test_an_exported_student_loads_in_plain_transformers_and_is_not_trained_twice(
    run_with_episodes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    facts = train.run(recipe(run_with_episodes))
    folder = storage.join(run_with_episodes, "student")
    model = AutoModelForCausalLM.from_pretrained(folder)
    words, vocabulary = tokenizer.load(folder), CommandVocabulary.load(folder)
    assert model.config.vocab_size == len(words)
    assert set(vocabulary.tasks) == {"text_to_image", "image_search"}
    ids = tokenizer.encode_request(words, vocabulary, "poster of an owl", Command(task="image_search", words=5, reward=4))
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)
    assert out.shape[1] <= len(ids) + 5
    losses = [loss for _, loss in facts["history"]]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5  # it learns
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())

    assert train.run(recipe(run_with_episodes)) == facts
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(UserError, match="other settings"):
        train.run(recipe(run_with_episodes, train={"epochs": 3}, resume="always"))


def test_two_workers_under_zero_3_learn_what_one_does_in_smaller_passes(run_with_episodes: str) -> None:
    """ZeRO 1 on two workers is what the kill tests have, 0 and 2 what the benchmark's memory part has."""
    settings = {"precision": "fp32", "checkpoint_every": 10, "epochs": 3}
    one = train.run(recipe(run_with_episodes, train=settings))
    more = {"workers": 2, "zero_stage": 3, "micro_batch_rows": 3}  # three rows and one: accumulation, unevenly
    two = train.run(recipe(run_with_episodes, train=settings | more))
    assert two["parameters"] == one["parameters"]
    assert two["workers"] == 2
    assert [step for step, _ in one["history"]] == [step for step, _ in two["history"]]
    for (_, a), (_, b) in zip(one["history"], two["history"], strict=True):
        assert a == pytest.approx(b, rel=2e-3)


def test_no_episode_is_a_user_s_error(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    storage.write_json(storage.join(run, "generate.json"), {"ledger": "x", "scoring": "x", "accepted": 0})
    with pytest.raises(UserError, match="no episodes"):
        train.run(recipe(run))
