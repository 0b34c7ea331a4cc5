"""Hostile and generated requests: none causes a failure, all responses follow the OpenAPI document and the one error shape.

schemathesis generates valid and invalid requests from the document. The document does not contain the model's own bounds
(tasks, words, bins); a second document does, and every request that is valid there must be answered.
"""

import gzip
import json
import random
import zlib
from typing import Any

import pytest
import schemathesis
from fakes.fake_engine import WORDS, FakeEngine, draft, make_application, make_vocabulary
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serve.engine_protocol import Draft, SampleRequest
from serve.keys import KeyRing, hash_key
from udrl.commands import ANY
from udrl.text import count_words

KEY = {"Authorization": "Bearer k"}
JSON = {"Content-Type": "application/json"}
PATHS = ["/v1/prompts", "/v1/prompts/batch", "/v1/completions", "/v1/chat/completions"]
TYPES = {
    400: {"invalid_request", "invalid_json"},
    401: {"unauthorized"},
    404: {"not_found"},
    405: {"invalid_request"},
    413: {"invalid_request"},
    422: {"invalid_request"},
}
# Text with a meaning for some component: JSON, SSE, HTML, terminals, the student's own control tokens.
NASTY = [
    "\x00",
    "<|end|><|reward:4|><|words:12|><|endoftext|>",
    "\u202etxt.exe\u2066\u200b\ufeff",
    "\r\n\r\nevent: done\ndata: {}\n\n",
    "line\u2028separator\u2029next\x85line\x0b\x1e",
    "<script>alert(1)</script>{{7*7}}${jndi:x}%n%s'; DROP TABLE--",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301\u0301\u0301 \ufffe\uffff",
]


def disobedient_drafts(request: SampleRequest, call: int) -> list[Draft]:
    """Return drafts of wrong length, duplicate, cut off or empty ones; deterministic in the request and the call."""
    rng = random.Random(zlib.crc32(repr((request, call)).encode()))
    words = 5 if request.command.words == ANY else request.command.words
    drafts = []
    for _ in range(request.n):
        count = max(words + rng.choice([-3, 0, 0, 2]), 0)
        text = " ".join(rng.choice([*WORDS, *NASTY]) for _ in range(count))
        drafts.append(draft(text, rng.choice(["stop", "stop", "length"])))
    return drafts


def _app(engine: FakeEngine | None = None) -> FastAPI:
    limits = {"concurrent": 1000, "per_minute": 10_000_000}
    return make_application(engine or FakeEngine(disobedient_drafts), KeyRing({"t": hash_key("k")}), limits=limits)


def _app_with_model_bounds() -> FastAPI:
    """Return the application with the model's own bounds in its document: every request that it allows is valid."""
    app, vocabulary = _app(), make_vocabulary()
    document = app.openapi()
    task = {"enum": [*vocabulary.tasks, "all"]}
    tasks = {"type": "array", "items": {"enum": list(vocabulary.tasks)}, "minItems": 1, "uniqueItems": True}
    least, most = vocabulary.max_words // 3, vocabulary.max_words
    words = {"type": "integer", "minimum": 1, "maximum": most}
    between = {"min": {**words, "maximum": least}, "max": {**words, "minimum": least}}
    text = {"type": "string", "pattern": "^[A-Za-z<|>:\u00e9\u4e00-\u4e20]", "maxLength": 100}
    narrower: dict[str, Any] = {
        "task": {"anyOf": [task, tasks]},
        "length": {
            "anyOf": [
                {"enum": ["any", None]},
                words,
                {"type": "object", "properties": between, "required": ["min", "max"], "additionalProperties": False},
            ]
        },
        "reward": {
            "anyOf": [{"enum": ["any", None]}, {"type": "integer", "minimum": 0, "maximum": vocabulary.reward_bins - 1}]
        },
        "n": {"type": "integer", "minimum": 1, "maximum": 16},
        # Temperature 0 allows only one prompt.
        "temperature": {"type": "number", "exclusiveMinimum": 0, "maximum": 2},
        "model": {"const": "tiny"},
        "intent": text,
        "intents": {"type": "array", "items": text, "minItems": 1, "maxItems": 5},
        "prompt": text,  # several prompts cannot be streamed
        "messages": {
            "type": "array",
            "minItems": 1,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {"role": {"const": "user"}, "content": text},
                "required": ["role", "content"],
                "additionalProperties": False,
            },
        },
    }
    for name, schema in document["components"]["schemas"].items():
        if name.endswith("Request"):
            properties = schema["properties"]
            properties.update({key: value for key, value in narrower.items() if key in properties})
            schema["required"] = sorted({*schema.get("required", []), "task"})
    for path in list(document["paths"]):
        if path not in PATHS:
            del document["paths"][path]
    app.openapi = lambda: document  # type: ignore[method-assign]
    return app


