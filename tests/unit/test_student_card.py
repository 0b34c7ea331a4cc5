"""The model card: what the Hub reads from it, what the licences ask for, and a snippet that runs."""

from typing import Any

import pytest
from test_monitor import VOCABULARY

from udrl import recipe
from udrl.train import model_card as card

TRAINING = {
    "parameters": 6_400_000,
    "steps": 1200,
    "seconds": 300.0,
    "tokens_per_second": 6372.0,
    "workers": 2,
    "history": [(1, 7.0), (1200, 2.5)],
    "validation_loss": 2.871,
    "length_error": 1.6,
    "within_two": 0.78,
    "length_error/paint": 2.25,
    "within_two/paint": 0.5,
    "shape": {"depth": 6, "width": 384, "heads": 6, "lr": 0.00083},
    "fingerprint": "0123456789abcdef",
}
GENERATE = {"requested": 1680, "accepted": 1414, "rejected": 266, "ledger": "led9e2", "scoring": "sco4f1", "revision": "rev77"}


def written(teacher: str = "bundled:smollm2-135m-instruct", name: str = "made-up", **more: Any) -> str:
    values = {"name": name, "storage": "s3://key:secret@bucket/x", "tasks": ["text_to_image"], "intents": {"limit": 3}}
    made = recipe.validate({**values, "teacher": {"model": teacher}, **more.pop("recipe", {})}, "test")
    return card.text(made, {**TRAINING, **more}, VOCABULARY, {"recipe": {}, "generate": GENERATE, "round": 0})


def front(text: str) -> Any:
    from huggingface_hub import ModelCard

    return ModelCard(text).data


def test_the_hub_reads_its_head() -> None:
    head = front(written())
    assert (head.license, head.language, head.library_name, head.pipeline_tag) == (
        "apache-2.0",
        ["en"],
        "transformers",
        "text-generation",
    )
    assert head.base_model is None  # its weights start from nothing
    assert head.to_dict()["teacher"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    begun = front(written(recipe={"student": {"init": "openai-community/gpt2"}}))
    assert (begun.base_model, begun.license) == ("openai-community/gpt2", "other")


@pytest.mark.parametrize(
    ("teacher", "name", "title", "notice"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "prompts", "# Llama prompts", "**Built with Llama**"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-prompts", "# llama-prompts", "**Built with Llama**"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "prompts", "# Llama 3 prompts", "**Built with Meta Llama 3**"),
        ("Qwen/Qwen3-8B", "prompts", "# prompts", ""),
    ],
)
def test_a_llama_s_student_carries_its_name_and_notice(teacher: str, name: str, title: str, notice: str) -> None:
    lines = written(teacher, name).splitlines()
    assert title in lines
    assert [line for line in lines if line.startswith("**Built")] == ([notice] if notice else [])


def test_metrics_and_lineage_are_told() -> None:
    text = written()
    for row in (
        "| validation loss, a target token | 2.871 |",
        "| training loss of the last step | 2.500 |",
        "| mean distance from the commanded length | 1.6 words |",
        "| within two words of it, `paint` | 50% |",
        "| prompts accepted | 1,414 |",
        "| teacher's revision | `rev77` |",
        "| ledger of completions | `led9e2` |",
        "| scoring | `sco4f1` |",
        "| relevance | cosine of intent and prompt under the embedder `bundled:minilm` |",
    ):
        assert row in text
    assert "secret" not in text


def test_every_bin_of_every_task_stands_in_the_table() -> None:
    text = written()
    for name, learnt in VOCABULARY.tasks.items():
        for b in range(VOCABULARY.reward_bins):
            assert f"| `{name}` | {b} |" in text
        assert f"| {learnt.counts[0]:,} | {learnt.achieved_reward[0]:.2f} | {learnt.achieved_relevance[0]:.2f} |" in text


def test_a_fine_tuned_student_is_asked_for_any() -> None:
    plain = VOCABULARY.model_copy(update={"objective": "sft"})
    made = recipe.validate({"name": "x", "storage": "x", "tasks": ["text_to_image"], "intents": {"limit": 3}}, "test")
    text = card.text(made, {"parameters": 1}, plain, {"generate": {}})
    assert '["<|task:paint|>", "<|words:any|>", "<|reward:any|>"]' in text
    assert "None was measured." in text
