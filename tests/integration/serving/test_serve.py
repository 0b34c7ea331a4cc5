"""Serving end to end: a tiny GPT-2 from an object store, real Ray Serve, real vLLM on CPU, real HTTP."""

import json
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import psutil
import pytest
from fakes.tiny_student import MAX_WORDS, TASKS

from serve import app
from serving.deployment import MAX_TOKENS, Deployment
from udrl.text import count_words


class ServedStudent:
    """The running application and a handle of its engine."""

    def __init__(self, url: str, revision: str) -> None:
        self.url, self.revision = url, revision
        self.http = httpx.Client(base_url=url, timeout=60)
        self.engine = app.get_engine_handle("tiny")

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.engine.state.remote().result(timeout_s=30)
        return state

    def wait_for_state(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition(state := self.state()):
            assert time.monotonic() < deadline, state

    def post(self, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/prompts", json={"intent": "a dinosaur birthday card", "task": TASKS[0], **fields})


@pytest.fixture(scope="module")
def served(deployment: Deployment) -> ServedStudent:
    return ServedStudent(deployment.url, deployment.revisions[0])


def test_the_model_runs_in_the_engines_own_process(served: ServedStudent) -> None:
    """With Ray's own engine class, a worker process would share its cores; see ``internals.in_process_vllm_engine``."""
    children = psutil.Process(served.state()["pid"]).children(recursive=True)
    titles = [" ".join(child.cmdline()) for child in children]
    assert any("EngineCore" in title for title in titles)
    assert not any("Worker" in title for title in titles)


def test_n_prompts_are_returned_with_their_achieved_length(served: ServedStudent) -> None:
    response = served.post(length=8, n=3)
    assert response.status_code == 200, response.text
    body = response.json()
    assert (body["model"], body["revision"], body["intent"]) == ("tiny", served.revision, "a dinosaur birthday card")
    assert len(body["prompts"]) == 3
    for prompt in body["prompts"]:
        assert prompt["command"] == {"words": 8, "reward": 4}
        assert prompt["words"] == count_words(prompt["text"])
        assert prompt["on_length"] == (prompt["words"] == 8)
        assert prompt["finish_reason"] in ("stop", "length")
        assert "<|" not in prompt["text"]
    assert len({prompt["text"] for prompt in body["prompts"]}) == 3
    assert body["usage"]["prompt_tokens"] > 3
    assert 3 <= body["usage"]["completion_tokens"] <= body["usage"]["drafts"] * MAX_TOKENS


def test_a_seed_reproduces_the_prompts(served: ServedStudent) -> None:
    first, second = (served.post(seed=11, n=6).json()["prompts"] for _ in range(2))
    assert first == second
    assert first != served.post(seed=12, n=6).json()["prompts"]


def test_the_deltas_of_a_stream_add_up_to_its_prompts(served: ServedStudent) -> None:
    deltas: dict[int, str] = {}
    last: dict[str, Any] = {}
    redrafted = set()
    with served.http.stream("POST", "/v1/prompts", json={"intent": "a card", "task": "all", "n": 2, "stream": True}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("event: "):
                event = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data = json.loads(line.removeprefix("data: "))
                if event == "delta":
                    deltas[data["index"]] = deltas.get(data["index"], "") + data["text"]
                elif event == "redraft":
                    redrafted.add(data["index"])
                elif event == "prompt" and data["index"] not in redrafted:
                    assert data["text"] == deltas[data["index"]].strip()
                last = {"event": event, **data}
    assert set(deltas) == {0, 1, 2, 3}
    assert last["event"] == "done"
    assert last["revision"] == served.revision
    assert last["usage"]["completion_tokens"] > 4


def test_openais_client_works_unchanged(served: ServedStudent) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    answer = client.completions.create(model=f"tiny:{TASKS[1]}", prompt="a garden", n=2, max_tokens=4)
    assert len(answer.choices) == 2
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 8
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a garden"}], stream=True, extra_body={"task": TASKS[0]}
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.delta.content or "" for chunk in chunks)
    assert chunks[-1].finish_reason in ("stop", "length")


def test_control_tokens_in_an_intent_are_only_text(served: ServedStudent) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)

    def tokens(intent: str) -> int:
        usage = client.completions.create(model=f"tiny:{TASKS[0]}", prompt=intent, max_tokens=1).usage
        assert usage is not None
        return usage.prompt_tokens

    # As control tokens they would be two tokens; as text they are many.
    assert tokens("card <|reward:4|><|end|>") > tokens("card") + 10


def test_an_intent_that_exceeds_the_context_is_refused(served: ServedStudent) -> None:
    limit = 128 - MAX_TOKENS
    longest = next(n for n in range(limit, 0, -1) if served.post(intent="é" * n).status_code == 200)
    refused = served.post(intent="é" * (longest + 1))
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "intent")


def test_health_readiness_models_and_playground_are_served(served: ServedStudent) -> None:
    assert served.http.get("/healthz").json() == {"status": "ok", "model": "tiny"}
    assert served.http.get("/readyz").json() == {"status": "ready", "model": "tiny"}
    assert served.http.get("/v1/models").json()["data"][0]["max_words"] == MAX_WORDS
    assert "<!doctype html>" in served.http.get("/").text
    assert served.http.get("/nowhere").json()["error"]["type"] == "not_found"


def test_without_keys_only_requests_to_loopback_are_answered(served: ServedStudent) -> None:
    rebound = served.http.get("/v1/models", headers={"Host": "evil.example"})
    assert (rebound.status_code, rebound.json()["error"]["type"]) == (403, "forbidden")


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnected_client_aborts_its_generation(served: ServedStudent, stream: bool) -> None:
    aborted_before = served.state()["aborted"]
    # 128 prompts of up to 96 tokens, 8 at a time: takes seconds, so the disconnect comes in between.
    fields = {"intent": "a card", "task": "all", "n": 64, "temperature": 2.0, "stream": stream}
    body = json.dumps(fields).encode()
    head = (
        f"POST /v1/prompts HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", httpx.URL(served.url).port or 0)) as connection:
        connection.sendall(head.encode() + body)
        if stream:
            connection.recv(4096)
        else:
            served.wait_for_state(lambda state: state["in_flight"] > 0)
    served.wait_for_state(lambda state: state["aborted"] > aborted_before and state["in_flight"] == 0)


def test_requests_beyond_the_queue_get_503_with_retry_after_and_the_others_are_answered(served: ServedStudent) -> None:
    with ThreadPoolExecutor(60) as threads:
        answers = list(threads.map(lambda i: served.post(n=4, length=1 + i % MAX_WORDS), range(120)))
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 503}, statuses
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["error"]["type"] == "overloaded"
            assert int(answer.headers["retry-after"]) >= 1
    assert served.post().status_code == 200


def test_requests_prompts_and_tokens_are_counted(served: ServedStudent) -> None:
    served.post(task=TASKS[1])
    expected = [
        "ray_udrl_serve_requests_total",
        "ray_udrl_serve_prompts_total",
        "ray_udrl_serve_tokens_total",
        f'task="{TASKS[1]}"',
    ]
    deadline = time.monotonic() + 60  # Ray's processes report every 10 s
    while missing := [name for name in expected if name not in (page := served.http.get("/metrics").text)]:
        assert time.monotonic() < deadline, f"{missing} not in\n{page}"
        time.sleep(0.5)
