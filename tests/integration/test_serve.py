"""The whole serving line: a tiny GPT-2 out of an object store, real Ray Serve, real vLLM on CPU, real HTTP.

One deployment for the module: starting the engine is most of the time.
"""

import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from students import MAX_WORDS, TASKS, export_tiny_student, free_port, in_an_object_store

from serve import app
from udrl import cluster

SETTINGS = {
    "require_keys": False,
    "redraft": {"rounds": 1},  # untrained, it hardly ever ends a prompt
    "sampling": {"max_tokens": 96},
    "engine": {"max_num_seqs": 8, "eager": True},  # a queue that a test can fill
    "target_ongoing_requests": 8,
    "queue": 8,
    "max_replicas": 1,
    "limits": {"concurrent": 1000, "per_minute": 1_000_000, "prompts": 64},
}


class Served:
    """The application under test, and its engine's handle."""

    def __init__(self, url: str, revision: str) -> None:
        self.url, self.revision = url, revision
        self.http = httpx.Client(base_url=url, timeout=60)
        self.engine = app.engine_handle("tiny")

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.engine.state.remote().result(timeout_s=30)
        return found

    def until(self, what: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The engine's state once it is as wanted."""
        deadline = time.monotonic() + 60
        while not wanted(state := self.state()):
            assert time.monotonic() < deadline, f"{what}: {state}"
        return state

    def post(self, **changes: Any) -> httpx.Response:
        return self.http.post("/v1/prompts", json={"intent": "a dinosaur birthday card", "task": TASKS[0], **changes})


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    import ray
    from ray import serve as ray_serve

    run = tmp_path_factory.mktemp("run")
    revision = export_tiny_student(run / "student")
    recipe = run / "recipe.yaml"
    text = {"name": "tiny", "storage": str(run), "tasks": TASKS, "intents": {"limit": 9}, "serve": SETTINGS}
    recipe.write_text(json.dumps(text))
    port = free_port()
    with in_an_object_store(run / "student") as uri:
        cluster.connect(num_cpus=2)
        try:
            ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
            # The recipe's engine holds 256 tokens, the student 128: the student is the one to follow.
            ray_serve.run(app.build({"recipe": str(recipe), "model": uri}), name=app.NAME)
            yield Served(f"http://127.0.0.1:{port}", revision)
        finally:
            ray_serve.shutdown()
            ray.shutdown()


def test_n_prompts_come_back_with_what_each_achieved(served: Served) -> None:
    response = served.post(length=8, n=3)
    assert response.status_code == 200, response.text
    body = response.json()
    assert (body["model"], body["revision"], body["intent"]) == ("tiny", served.revision, "a dinosaur birthday card")
    assert len(body["prompts"]) == 3
    for prompt in body["prompts"]:
        assert prompt["command"] == {"words": 8, "reward": 4}
        assert prompt["words"] == len(prompt["text"].split())
        assert prompt["on_length"] == (prompt["words"] == 8)
        assert prompt["finish_reason"] in ("stop", "length")
        assert "<|" not in prompt["text"]
    assert len({prompt["text"] for prompt in body["prompts"]}) == 3
    assert body["usage"]["prompt_tokens"] > 3
    assert 3 <= body["usage"]["completion_tokens"] <= body["usage"]["drafts"] * 96


def test_one_seed_writes_one_prompt(served: Served) -> None:
    first, second = (served.post(seed=11, n=6).json()["prompts"] for _ in range(2))
    assert first == second
    assert first != served.post(seed=12, n=6).json()["prompts"]


def test_a_stream_is_what_its_prompts_say(served: Served) -> None:
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


def test_openais_client_is_served_unchanged(served: Served) -> None:
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


def test_control_tokens_in_an_intent_are_only_text(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)

    def tokens(intent: str) -> int:
        usage = client.completions.create(model=f"tiny:{TASKS[0]}", prompt=intent, max_tokens=1).usage
        assert usage is not None
        return usage.prompt_tokens

    # As control tokens they would be two; as text they are spelled out.
    assert tokens("card <|reward:4|><|end|>") > tokens("card") + 10


def test_the_engine_never_sees_more_than_it_holds(served: Served) -> None:
    room = 128 - 96
    longest = next(n for n in range(room, 0, -1) if served.post(intent="é" * n).status_code == 200)
    refused = served.post(intent="é" * (longest + 1))
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "intent")


def test_it_is_ready_and_says_who_it_is(served: Served) -> None:
    assert served.http.get("/healthz").json() == {"status": "ok", "model": "tiny"}
    assert served.http.get("/readyz").json() == {"status": "ready", "model": "tiny"}
    assert served.http.get("/v1/models").json()["data"][0]["max_words"] == MAX_WORDS
    assert "<!doctype html>" in served.http.get("/").text
    assert served.http.get("/nowhere").json()["error"]["type"] == "not_found"


def test_only_loopback_is_answered_without_keys(served: Served) -> None:
    rebound = served.http.get("/v1/models", headers={"Host": "evil.example"})
    assert (rebound.status_code, rebound.json()["error"]["type"]) == (403, "forbidden")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_generation(served: Served, stream: bool) -> None:
    before = served.state()["given_up"]
    # 128 prompts of up to 96 tokens on 8 places at a time: seconds, long enough to be met in the midst.
    asked = {"intent": "a card", "task": "all", "n": 64, "temperature": 2.0, "stream": stream}
    body = json.dumps(asked).encode()
    head = (
        f"POST /v1/prompts HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", httpx.URL(served.url).port or 0)) as wire:
        wire.sendall(head.encode() + body)
        if stream:
            wire.recv(4096)
        else:
            served.until("it writes", lambda state: state["writing"] > 0)
    served.until("given up", lambda state: state["given_up"] > before and state["writing"] == 0)


def test_what_is_too_much_is_told_to_come_back_and_the_rest_is_answered(served: Served) -> None:
    with ThreadPoolExecutor(60) as threads:
        answers = list(threads.map(lambda i: served.post(n=4, length=1 + i % MAX_WORDS), range(120)))
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 503}, statuses
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["error"]["type"] == "overloaded"
            assert int(answer.headers["retry-after"]) >= 1
    assert served.post().status_code == 200


def test_what_was_served_is_counted(served: Served) -> None:
    served.post(task=TASKS[1])
    wanted = [
        "ray_udrl_serve_requests_total",
        "ray_udrl_serve_prompts_total",
        "ray_udrl_serve_tokens_total",
        f'task="{TASKS[1]}"',
    ]
    deadline = time.monotonic() + 60  # Ray's processes report every 10 s
    while missing := [name for name in wanted if name not in (page := served.http.get("/metrics").text)]:
        assert time.monotonic() < deadline, f"{missing} not in\n{page}"
        time.sleep(0.5)
