"""Samples and length metrics during training, which do not disturb it, and the arithmetic of MFU."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fakes.fake_vocabulary import fake_vocabulary
from transformers import GPT2Config

from udrl import tokenizer
from udrl.commands import ANY, Command
from udrl.recipe import Rewards, Student, Train
from udrl.run import ValidationIntent
from udrl.scoring.rewards import score_prompts
from udrl.tasks import load_tasks
from udrl.train import gpt2, monitor

TEXTS = ["a red fox in deep snow, soft light", "poster of an owl", "jazz night flyer, bold type"]
INTENTS = [
    ValidationIntent(task=task, intent=intent) for task in ("paint", "find") for intent in ("an owl", "jazz night in deep snow")
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A network this small would spend its time on waiting for other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


VOCABULARY = fake_vocabulary()
TOKENIZER = tokenizer.train_tokenizer([" " + t for t in TEXTS * 3], VOCABULARY, 400)


def network(dropout: float = 0.0) -> Any:
    return gpt2.build_network(Student(depth=2, width=64, heads=2, context=64, dropout=dropout), Train(), TOKENIZER, seed=3)


def observe(net: Any, **more: Any) -> monitor.Observation:
    return monitor.observe(net, TOKENIZER, VOCABULARY, INTENTS, 5, 12, **more)


def test_every_intent_gets_three_lengths_at_the_default_reward() -> None:
    samples = observe(network()).samples
    assert [s.intent for s in samples[::3]] == [row.intent for row in INTENTS]
    for task, statistics in VOCABULARY.tasks.items():
        commands_of_task = {(s.command.words, s.command.reward) for s in samples if s.command.task == task}
        assert commands_of_task == {(n, statistics.default_reward) for n in statistics.words}


def test_metrics_are_computed_from_the_samples() -> None:
    observation = observe(network())
    off = [abs(len(s.text.split()) - s.command.words) for s in observation.samples]
    assert observation.metrics["length_error"] == pytest.approx(np.mean(off))
    assert observation.metrics["within_two"] == pytest.approx(np.mean([n <= 2 for n in off]))
    assert observation.metrics["length_error/find"] == pytest.approx(np.mean(off[6:]))


def test_a_student_trained_without_commands_gets_the_any_command() -> None:
    observation = observe(network(), commanded=False)
    assert [(s.command.words, s.command.reward) for s in observation.samples] == [(ANY, ANY)] * len(INTENTS)
    assert set(observation.metrics) == {
        f"{metric}{task}" for metric in ("words", "coverage") for task in ("", "/paint", "/find")
    }


def test_a_sample_covers_the_words_that_name_its_subject() -> None:
    observation = observe(network())
    wanted = {"an owl": {"owl"}, "jazz night in deep snow": {"jazz", "night", "deep", "snow"}}
    for s in observation.samples:
        assert s.coverage == sum(word in s.text.split() for word in wanted[s.intent]) / len(wanted[s.intent])
    assert observation.metrics["coverage"] == pytest.approx(np.mean([s.coverage for s in observation.samples]))


def test_samples_have_the_reward_of_the_runs_scoring_and_none_if_they_would_be_rejected() -> None:
    task = load_tasks(["text_to_image"])[0]
    scorer = monitor.SampleScorer([task], Rewards())
    command = Command(task=task.name, words=9)

    def sample(text: str, ended: bool = True) -> monitor.StudentSample:
        return monitor.StudentSample("an owl", command, text, len(text.split()), 1.0, ended)

    good = sample("A snowy owl on a branch, soft light, detailed.")
    other = sample("A red tractor on a farm, soft light, detailed.")
    rewards = scorer.score([sample("an owl"), good, other, sample("an owl in", ended=False)])
    assert rewards[1] > rewards[2] > 0
    assert rewards[0] == rewards[3] == 0  # an echo; cut off
    relevance = float(scorer.embedder.relevance(["an owl"], [good.text])[0])
    assert rewards[1] == pytest.approx(
        score_prompts(["an owl"], [good.text], [task], [9], [relevance], Rewards().weights)["reward"][0]
    )
    assert scorer.score([]).tolist() == []


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_observing_does_not_change_the_training(kind: torch.dtype) -> None:
    net = network(dropout=0.2).to(kind)
    net.train()
    ids = torch.arange(30)[None]

    def loss() -> float:
        return float(net(input_ids=ids, labels=ids).loss.detach())

    torch.manual_seed(11)
    expected = [loss(), loss()]
    torch.manual_seed(11)
    losses = [loss()]
    first = observe(net)
    assert net.training
    losses.append(loss())
    assert losses == expected
    assert observe(net).samples == first.samples  # sampled with a seed of its own


def test_no_control_token_is_generated_and_the_end_token_ends_a_sample() -> None:
    net = network()
    with torch.no_grad():  # a network whose likeliest tokens are <|pad|>, then <|end|>
        net.transformer.ln_f.weight.zero_()
        net.transformer.ln_f.bias.fill_(1.0)
        net.lm_head.weight.fill_(0.0)
        net.lm_head.weight[TOKENIZER.eos_token_id] = 4.0
        net.lm_head.weight[TOKENIZER.pad_token_id] = 8.0
    observation = observe(net)
    assert all(s.ended and s.text == "" for s in observation.samples)
    with torch.no_grad():
        net.lm_head.weight[TOKENIZER.eos_token_id] = -4.0
    observation = observe(net)
    assert not any(s.ended for s in observation.samples)
    assert not any("<|" in s.text for s in observation.samples)


def test_padding_on_the_left_does_not_change_the_logits() -> None:
    """A request's logits do not depend on longer requests in the batch."""
    net = network().eval()
    banned = tokenizer.banned_ids(TOKENIZER, VOCABULARY)
    requests = [tokenizer.encode_request(TOKENIZER, VOCABULARY, row.intent, VOCABULARY.default(row.task)) for row in INTENTS]
    longest = max(map(len, requests))
    settings = {"max_new_tokens": 1, "do_sample": False, "suppress_tokens": banned, "pad_token_id": TOKENIZER.pad_token_id}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    for request in requests:
        padding = longest - len(request)
        padded = torch.tensor([[TOKENIZER.pad_token_id] * padding + request])
        mask = torch.tensor([[0] * padding + [1] * len(request)])
        alone = net.generate(torch.tensor([request]), **settings)
        batched = net.generate(padded, attention_mask=mask, **settings)
        assert torch.allclose(alone.logits[0], batched.logits[0], atol=1e-5)


