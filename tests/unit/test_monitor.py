"""What is seen while it trains: samples and control error that leave training as it was, and the arithmetic of speed."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fakes.fake_vocabulary import fake_vocabulary
from transformers import GPT2Config

from udrl import tokenizer
from udrl.commands import ANY
from udrl.recipe import Student, Train
from udrl.train import flops, monitor
from udrl.train import gpt2 as model

TEXTS = ["a red fox in deep snow, soft light", "poster of an owl", "jazz night flyer, bold type"]
HELD = [{"task": task, "intent": intent} for task in ("paint", "find") for intent in ("an owl", "jazz night in deep snow")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a network spends its time on waiting for the threads of others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


VOCABULARY = fake_vocabulary()
WORDS = tokenizer.train([" " + t for t in TEXTS * 3], VOCABULARY, 400)


def network(dropout: float = 0.0) -> Any:
    return model.build(Student(depth=2, width=64, heads=2, context=64, dropout=dropout), Train(), WORDS, seed=3)


def observe(net: Any, **more: Any) -> monitor.Observation:
    return monitor.observe(net, WORDS, VOCABULARY, HELD, 5, 12, **more)


def test_every_intent_is_asked_for_three_lengths_at_the_default_reward() -> None:
    samples = observe(network()).samples
    assert [s.intent for s in samples[::3]] == [row["intent"] for row in HELD]
    for task, learnt in VOCABULARY.tasks.items():
        asked = {(s.command.words, s.command.reward) for s in samples if s.command.task == task}
        assert asked == {(n, learnt.default_reward) for n in learnt.words}


def test_the_metrics_are_those_of_the_samples() -> None:
    seen = observe(network())
    off = [abs(len(s.text.split()) - s.command.words) for s in seen.samples]
    assert seen.metrics["length_error"] == pytest.approx(np.mean(off))
    assert seen.metrics["within_two"] == pytest.approx(np.mean([n <= 2 for n in off]))
    assert seen.metrics["length_error/find"] == pytest.approx(np.mean(off[6:]))


def test_a_student_without_commands_is_asked_for_any() -> None:
    seen = observe(network(), commanded=False)
    assert [(s.command.words, s.command.reward) for s in seen.samples] == [(ANY, ANY)] * len(HELD)
    assert set(seen.metrics) == {"words", "words/paint", "words/find"}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_training_does_not_notice_that_it_was_observed(kind: torch.dtype) -> None:
    net = network(dropout=0.2).to(kind)
    net.train()
    ids = torch.arange(30)[None]

    def loss() -> float:
        return float(net(input_ids=ids, labels=ids).loss.detach())

    torch.manual_seed(11)
    alone = [loss(), loss()]
    torch.manual_seed(11)
    watched = [loss()]
    first = observe(net)
    assert net.training
    watched.append(loss())
    assert watched == alone
    assert observe(net).samples == first.samples  # drawn by its own seed


def test_no_control_token_is_written_and_the_end_ends() -> None:
    net = network()
    with torch.no_grad():  # a network that wants nothing but <|pad|>, then <|end|>
        net.transformer.ln_f.weight.zero_()
        net.transformer.ln_f.bias.fill_(1.0)
        net.lm_head.weight.fill_(0.0)
        net.lm_head.weight[WORDS.eos_token_id] = 4.0
        net.lm_head.weight[WORDS.pad_token_id] = 8.0
    seen = observe(net)
    assert all(s.ended and s.text == "" for s in seen.samples)
    with torch.no_grad():
        net.lm_head.weight[WORDS.eos_token_id] = -4.0
    seen = observe(net)
    assert not any(s.ended for s in seen.samples)
    assert not any("<|" in s.text for s in seen.samples)


def test_padding_on_the_left_changes_nothing() -> None:
    """What an intent gets does not depend on the longer ones beside it (greedy draws: temperature near 0)."""
    net = network().eval()
    banned = tokenizer.banned_ids(WORDS, VOCABULARY)
    requests = [tokenizer.encode_request(WORDS, VOCABULARY, row["intent"], VOCABULARY.default(row["task"])) for row in HELD]
    for request in requests:
        ids = torch.tensor([request])
        own = net.generate(ids, max_new_tokens=1, do_sample=False, suppress_tokens=banned, output_logits=True,
                           return_dict_in_generate=True, pad_token_id=WORDS.pad_token_id)  # fmt: skip
        longest = max(map(len, requests))
        padded = torch.tensor([[WORDS.pad_token_id] * (longest - len(request)) + request])
        mask = torch.tensor([[0] * (longest - len(request)) + [1] * len(request)])
        beside = net.generate(padded, attention_mask=mask, max_new_tokens=1, do_sample=False, suppress_tokens=banned,
                              output_logits=True, return_dict_in_generate=True, pad_token_id=WORDS.pad_token_id)  # fmt: skip
        assert torch.allclose(own.logits[0], beside.logits[0], atol=1e-5)


def test_an_intent_without_room_is_left_out() -> None:
    long = {"task": "paint", "intent": "owl " * 80}
    assert monitor.observe(network(), WORDS, VOCABULARY, [long], 0, 12) == monitor.Observation([], {})
    assert len(monitor.observe(network(), WORDS, VOCABULARY, [long, HELD[0]], 0, 500).samples) == 3


def test_samples_make_a_table_that_no_text_breaks() -> None:
    lines = observe(network()).markdown(of_each=1).splitlines()
    assert len(lines) == 4
    assert all(line.count("|") == 6 for line in lines)


def test_operations_of_a_token_are_counted_by_hand() -> None:
    config = GPT2Config(vocab_size=1000, n_embd=64, n_layer=2, n_head=2, n_positions=128)
    weights = 2 * 12 * 64**2 + 1000 * 64
    assert flops.train_flops_per_token(config, 128) == 6 * weights + 12 * 2 * 64 * 128
    half = flops.train_flops_per_token(config, 128, target_share=0.5)
    assert flops.train_flops_per_token(config, 128) - half == 6 * 500 * 64


def test_the_ceiling_is_a_speed_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    assert 1e8 < flops.ceiling("cpu", torch.float32, seconds=0.02) < 1e14
    assert torch.equal(before, torch.get_rng_state())
