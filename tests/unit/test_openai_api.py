"""OpenAI's own client, unchanged, over a real socket."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fakes.fake_engine import FakeEngine, draft, make_application, serve_on_loopback

from serve.keys import KeyRing, hash_key
from udrl.commands import Command

KEY = "udrl_" + "k" * 43


class Server:
    def __init__(self, url: str, engine: FakeEngine) -> None:
        self.engine = engine
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=20)


@pytest.fixture(scope="module")
def module_server() -> Iterator[Server]:
    engine = FakeEngine()
    with serve_on_loopback(make_application(engine, KeyRing({"test": hash_key(KEY)}))) as url:
        yield Server(url, engine)


@pytest.fixture
def server(module_server: Server) -> Iterator[Server]:
    """The server with an empty list of requests and the default drafts."""
    module_server.engine.requests.clear()
    write = module_server.engine.write
    yield module_server
    module_server.engine.write = write


def test_a_completion_returns_prompts_for_the_intent(server: Server) -> None:
    answer = server.client.completions.create(model="tiny:image_search", prompt="a birthday card", n=2, temperature=0.5, seed=7)
    assert [len(choice.text.split()) for choice in answer.choices] == [5, 5]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    assert answer.usage is not None
    assert answer.usage.total_tokens == 20
    assert (answer.model, answer.system_fingerprint) == ("tiny:image_search", "cafe")
    (request,) = server.engine.requests
    assert (request.intent, request.command.task, request.n) == ("a birthday card", "image_search", 2)
    assert (request.options.temperature, request.options.seed) == (0.5, 7)


def test_command_fields_are_allowed_in_addition_to_openais_keys(server: Server) -> None:
    extra = {"task": "text_to_image", "length": 7, "reward": 1}
    answer = server.client.completions.create(model="tiny", prompt="a card", extra_body=extra)
    extra_fields: Any = answer.choices[0].model_extra
    assert extra_fields["udrl"] == {
        "task": "text_to_image",
        "words": 7,
        "command": {"words": 7, "reward": 1},
        "on_length": True,
    }
    assert server.engine.requests[0].command == Command(task="text_to_image", words=7, reward=1)


def test_several_prompts_become_consecutive_choices(server: Server) -> None:
    answer = server.client.completions.create(model="tiny:image_search", prompt=["a card", "a poster"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {request.intent for request in server.engine.requests} == {"a card", "a poster"}


def test_the_last_user_message_of_a_chat_is_the_intent(server: Server) -> None:
    answer = server.client.chat.completions.create(
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
    assert server.engine.requests[0].intent == "a garden party"


def test_the_chunks_of_a_streamed_chat_add_up_to_the_prompt(server: Server) -> None:
    stream = server.client.chat.completions.create(
        model="tiny:image_search",
        messages=[{"role": "user", "content": "a card"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "amber birch cloud delta n1x0"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert len([chunk for chunk in chunks if chunk.choices]) > 3  # several chunks
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


def test_a_streamed_completion_of_an_exact_length_sends_only_accepted_text(server: Server) -> None:
    rounds = iter([[draft("one two")], [draft("one two three four")], [draft("a b c")]])
    server.engine.write = lambda request, call: next(rounds)
    stream = server.client.completions.create(model="tiny:image_search", prompt="x", stream=True, extra_body={"length": 3})
    assert "".join(chunk.choices[0].text for chunk in stream) == "a b c"


def test_a_token_limit_reaches_the_engine_and_a_cut_text_is_reported(server: Server) -> None:
    server.engine.write = lambda request, call: [draft("a b", "length")]
    answer = server.client.completions.create(model="tiny:image_search", prompt="x", max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert [request.options.max_tokens for request in server.engine.requests] == [2]


def test_models_can_be_listed_and_retrieved(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["tiny", "tiny:text_to_image", "tiny:image_search"]
    assert server.client.models.retrieve("tiny:text_to_image").owned_by == "udrl"


def test_errors_become_the_clients_own_exceptions_and_name_the_key(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        server.client.completions.create(model="gpt-9", prompt="x")
    assert not_found.value.param == "model"
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        server.client.completions.create(model="tiny:image_search", prompt="x", extra_body={"length": 99})
    assert (refused.value.param, refused.value.type) == ("length", "invalid_request")
    with pytest.raises(openai.UnprocessableEntityError) as ambiguous:
        server.client.completions.create(model="tiny", prompt="x")
    assert ambiguous.value.param == "task"
    with pytest.raises(openai.UnprocessableEntityError) as unknown:
        server.client.completions.create(model="tiny:image_search", prompt="x", presence_penalty=1.0)
    assert unknown.value.param == "presence_penalty"
    with pytest.raises(openai.AuthenticationError):
        server.client.with_options(api_key="wrong").completions.create(model="tiny", prompt="x")


def test_keys_with_values_that_have_no_effect_are_accepted(server: Server) -> None:
    server.client.chat.completions.create(
        model="tiny:image_search",
        messages=[{"role": "user", "content": "x"}],
        user="me",
        presence_penalty=0,
        frequency_penalty=0,
        logprobs=False,
        store=False,
        response_format={"type": "text"},
    )
