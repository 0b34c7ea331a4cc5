"""The HTTP contract: the real application on an engine without a model."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from fakes.fake_engine import FakeEngine, draft, make_application
from fastapi.testclient import TestClient

from serve.engine_protocol import Draft, SampleRequest, SamplingOptions
from serve.prometheus import merge_pages
from serve.request_errors import RequestError
from udrl.commands import Command

GOOD: dict[str, Any] = {"intent": "a birthday card", "task": "text_to_image"}


def client(engine: FakeEngine | None = None, **settings: Any) -> TestClient:
    app = make_application(engine or FakeEngine(), **settings)
    return TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000), raise_server_exceptions=False)


def error(response: Any) -> dict[str, Any]:
    assert set(response.json()) == {"error"}
    detail = response.json()["error"]
    assert set(detail) == {"message", "type", "param"}
    assert "\n" not in detail["message"]
    return detail


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"intent": ""}, "intent"),
        ({"intent": "  \n"}, "intent"),
        ({"intent": "x" * 2001}, "intent"),
        ({"intent": 7}, "intent"),
        ({"intent": "\ud800"}, "intent"),
        ({"task": "sculpture"}, "task"),
        ({"task": []}, "task"),
        ({"task": ["text_to_image", "text_to_image"]}, "task"),
        ({"task": ["text_to_image", "sculpture"]}, "task"),
        ({"task": 3}, "task"),
        ({"length": 0}, "length"),
        ({"length": 25}, "length"),
        ({"length": "12"}, "length"),
        ({"length": 12.5}, "length"),
        ({"length": True}, "length"),
        ({"length": {"min": 4}}, "length.max"),
        ({"length": {"min": 9, "max": 4}}, "length"),
        ({"length": {"min": 9, "max": 25}}, "length.max"),
        ({"reward": 3}, "reward"),
        ({"reward": -1}, "reward"),
        ({"reward": True}, "reward"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": None}, "n"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"stream": "yes"}, "stream"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_a_bad_value_is_422_and_names_its_key(change: dict[str, Any], param: str) -> None:
    body = json.dumps({**GOOD, **change})
    response = client().post("/v1/prompts", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert error(response)["param"] == param
    assert error(response)["message"].startswith(f"{param}: ")


@pytest.mark.parametrize("key", ["intent", "task"])
def test_a_missing_key_is_named(key: str) -> None:
    response = client().post("/v1/prompts", json={name: value for name, value in GOOD.items() if name != key})
    assert response.status_code == 422
    assert error(response)["param"] == key
    assert "must be given" in error(response)["message"]


def test_a_body_that_is_not_an_object_is_refused_with_the_expected_type() -> None:
    for kwargs in ({"json": ["a"]}, {"json": None}, {"data": {"intent": "x"}}, {}):
        response = client().post("/v1/prompts", **kwargs)
        assert response.status_code == 422
        assert "JSON object" in error(response)["message"]


def test_prompts_are_returned_with_their_achieved_length() -> None:
    engine = FakeEngine()
    body = client(engine).post("/v1/prompts", json={**GOOD, "length": 8, "n": 2, "seed": 3}).json()
    assert (body["object"], body["model"], body["revision"], body["intent"]) == ("prompts", "tiny", "cafe", "a birthday card")
    assert [(p["task"], p["words"], p["on_length"], p["finish_reason"]) for p in body["prompts"]] == [
        ("text_to_image", 8, True, "stop")
    ] * 2
    assert body["prompts"][0]["command"] == {"words": 8, "reward": 2}
    assert len({p["text"] for p in body["prompts"]}) == 2
    assert body["missing"] == 0
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 16, "total_tokens": 26, "drafts": 2}
    command = Command(task="text_to_image", words=8, reward=2)
    assert engine.requests == [SampleRequest("a birthday card", command, 2, SamplingOptions(temperature=0.7, seed=3))]


@pytest.mark.parametrize(
    ("fields", "command", "on_length"),
    [
        ({}, (12, 2), None),  # the task's usual length
        ({"length": "any", "reward": "any"}, (-1, -1), None),
        ({"length": 24, "reward": 0}, (24, 0), True),
        ({"length": {"min": 3, "max": 20}}, (12, 2), True),  # contains the usual length
        ({"length": {"min": 15, "max": 20}}, (17, 2), True),  # the nearest length two words inside
        ({"length": {"min": 3, "max": 5}}, (4, 2), True),
        ({"length": {"min": 7, "max": 7}}, (7, 2), True),
        ({"task": "image_search"}, (5, 2), None),
    ],
)
def test_a_request_becomes_a_command(fields: dict[str, Any], command: tuple[int, int], on_length: bool | None) -> None:
    engine = FakeEngine()
    body = client(engine).post("/v1/prompts", json={**GOOD, **fields}).json()
    assert (engine.requests[0].command.words, engine.requests[0].command.reward) == command
    assert body["prompts"][0]["on_length"] is on_length
    reported = body["prompts"][0]["command"]
    assert (reported["words"], reported["reward"]) == tuple(None if part == -1 else part for part in command)


@pytest.mark.parametrize("task", ["all", ["text_to_image", "image_search"]])
def test_one_intent_fans_out_to_several_tasks(task: Any) -> None:
    engine = FakeEngine()
    body = client(engine).post("/v1/prompts", json={**GOOD, "task": task, "n": 2}).json()
    assert [p["task"] for p in body["prompts"]] == ["text_to_image"] * 2 + ["image_search"] * 2
    assert len(engine.requests) == 2
    assert body["usage"]["drafts"] == 4


def test_a_missed_length_is_reported_and_the_text_is_not_shortened() -> None:
    engine = FakeEngine(lambda request, call: [draft("one two three four")] * request.n)
    body = client(engine).post("/v1/prompts", json={**GOOD, "length": 3}).json()
    assert [(p["text"], p["words"], p["on_length"]) for p in body["prompts"]] == [("one two three four", 4, False)]
    assert body["usage"]["drafts"] == 1 + 2 * 4


def test_prompts_without_a_distinct_text_are_counted_as_missing() -> None:
    engine = FakeEngine(lambda request, call: [draft("one two three")] * request.n)
    body = client(engine).post("/v1/prompts", json={**GOOD, "n": 3}).json()
    assert (len(body["prompts"]), body["missing"]) == (1, 2)


def parse_events(text: str) -> list[tuple[str, dict[str, Any]]]:
    events = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def test_a_stream_has_deltas_redrafts_prompts_and_an_end() -> None:
    def write(request: SampleRequest, call: int) -> list[Draft]:
        return [draft("one two"), draft("a b c")] if call == 1 else [draft("d e f")]

    response = client(FakeEngine(write)).post("/v1/prompts", json={**GOOD, "length": 3, "n": 2, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = parse_events(response.text)
    assert "".join(data["text"] for name, data in events if name == "delta" and data["index"] == 1) == "a b c"
    others = [(name, data) for name, data in events if name != "delta"]
    assert [name for name, _ in others] == ["redraft", "prompt", "prompt", "done"]
    assert others[0][1] == {"index": 0, "task": "text_to_image", "words": 2, "reason": "length"}
    assert (others[2][1]["index"], others[2][1]["text"], others[2][1]["on_length"]) == (0, "d e f", True)
    assert others[3][1]["usage"]["drafts"] == 3
    assert others[3][1]["missing"] == 0


def test_a_stream_of_several_tasks_numbers_its_prompts_consecutively() -> None:
    events = parse_events(client().post("/v1/prompts", json={**GOOD, "task": "all", "n": 2, "stream": True}).text)
    tasks = {data["index"]: data["task"] for name, data in events if name == "prompt"}
    assert tasks == {0: "text_to_image", 1: "text_to_image", 2: "image_search", 3: "image_search"}


def overloaded_engine() -> FakeEngine:
    engine = FakeEngine()
    engine.error = RequestError("too many requests are waiting; try again", None, 503, "overloaded", 1)
    return engine


def test_a_failure_before_the_first_event_has_an_http_status() -> None:
    response = client(overloaded_engine()).post("/v1/prompts", json={**GOOD, "stream": True})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert error(response)["type"] == "overloaded"


def test_a_request_past_its_deadline_is_aborted() -> None:
    engine = FakeEngine(gate=asyncio.Event())
    response = client(engine, request_timeout_s=0.05).post("/v1/prompts", json=GOOD)
    assert response.status_code == 504
    assert error(response)["type"] == "timeout"
    assert engine.aborted == 1


def test_a_stream_past_its_deadline_ends_with_an_error_event() -> None:
    engine = FakeEngine(gate=asyncio.Event())
    events = parse_events(client(engine, request_timeout_s=0.05).post("/v1/prompts", json={**GOOD, "stream": True}).text)
    assert [name for name, _ in events] == ["delta", "error"]
    assert events[-1][1]["error"]["type"] == "timeout"
    assert engine.aborted == 1


def test_a_disconnected_client_aborts_the_generation() -> None:
    """Calls the application as an ASGI server does; the client disconnects after the first words."""

    async def disconnect_after_first_words() -> FakeEngine:
        engine = FakeEngine(gate=asyncio.Event())
        app, body = make_application(engine), json.dumps({**GOOD, "stream": True}).encode()
        body_sent, disconnected = asyncio.Event(), asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not body_sent.is_set():
                body_sent.set()
                return {"type": "http.request", "body": body, "more_body": False}
            await disconnected.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message.get("body"):
                disconnected.set()

        headers = [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")]
        scope = {"type": "http", "method": "POST", "path": "/v1/prompts", "raw_path": b"/v1/prompts", "query_string": b""}
        scope |= {"headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "scheme": "http"}  # type: ignore[dict-item]
        scope |= {"http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": ""}  # type: ignore[dict-item]
        await asyncio.wait_for(app(scope, receive, send), 10)  # type: ignore[arg-type]
        return engine

    assert asyncio.run(disconnect_after_first_words()).aborted == 1


def test_a_batch_answers_each_intent() -> None:
    body = client().post("/v1/prompts/batch", json={"intents": ["a card", "a poster"], "task": "all", "length": 4}).json()
    assert [r["intent"] for r in body["results"]] == ["a card", "a poster"]
    assert [len(r["prompts"]) for r in body["results"]] == [2, 2]
    assert [r["error"] for r in body["results"]] == [None, None]
    assert body["usage"]["drafts"] == 4


def test_a_failed_intent_of_a_batch_leaves_the_others_intact() -> None:
    def write(request: SampleRequest, call: int) -> list[Draft]:
        if request.intent == "bad":
            raise RequestError("intent: too long for this model", "intent")
        return [draft("a b c")]

    body = client(FakeEngine(write)).post("/v1/prompts/batch", json={"intents": ["x", "bad"], "task": "image_search"}).json()
    assert [(len(r["prompts"]), r["missing"]) for r in body["results"]] == [(1, 0), (0, 1)]
    assert body["results"][1]["error"]["param"] == "intent"


def test_a_batch_is_503_if_no_intent_was_answered_because_of_overload() -> None:
    response = client(overloaded_engine()).post("/v1/prompts/batch", json={"intents": ["a", "b"], "task": "image_search"})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("intents", "param"), [([], "intents"), (["a", ""], "intents.1"), (["a", "x" * 2001], "intents.1"), (["a"] * 65, "intents")]
)
def test_an_error_of_a_batch_names_the_intent(intents: list[str], param: str) -> None:
    response = client().post("/v1/prompts/batch", json={"intents": intents, "task": "image_search"})
    assert response.status_code == 422
    assert error(response)["param"] == param


def test_the_prompts_of_one_request_are_limited_over_all_intents_and_tasks() -> None:
    body = {"intents": ["a"] * 9, "task": "all", "n": 15}
    response = client().post("/v1/prompts/batch", json=body)
    assert response.status_code == 422
    assert error(response)["message"] == "n: too many prompts over all intents and tasks (270); ask for at most 256 per request"
    assert error(response)["param"] == "n"
    assert client(limits={"total": 270}).post("/v1/prompts/batch", json=body).status_code == 200


def test_the_model_list_describes_the_commands_of_each_task() -> None:
    http = client()
    cards = http.get("/v1/models").json()["data"]
    assert [(card["id"], card["task"], list(card["tasks"])) for card in cards] == [
        ("tiny", None, ["text_to_image", "image_search"]),
        ("tiny:text_to_image", "text_to_image", ["text_to_image"]),
        ("tiny:image_search", "image_search", ["image_search"]),
    ]
    assert cards[0]["max_words"] == 24
    assert cards[0]["tasks"]["image_search"] == {"default_words": 5, "default_reward": 2, "usual_words": [4, 5, 20]}
    assert http.get("/v1/models/tiny:image_search").json() == cards[2]
    assert http.get("/v1/models/other").status_code == 404


def test_health_readiness_and_playground_are_served() -> None:
    assert client().get("/healthz").json() == {"status": "ok", "model": "tiny"}
    assert client().get("/readyz").json() == {"status": "ready", "model": "tiny"}
    starting = client(ready=False).get("/readyz")
    assert (starting.status_code, starting.headers["retry-after"]) == (503, "5")
    page = client().get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_pages_of_other_origins_are_refused_unless_configured() -> None:
    preflight = {"Origin": "https://example.com", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client().options("/v1/prompts", headers=preflight).headers
    allowed = client(cors_origins=["https://example.com"]).options("/v1/prompts", headers=preflight)
    assert allowed.headers["access-control-allow-origin"] == "https://example.com"


def test_the_openapi_document_lists_every_route_and_its_errors() -> None:
    document = client().get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/", "/healthz", "/readyz", "/metrics", "/v1/models", "/v1/models/{model}",
        "/v1/prompts", "/v1/prompts/batch", "/v1/completions", "/v1/chat/completions",
    }  # fmt: skip
    for path in ("/v1/prompts", "/v1/prompts/batch", "/v1/completions", "/v1/chat/completions"):
        responses = document["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "413", "422", "429", "503", "504"} <= set(responses)
        assert responses["422"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
    streamed = document["paths"]["/v1/prompts"]["post"]["responses"]["200"]["content"]
    assert set(streamed) == {"application/json", "text/event-stream"}


def test_responses_of_concurrent_requests_are_not_mixed_up() -> None:
    async def send_60_requests() -> list[Any]:
        transport = httpx.ASGITransport(app=make_application(FakeEngine()), client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return await asyncio.gather(
                *(http.post("/v1/prompts", json={**GOOD, "intent": f"card {i}", "length": 1 + i % 24}) for i in range(60))
            )

    responses = asyncio.run(send_60_requests())
    assert [(r.json()["intent"], r.json()["prompts"][0]["words"]) for r in responses] == [
        (f"card {i}", 1 + i % 24) for i in range(60)
    ]


def test_metrics_pages_of_several_nodes_are_merged() -> None:
    page = '# HELP ray_udrl_x_total Things\n# TYPE ray_udrl_x_total counter\nray_udrl_x_total{{node="{0}"}} 1.0\n'
    other = "# HELP ray_tasks T\n# TYPE ray_tasks gauge\nray_tasks 5\n"
    assert merge_pages([page.format("a") + other, other + page.format("b")]).splitlines() == [
        "# HELP ray_udrl_x_total Things",
        "# TYPE ray_udrl_x_total counter",
        'ray_udrl_x_total{node="a"} 1.0',
        'ray_udrl_x_total{node="b"} 1.0',
    ]