def test_an_intent_without_room_for_a_prompt_is_skipped() -> None:
    long = ValidationIntent(task="paint", intent="owl " * 80)
    assert monitor.observe(network(), TOKENIZER, VOCABULARY, [long], 0, 12) == monitor.Observation([], {})
    assert len(monitor.observe(network(), TOKENIZER, VOCABULARY, [long, INTENTS[0]], 0, 500).samples) == 3


def test_samples_form_a_markdown_table() -> None:
    lines = observe(network()).markdown(samples_per_task=1).splitlines()
    assert len(lines) == 4
    assert all(line.count("|") == 6 for line in lines)


def test_flops_per_token_equal_a_count_by_hand() -> None:
    config = GPT2Config(vocab_size=1000, n_embd=64, n_layer=2, n_head=2, n_positions=128)
    weights = 2 * 12 * 64**2 + 1000 * 64
    assert monitor.train_flops_per_token(config, 128) == 6 * weights + 12 * 2 * 64 * 128
    half = monitor.train_flops_per_token(config, 128, target_share=0.5)
    assert monitor.train_flops_per_token(config, 128) - half == 6 * 500 * 64


def test_the_matmul_rate_is_plausible_and_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    assert 1e8 < monitor.matmul_flops_per_second("cpu", torch.float32, seconds=0.02) < 1e14
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", None),
    ],
)
def test_the_peak_of_a_known_gpu_is_its_data_sheets(name: str, teraflops: float | None) -> None:
    assert monitor.peak_of_gpu(name) == (teraflops and teraflops * 1e12)