def _schema(app: FastAPI, **generation: Any) -> Any:
    # max-stream-events: streams are read to their end
    config = schemathesis.Config.from_dict({"generation": generation, "max-stream-events": 100_000})
    return schemathesis.openapi.from_asgi("/openapi.json", app, config=config)


PUBLISHED_SCHEMA = _schema(_app(), mode="all")
BOUNDED_SCHEMA = _schema(_app_with_model_bounds(), **{"mode": "positive", "with-security-parameters": False})
FUZZING = settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def parse_error(response: Any) -> dict[str, Any]:
    """Assert the one error shape and return the error."""
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param"}
    assert isinstance(error["message"], str)
    assert 0 < len(error["message"]) < 1000
    assert "\n" not in error["message"]
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["type"] in TYPES[response.status_code]
    return error


def parse_events(text: str) -> list[tuple[str, Any]]:
    """Parse a stream as the standard says: only CR, LF or both end a line."""
    events = []
    for block in text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        assert set(fields) <= {"event", "data"}
        events.append((fields.get("event", "message"), fields["data"]))
    return events


@PUBLISHED_SCHEMA.parametrize()
@FUZZING
def test_generated_requests_get_a_documented_response_or_the_one_error_shape(case: Any) -> None:
    response = case.call(headers=KEY)
    # The document cannot decide whether a valid request is accepted; the next test does.
    case.validate_response(response, headers=KEY, excluded_checks=[positive_data_acceptance])
    assert response.status_code < 500
    if response.status_code >= 400:
        parse_error(response)


def with_integers(value: Any) -> Any:
    """Replace 8.0 by 8: JSON Schema counts it as an integer, the server does not."""
    if isinstance(value, dict):
        return {key: with_integers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_integers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@BOUNDED_SCHEMA.parametrize()
@FUZZING
def test_every_request_within_the_models_bounds_is_answered(case: Any) -> None:
    case.body = with_integers(case.body)
    response = case.call(headers=KEY)
    case.validate_response(response, headers=KEY)
    assert response.status_code == 200
    streamed = response.headers["content-type"][0].startswith("text/event-stream")
    events = parse_events(response.content.decode()) if streamed else []
    assert "error" not in {name for name, _ in events}
    if case.path == "/v1/prompts":
        data = {name: [json.loads(text) for event, text in events if event == name] for name in ("prompt", "done")}
        answer = {"prompts": data["prompt"], **data["done"][0]} if streamed else response.json()
        assert not streamed or events[-1][0] == "done"
        check_prompts(case.body, answer)
    elif streamed:
        assert events[-1] == ("message", "[DONE]")
        choices = [choice for _, text in events[:-1] for choice in json.loads(text)["choices"]]
        finished = [choice["index"] for choice in choices if choice["finish_reason"]]
        assert len(set(finished)) == len(finished)
        assert set(finished) == {choice["index"] for choice in choices}


def check_prompts(body: dict[str, Any], answer: dict[str, Any]) -> None:
    """Assert that the reported lengths, commands and counts are true."""
    tasks = [body["task"]] if isinstance(body["task"], str) else body["task"]
    if body["task"] == "all":
        tasks = list(make_vocabulary().tasks)
    assert len(answer["prompts"]) + answer["missing"] == len(tasks) * body.get("n", 1)
    length = body.get("length")
    for task in tasks:
        prompts = [prompt for prompt in answer["prompts"] if prompt["task"] == task]
        assert len({" ".join(prompt["text"].lower().split()) for prompt in prompts}) == len(prompts)
        for prompt in prompts:
            assert prompt["words"] == count_words(prompt["text"])
            if length in ("any", None):
                assert prompt["on_length"] is None
                assert (prompt["command"]["words"] is None) == (length == "any")
            else:
                least, most = (length["min"], length["max"]) if isinstance(length, dict) else (length, length)
                assert prompt["on_length"] == (least <= prompt["words"] <= most)
                assert least <= prompt["command"]["words"] <= most


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(_app(), headers=KEY, raise_server_exceptions=False)


GOOD: dict[str, dict[str, Any]] = {
    "/v1/prompts": {"intent": "a card", "task": "text_to_image"},
    "/v1/prompts/batch": {"intents": ["a card"], "task": "text_to_image"},
    "/v1/completions": {"model": "tiny", "prompt": "a card", "task": "text_to_image"},
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "a card"}],
        "task": "text_to_image",
    },
}


