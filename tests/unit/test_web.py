"""The HTTP contract, with the real application and an engine that needs no model."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from served import FakeEngine, application, draft

from serve.api import RequestError
from serve.drafts import Ask, Draft
from serve.prometheus import merged

GOOD: dict[str, Any] = {"intent": "a birthday card", "task": "text_to_image"}


def client(engine: FakeEngine | None = None, **changes: Any) -> TestClient:
    app = application(engine or FakeEngine(), **changes)
    return TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000), raise_server_exceptions=False)


def error(response: Any) -> dict[str, Any]:
    assert set(response.json()) == {"error"}
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param"}
    assert "\n" not in found["message"]
    return found


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"intent": ""}, "intent"),
        ({"intent": "  \n"}, "intent"),
        ({"intent": "x" * 2001}, "intent"),
        ({"intent": 7}, "intent"),
        ({"intent": None}, "intent"),
        ({"intent": "\ud800"}, "intent"),
        ({"task": "sculpture"}, "task"),
        ({"task": None}, "task"),
        ({"task": []}, "task"),
        ({"task": ["text_to_image", "text_to_image"]}, "task"),
        ({"task": ["text_to_image", "sculpture"]}, "task"),
        ({"task": 3}, "task"),
        ({"length": 0}, "length"),
        ({"length": 25}, "length"),
        ({"length": -1}, "length"),
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
    found = error(response)
    assert found["param"] == param
    assert found["message"].startswith(f"{param}: ")


@pytest.mark.parametrize("key", ["intent", "task"])
def test_a_missing_key_is_named(key: str) -> None:
    response = client().post("/v1/prompts", json={name: value for name, value in GOOD.items() if name != key})
    assert response.status_code == 422
    assert error(response)["param"] == key
    assert "must be given" in error(response)["message"]


def test_a_body_that_is_not_json_is_400() -> None:
    response = client().post("/v1/prompts", content=b'{"intent": ', headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert error(response)["type"] == "invalid_json"


def test_a_body_that_is_not_an_object_says_what_is_expected() -> None:
    for kwargs in ({"json": ["a"]}, {"json": None}, {"data": {"intent": "x"}}, {}):
        response = client().post("/v1/prompts", **kwargs)
        assert response.status_code == 422
        assert "JSON object" in error(response)["message"]


def test_unknown_paths_and_methods_have_the_same_error_shape() -> None:
    assert error(client().get("/nowhere"))["type"] == "not_found"
    assert client().get("/v1/prompts").status_code == 405
    error(client().get("/v1/prompts"))


def test_a_fault_of_ours_shows_no_detail() -> None:
    engine = FakeEngine()
    engine.fails = RuntimeError("secret detail")
    response = client(engine).post("/v1/prompts", json=GOOD)
    assert response.status_code == 500
    assert error(response)["type"] == "internal_error"
    assert "secret" not in response.text


def test_prompts_come_back_with_what_each_achieved() -> None:
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
    assert engine.asked == [
        {"intent": "a birthday card", "task": "text_to_image", "words": 8, "reward": 2, "n": 2, "seed": 3, "temperature": 0.7}
    ]


@pytest.mark.parametrize(
    ("given", "commanded", "on_length"),
    [
        ({}, (12, 2), None),  # the task's usual
        ({"length": "any", "reward": "any"}, (-1, -1), None),
        ({"length": 24, "reward": 0}, (24, 0), True),
        ({"length": {"min": 3, "max": 20}}, (12, 2), True),  # the usual lies within
        ({"length": {"min": 15, "max": 20}}, (17, 2), True),  # from there two words inside
        ({"length": {"min": 3, "max": 5}}, (4, 2), True),
        ({"length": {"min": 7, "max": 7}}, (7, 2), True),
        ({"task": "image_search"}, (5, 2), None),
    ],
)
def test_what_is_asked_becomes_a_command(given: dict[str, Any], commanded: tuple[int, int], on_length: bool | None) -> None:
    engine = FakeEngine()
    body = client(engine).post("/v1/prompts", json={**GOOD, **given}).json()
    assert (engine.asked[0]["words"], engine.asked[0]["reward"]) == commanded
    assert body["prompts"][0]["on_length"] is on_length
    said = body["prompts"][0]["command"]
    assert (said["words"], said["reward"]) == tuple(None if part == -1 else part for part in commanded)


@pytest.mark.parametrize("task", ["all", ["text_to_image", "image_search"]])
def test_one_intent_fans_out_to_several_tasks(task: Any) -> None:
    engine = FakeEngine()
    body = client(engine).post("/v1/prompts", json={**GOOD, "task": task, "n": 2}).json()
    assert [p["task"] for p in body["prompts"]] == ["text_to_image"] * 2 + ["image_search"] * 2
    assert len(engine.asked) == 2
    assert body["usage"]["drafts"] == 4


def test_a_miss_is_reported_and_not_shortened() -> None:
    engine = FakeEngine(lambda ask, call: [draft("one two three four")] * ask["n"])
    body = client(engine).post("/v1/prompts", json={**GOOD, "length": 3}).json()
    assert [(p["text"], p["words"], p["on_length"]) for p in body["prompts"]] == [("one two three four", 4, False)]
    assert body["usage"]["drafts"] == 1 + 2 * 4


def test_what_could_not_be_made_distinct_is_missing() -> None:
    engine = FakeEngine(lambda ask, call: [draft("one two three")] * ask["n"])
    body = client(engine).post("/v1/prompts", json={**GOOD, "n": 3}).json()
    assert (len(body["prompts"]), body["missing"]) == (1, 2)


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_stream_grows_redrafts_settles_and_ends() -> None:
    def say(ask: Ask, call: int) -> list[Draft]:
        return [draft("one two"), draft("a b c")] if call == 1 else [draft("d e f")]

    response = client(FakeEngine(say)).post("/v1/prompts", json={**GOOD, "length": 3, "n": 2, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response.text)
    assert "".join(data["text"] for name, data in found if name == "delta" and data["index"] == 1) == "a b c"
    rest = [(name, data) for name, data in found if name != "delta"]
    assert [name for name, _ in rest] == ["redraft", "prompt", "prompt", "done"]
    assert rest[0][1] == {"index": 0, "task": "text_to_image", "words": 2, "reason": "length"}
    assert (rest[2][1]["index"], rest[2][1]["text"], rest[2][1]["on_length"]) == (0, "d e f", True)
    assert rest[3][1]["usage"]["drafts"] == 3
    assert rest[3][1]["missing"] == 0


def test_a_stream_of_several_tasks_numbers_its_prompts_through() -> None:
    found = events(client().post("/v1/prompts", json={**GOOD, "task": "all", "n": 2, "stream": True}).text)
    settled = {data["index"]: data["task"] for name, data in found if name == "prompt"}
    assert settled == {0: "text_to_image", 1: "text_to_image", 2: "image_search", 3: "image_search"}


def test_what_fails_before_a_stream_has_its_status() -> None:
    engine = FakeEngine()
    engine.fails = RequestError("too many requests are waiting; try again", None, 503, "overloaded", 1)
    response = client(engine).post("/v1/prompts", json={**GOOD, "stream": True})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert error(response)["type"] == "overloaded"


def test_past_its_deadline_a_request_is_given_up() -> None:
    engine = FakeEngine(gate=asyncio.Event())
    response = client(engine, request_timeout_s=0.05).post("/v1/prompts", json=GOOD)
    assert response.status_code == 504
    assert error(response)["type"] == "timeout"
    assert engine.given_up == 1


def test_a_stream_past_its_deadline_ends_with_an_error_event() -> None:
    engine = FakeEngine(gate=asyncio.Event())
    found = events(client(engine, request_timeout_s=0.05).post("/v1/prompts", json={**GOOD, "stream": True}).text)
    assert [name for name, _ in found] == ["delta", "error"]
    assert found[-1][1]["error"]["type"] == "timeout"
    assert engine.given_up == 1


def test_a_client_that_goes_away_gives_the_engine_up() -> None:
    """The application is called as a server calls it; the disconnect comes when the first words are out."""

    async def go() -> FakeEngine:
        engine = FakeEngine(gate=asyncio.Event())
        app, body = application(engine), json.dumps({**GOOD, "stream": True}).encode()
        read, gone = asyncio.Event(), asyncio.Event()
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if not read.is_set():
                read.set()
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)
            if message.get("body"):
                gone.set()

        headers = [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")]
        scope = {"type": "http", "method": "POST", "path": "/v1/prompts", "raw_path": b"/v1/prompts", "query_string": b""}
        scope |= {"headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "scheme": "http"}  # type: ignore[dict-item]
        scope |= {"http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": ""}  # type: ignore[dict-item]
        await asyncio.wait_for(app(scope, receive, send), 10)  # type: ignore[arg-type]
        return engine

    assert asyncio.run(go()).given_up == 1


def test_a_batch_answers_each_intent() -> None:
    body = client().post("/v1/prompts/batch", json={"intents": ["a card", "a poster"], "task": "all", "length": 4}).json()
    assert [r["intent"] for r in body["results"]] == ["a card", "a poster"]
    assert [len(r["prompts"]) for r in body["results"]] == [2, 2]
    assert [r["error"] for r in body["results"]] == [None, None]
    assert body["usage"]["drafts"] == 4


def test_one_failure_of_a_batch_spoils_no_other() -> None:
    def say(ask: Ask, call: int) -> list[Draft]:
        if ask["intent"] == "bad":
            raise RequestError("intent: too long for this model", "intent")
        return [draft("a b c")]

    body = client(FakeEngine(say)).post("/v1/prompts/batch", json={"intents": ["x", "bad"], "task": "image_search"}).json()
    assert [(len(r["prompts"]), r["missing"]) for r in body["results"]] == [(1, 0), (0, 1)]
    assert body["results"][1]["error"]["param"] == "intent"


def test_a_batch_that_finds_no_room_at_all_is_503() -> None:
    engine = FakeEngine()
    engine.fails = RequestError("too many requests are waiting; try again", None, 503, "overloaded", 1)
    response = client(engine).post("/v1/prompts/batch", json={"intents": ["a", "b"], "task": "image_search"})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("intents", "param"), [([], "intents"), (["a", ""], "intents.1"), (["a", "x" * 2001], "intents.1"), (["a"] * 65, "intents")]
)
def test_a_bad_batch_names_the_intent(intents: list[str], param: str) -> None:
    response = client().post("/v1/prompts/batch", json={"intents": intents, "task": "image_search"})
    assert response.status_code == 422
    assert error(response)["param"] == param


def test_one_request_may_not_want_more_than_all_limits_together_allow() -> None:
    body = {"intents": ["a"] * 9, "task": "all", "n": 15}
    response = client().post("/v1/prompts/batch", json=body)
    assert response.status_code == 422
    assert error(response) == {"message": "n: 270 prompts over all intents and tasks, at most 256 a request",
                               "type": "invalid_request", "param": "n"}  # fmt: skip
    assert client(limits={"total": 270}).post("/v1/prompts/batch", json=body).status_code == 200


def test_models_say_what_can_be_commanded() -> None:
    cards = client().get("/v1/models").json()["data"]
    assert [(card["id"], card["task"], list(card["tasks"])) for card in cards] == [
        ("tiny", None, ["text_to_image", "image_search"]),
        ("tiny:text_to_image", "text_to_image", ["text_to_image"]),
        ("tiny:image_search", "image_search", ["image_search"]),
    ]
    assert cards[0]["max_words"] == 24
    assert cards[0]["tasks"]["image_search"] == {"default_words": 5, "default_reward": 2, "usual_words": [4, 5, 20]}
    assert client().get("/v1/models/tiny:image_search").json() == {**cards[2], "created": cards[2]["created"]}
    assert client().get("/v1/models/other").status_code == 404


def test_health_readiness_and_the_playground() -> None:
    assert client().get("/healthz").json() == {"status": "ok", "model": "tiny"}
    assert client().get("/readyz").json() == {"status": "ready", "model": "tiny"}
    starting = client(ready=False).get("/readyz")
    assert (starting.status_code, starting.headers["retry-after"]) == (503, "5")
    page = client().get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_other_origins_are_not_let_in_unless_named() -> None:
    ask = {"Origin": "https://example.com", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client().options("/v1/prompts", headers=ask).headers
    named = client(cors_origins=["https://example.com"]).options("/v1/prompts", headers=ask)
    assert named.headers["access-control-allow-origin"] == "https://example.com"


def test_the_openapi_document_names_every_route_and_its_errors() -> None:
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


def test_prompts_of_many_clients_at_once_are_not_mixed_up() -> None:
    async def go() -> list[Any]:
        app = application(FakeEngine())
        transport = httpx.ASGITransport(app=app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return await asyncio.gather(
                *(http.post("/v1/prompts", json={**GOOD, "intent": f"card {i}", "length": 1 + i % 24}) for i in range(60))
            )

    answers = asyncio.run(go())
    assert [(a.json()["intent"], a.json()["prompts"][0]["words"]) for a in answers] == [
        (f"card {i}", 1 + i % 24) for i in range(60)
    ]


def test_pages_of_several_nodes_become_one() -> None:
    page = '# HELP ray_udrl_x_total Things\n# TYPE ray_udrl_x_total counter\nray_udrl_x_total{{node="{0}"}} 1.0\n'
    other = "# HELP ray_tasks T\n# TYPE ray_tasks gauge\nray_tasks 5\n"
    assert merged([page.format("a") + other, other + page.format("b")]).splitlines() == [
        "# HELP ray_udrl_x_total Things",
        "# TYPE ray_udrl_x_total counter",
        'ray_udrl_x_total{node="a"} 1.0',
        'ray_udrl_x_total{node="b"} 1.0',
    ]
