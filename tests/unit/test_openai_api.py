"""OpenAI's own client, unchanged, over a real socket: what it sends is understood and what comes back is what it parses."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from served import FakeEngine, application, draft, listening

from serve.keys import KeyRing, digest

KEY = "udrl_" + "k" * 43


class Served:
    def __init__(self, url: str, engine: FakeEngine) -> None:
        self.engine = engine
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=20)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    engine = FakeEngine()
    with listening(application(engine, KeyRing({"test": digest(KEY)}))) as url:
        yield Served(url, engine)


@pytest.fixture
def served(server: Served) -> Iterator[Served]:
    server.engine.asked.clear()
    said = server.engine.say
    yield server
    server.engine.say = said


def test_a_completion_is_the_intents_prompt(served: Served) -> None:
    answer = served.client.completions.create(model="tiny:image_search", prompt="a birthday card", n=2, temperature=0.5, seed=7)
    assert [len(choice.text.split()) for choice in answer.choices] == [5, 5]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    assert answer.usage is not None
    assert answer.usage.total_tokens == 20
    assert (answer.model, answer.system_fingerprint) == ("tiny:image_search", "cafe")
    asked = served.engine.asked[0]
    assert (asked["intent"], asked["task"], asked["n"], asked["temperature"], asked["seed"]) == (
        "a birthday card", "image_search", 2, 0.5, 7,
    )  # fmt: skip


def test_the_command_stands_beside_openais_keys(served: Served) -> None:
    extra = {"task": "text_to_image", "length": 7, "reward": 1}
    answer = served.client.completions.create(model="tiny", prompt="a card", extra_body=extra)
    achieved: Any = answer.choices[0].model_extra
    assert achieved["udrl"] == {"task": "text_to_image", "words": 7, "command": {"words": 7, "reward": 1}, "on_length": True}
    assert (served.engine.asked[0]["words"], served.engine.asked[0]["reward"]) == (7, 1)


def test_several_prompts_are_several_choices_in_order(served: Served) -> None:
    answer = served.client.completions.create(model="tiny:image_search", prompt=["a card", "a poster"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {ask["intent"] for ask in served.engine.asked} == {"a card", "a poster"}


def test_a_chats_last_user_message_is_the_intent(served: Served) -> None:
    answer = served.client.chat.completions.create(
        model="tiny:image_search",
        messages=[
            {"role": "system", "content": "You write prompts."},
            {"role": "user", "content": "an older request"},
            {"role": "assistant", "content": "an older prompt"},
            {"role": "user", "content": [{"type": "text", "text": "a garden party"}]},
        ],
    )
    message = answer.choices[0].message
    assert (message.role, len((message.content or "").split())) == ("assistant", 5)
    assert served.engine.asked[0]["intent"] == "a garden party"


def test_a_streamed_chat_adds_up_to_the_prompt(served: Served) -> None:
    stream = served.client.chat.completions.create(
        model="tiny:image_search",
        messages=[{"role": "user", "content": "a card"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == "amber birch cloud delta n1x0"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert len([chunk for chunk in chunks if chunk.choices]) > 3  # it grew
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


def test_a_streamed_completion_of_an_exact_length_takes_nothing_back(served: Served) -> None:
    answers = iter([[draft("one two")], [draft("one two three four")], [draft("a b c")]])
    served.engine.say = lambda ask, call: next(answers)
    stream = served.client.completions.create(model="tiny:image_search", prompt="x", stream=True, extra_body={"length": 3})
    assert "".join(chunk.choices[0].text for chunk in stream) == "a b c"


def test_a_limit_of_tokens_goes_to_the_engine_and_what_is_cut_says_so(served: Served) -> None:
    served.engine.say = lambda ask, call: [draft("a b", "length")]
    answer = served.client.completions.create(model="tiny:image_search", prompt="x", max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert [ask["max_tokens"] for ask in served.engine.asked] == [2]


def test_models_can_be_listed_and_retrieved(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["tiny", "tiny:text_to_image", "tiny:image_search"]
    assert served.client.models.retrieve("tiny:text_to_image").owned_by == "udrl"


def test_errors_come_as_the_clients_own_with_the_key_named(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        served.client.completions.create(model="gpt-9", prompt="x")
    assert missing.value.param == "model"
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        served.client.completions.create(model="tiny:image_search", prompt="x", extra_body={"length": 99})
    assert (refused.value.param, refused.value.type) == ("length", "invalid_request")
    with pytest.raises(openai.UnprocessableEntityError) as ambiguous:
        served.client.completions.create(model="tiny", prompt="x")
    assert ambiguous.value.param == "task"
    with pytest.raises(openai.UnprocessableEntityError) as unknown:
        served.client.completions.create(model="tiny:image_search", prompt="x", presence_penalty=1.0)
    assert unknown.value.param == "presence_penalty"
    with pytest.raises(openai.AuthenticationError):
        served.client.with_options(api_key="wrong").completions.create(model="tiny", prompt="x")


def test_keys_that_ask_for_nothing_are_let_through(served: Served) -> None:
    served.client.chat.completions.create(
        model="tiny:image_search",
        messages=[{"role": "user", "content": "x"}],
        user="me",
        presence_penalty=0,
        frequency_penalty=0,
        logprobs=False,
        store=False,
        response_format={"type": "text"},
    )
