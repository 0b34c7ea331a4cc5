"""The model card: its front matter, license notices, metrics and lineage."""

from typing import Any

import pytest
from test_monitor import VOCABULARY

from udrl import recipe
from udrl.recipe import Recipe
from udrl.run import GenerateSummary, TrainingSummary
from udrl.train.export import render_model_card

SUMMARY = TrainingSummary(
    parameters=6_400_000,
    steps=1200,
    seconds=300.0,
    tokens_per_second=6372.0,
    workers=2,
    history=[(1, 7.0), (1200, 2.5)],
    validation_loss=2.871,
    validation={"length_error": 1.6, "within_two": 0.78, "length_error/paint": 2.25, "within_two/paint": 0.5},
    shape={"depth": 6, "width": 384, "heads": 6, "lr": 0.00083},
    fingerprint="0123456789abcdef",
)
GENERATE = GenerateSummary(requested=1680, accepted=1414, rejected=266, ledger="led9e2", scoring="sco4f1", revision="rev77")


def make_recipe(**values: Any) -> Recipe:
    defaults = {"name": "tiny", "storage": "s3://key:secret@bucket/x", "tasks": ["text_to_image"], "intents": {"limit": 3}}
    return recipe.from_values({**defaults, **values}, "test")


def render(teacher: str = "bundled:smollm2-135m-instruct", **values: Any) -> str:
    return render_model_card(make_recipe(teacher={"model": teacher}, **values), SUMMARY, VOCABULARY, GENERATE)


def front(text: str) -> Any:
    from huggingface_hub import ModelCard

    return ModelCard(text).data


def test_the_front_matter_is_valid_for_the_hub() -> None:
    head = front(render())
    assert (head.license, head.language, head.library_name, head.pipeline_tag) == (
        "apache-2.0",
        ["en"],
        "transformers",
        "text-generation",
    )
    assert head.base_model is None  # its weights start at random
    assert head.to_dict()["teacher"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    fine_tuned = front(render(student={"init": "openai-community/gpt2"}))
    assert (fine_tuned.base_model, fine_tuned.license) == ("openai-community/gpt2", "other")


@pytest.mark.parametrize(
    ("teacher", "name", "title", "notice"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "prompts", "# Llama prompts", "**Built with Llama**"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-prompts", "# llama-prompts", "**Built with Llama**"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "prompts", "# Llama 3 prompts", "**Built with Meta Llama 3**"),
        ("Qwen/Qwen3-8B", "prompts", "# prompts", ""),
    ],
)
def test_a_llama_s_student_has_its_name_and_notice(teacher: str, name: str, title: str, notice: str) -> None:
    lines = render(teacher, name=name).splitlines()
    assert title in lines
    assert [line for line in lines if line.startswith("**Built")] == ([notice] if notice else [])


def test_metrics_and_lineage_are_in_the_tables() -> None:
    text = render()
    for row in (
        "| validation loss per target token | 2.871 |",
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


def test_every_bin_of_every_task_is_in_the_table() -> None:
    text = render()
    for name, task in VOCABULARY.tasks.items():
        for b in range(VOCABULARY.reward_bins):
            assert f"| `{name}` | {b} |" in text
        assert f"| {task.counts[0]:,} | {task.achieved_reward[0]:.2f} | {task.achieved_relevance[0]:.2f} |" in text


def test_a_fine_tuned_student_gets_the_any_command_and_may_have_no_metrics() -> None:
    vocabulary = VOCABULARY.model_copy(update={"objective": "sft"})
    text = render_model_card(make_recipe(), TrainingSummary(parameters=1), vocabulary, None)
    assert '["<|task:paint|>", "<|words:any|>", "<|reward:any|>"]' in text
    assert "No metric was measured." in text