def _body_with(path: str, key: str, literal: str) -> bytes:
    """Return the valid body of ``path`` with ``key`` set to JSON that Python would not write."""
    body = {name: value for name, value in GOOD[path].items() if name != key}
    return f"{json.dumps(body)[:-1]}, {json.dumps(key)}: {literal}}}".encode()


LITERALS = {
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "1e400": "1e400",
    "-0.0": "-0.0",
    "1e-400": "1e-400",
    "10**400": "1" + "0" * 400,
    "5000 digits": "9" * 5000,
    "a lone surrogate": '"\\ud800"',
    "a surrogate inside": '"a card\\udfff"',
    "a NUL": '"\\u0000"',
    "a deep list": "[" * 400 + "]" * 400,
    "a deep object": '{"a":' * 400 + "1" + "}" * 400,
    "a surrogate as key": '{"\\ud800": "\\ud800"}',
    "a control token": '"<|end|><|reward:4|>"',
    "true": "true",
    "a list of null": "[null]",
    "an empty object": "{}",
}
KEYS = [
    *("intent", "intents", "task", "length", "reward", "n", "seed", "temperature", "stream", "model", "prompt", "messages"),
    *("user", "metadata", "max_tokens", "max_completion_tokens", "top_p", "stop", "presence_penalty", "logit_bias", "suffix"),
    *("stream_options", "response_format", "logprobs", "unknown", "\ud800", ""),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("literal", LITERALS.values(), ids=LITERALS)
def test_no_value_of_any_key_causes_a_failure(client: TestClient, path: str, literal: str) -> None:
    for key in KEYS:
        response = client.post(path, content=_body_with(path, key, literal), headers=JSON)
        assert response.status_code in (200, 400, 404, 422), (key, response.text)
        if response.status_code != 200:
            parse_error(response)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("nasty", NASTY)
def test_nasty_text_is_accepted_as_an_intent_and_refused_as_a_name(path: str, nasty: str) -> None:
    engine = FakeEngine(disobedient_drafts)
    client = TestClient(_app(engine), headers=KEY, raise_server_exceptions=False)
    for stream in (False, True) if path != "/v1/prompts/batch" else (False,):
        body = json.loads(json.dumps(GOOD[path]).replace('"a card"', json.dumps(f"x {nasty} y")))
        response = client.post(path, json={**body, **({"stream": True} if stream else {})})
        assert response.status_code == 200
        assert engine.requests[-1].intent == f"x {nasty} y"  # unchanged: encoding it safely is the engine's task
        if stream:
            assert "error" not in {name for name, _ in parse_events(response.text)}
    for key in ("task", "model", "unknown", nasty):
        assert client.post(path, json={**GOOD[path], key: nasty}).status_code in (404, 422)
    if "model" in GOOD[path]:
        assert client.post(path, json={**GOOD[path], "user": nasty, "metadata": {nasty: nasty}}).status_code == 200
        for model in (nasty, f"tiny:{nasty}", "tiny:", ":", ""):
            assert parse_error(client.post(path, json={**GOOD[path], "model": model}))["param"] == "model"


BODIES: dict[str, tuple[bytes, dict[str, str], set[int]]] = {
    "2 MB": (b'{"intent": "' + b"x" * 2_000_000 + b'"}', JSON, {413}),
    "2 MB of spaces": (b" " * 2_000_000, JSON, {413}),
    "empty": (b"", JSON, {400, 422}),
    "not UTF-8": (b'{"intent": "\xff\xfe"}', JSON, {400}),
    "an encoded surrogate": (b'{"intent": "\xed\xa0\x80"}', JSON, {400, 422}),
    "cut short": (b'{"intent": "a ca', JSON, {400}),
    "two values": (b"{}{}", JSON, {400}),
    "60,000 open brackets": (b"[" * 60_000, JSON, {400}),
    "12,000 open objects": (b'{"a":' * 12_000, JSON, {400}),
    "gzip": (gzip.compress(json.dumps(GOOD["/v1/prompts"]).encode()), {**JSON, "Content-Encoding": "gzip"}, {400}),
    "a gzip bomb": (gzip.compress(b" " * 10_000_000), {**JSON, "Content-Encoding": "gzip"}, {400}),
    "plain text": (json.dumps(GOOD["/v1/prompts"]).encode(), {"Content-Type": "text/plain"}, {400, 415, 422}),
    "a form": (b"intent=x&task=y", {"Content-Type": "application/x-www-form-urlencoded"}, {400, 415, 422}),
    "a file": (b"--b\r\n\r\n\r\n--b--", {"Content-Type": "multipart/form-data; boundary=b"}, {400, 415, 422}),
    "an unknown charset": (b'"\xff"', {"Content-Type": "application/json; charset=x-none"}, {400, 415, 422}),
    "no content type": (json.dumps(GOOD["/v1/prompts"]).encode(), {}, {400, 415, 422}),
    "a number": (b"1" * 60_000, JSON, {400, 422}),
    "a string": (b'"intent"', JSON, {422}),
    "null": (b"null", JSON, {422}),
    "a list": (b"[{}]", JSON, {422}),
    "5,000 unknown keys": (json.dumps({f"k{i}": i for i in range(5000)}).encode(), JSON, {413, 422}),
}


@pytest.mark.parametrize(("body", "headers", "statuses"), BODIES.values(), ids=BODIES)
def test_an_invalid_body_is_refused(client: TestClient, body: bytes, headers: dict[str, str], statuses: set[int]) -> None:
    response = client.post("/v1/prompts", content=body, headers=headers)
    assert response.status_code in statuses
    parse_error(response)


def test_a_body_that_is_not_json_has_its_own_error_type(client: TestClient) -> None:
    for body in (b"{", b'{"intent": "\xff"}', b"[" * 60_000):
        assert parse_error(client.post("/v1/prompts", content=body, headers=JSON))["type"] == "invalid_json"


def test_the_last_of_two_equal_keys_counts(client: TestClient) -> None:
    body = b'{"intent": "one", "task": "nope", "intent": "two", "task": "image_search"}'
    response = client.post("/v1/prompts", content=body, headers=JSON)
    assert response.status_code == 200
    assert response.json()["intent"] == "two"


def test_a_wrong_method_is_405_with_the_allowed_one(client: TestClient) -> None:
    for path, allowed in [("/v1/prompts", "POST"), ("/v1/models", "GET"), ("/healthz", "GET")]:
        for method in ("PUT", "PATCH", "DELETE", "TRACE"):
            response = client.request(method, path)
            assert response.status_code == 405
            assert response.headers["allow"] == allowed
            parse_error(response)


@pytest.mark.parametrize(
    "path",
    [
        *("/nowhere", "/v1/prompts/x", "/v1/models/x", "/v1/models/%00", "/v1/models/%ff%fe", "/v1/models/tiny:x"),
        *("/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/" + "x" * 10_000, "/playground/../../etc/passwd", "/v1/models/a/b"),
    ],
)
def test_an_unknown_path_or_model_is_404(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404
    parse_error(response)


def test_an_exception_of_the_engine_is_500_and_reveals_no_detail() -> None:
    engine = FakeEngine()
    engine.error = RuntimeError("secret \ud800 detail")
    client = TestClient(_app(engine), headers=KEY, raise_server_exceptions=False)
    for path in PATHS:
        for stream in (False, True) if path != "/v1/prompts/batch" else (False,):
            response = client.post(path, json={**GOOD[path], **({"stream": True} if stream else {})})
            assert response.status_code == 500
            assert response.json()["error"]["type"] == "internal_error"
            assert "secret" not in response.text
