"""Access control before any route: keys, loopback, body sizes, rates. The tests call it as an ASGI server does."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from serve.guard import GuardMiddleware, KeyLimits, is_loopback
from serve.keys import KeyRing, hash_key

RING = KeyRing({"a": hash_key("key-a"), "b": hash_key("key-b")})
KEY = (b"authorization", b"Bearer key-a")
HOST = (b"host", b"localhost:8000")
Sent = list[dict[str, Any]]


def _scope(method: str = "GET", path: str = "/x", headers: Any = (HOST, KEY), client: Any = ("127.0.0.1", 5)) -> dict[str, Any]:
    return {"type": "http", "method": method, "path": path, "headers": list(headers), "client": client, "state": {}}


async def send_request(
    app: Any, scope: dict[str, Any], chunks: list[bytes] | None = None, *, disconnects: bool = False
) -> tuple[int | None, dict[str, str], bytes]:
    """Send a body in ``chunks``, after which the client ``disconnects`` or is done. Status None: there was no response."""
    chunks = chunks or [b""]
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    if not disconnects:
        messages[-1]["more_body"] = False
    sent: Sent = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    if not sent:
        return None, {}, b""
    assert [message["type"] for message in sent].count("http.response.start") == 1
    headers = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:])


def request(
    app: Any, scope: dict[str, Any], chunks: list[bytes] | None = None, **options: Any
) -> tuple[int | None, dict[str, str], Any]:
    """As :func:`send_request`, with the body parsed; asserts the shape of errors."""
    status, headers, body = asyncio.run(send_request(app, scope, chunks, **options))
    if status is not None and status >= 400:
        assert set(json.loads(body)["error"]) == {"message", "type", "param"}
    return status, headers, json.loads(body) if body else None


async def _echo(request: Request) -> JSONResponse:
    """Return the body and the key name that the route received."""
    return JSONResponse({"body": (await request.body()).decode("latin-1"), "key": request.state.key_name})


PATHS = ["/x", "/", "/healthz", "/readyz", "/openapi.json", "/metrics", "/v1/prompts/{id}"]
INNER = Starlette(routes=[Route(path, _echo, methods=["GET", "POST", "PUT"]) for path in PATHS])


def guarded(keys: KeyRing | None = RING, inner: Any = INNER, **options: Any) -> GuardMiddleware:
    return GuardMiddleware(inner, keys, **options)


def bearer(token: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + token)]


# --- keys


def test_a_valid_key_is_accepted_and_routes_see_its_name() -> None:
    assert request(guarded(), _scope())[2]["key"] == "a"
    assert request(guarded(), _scope(headers=[(b"Authorization", b"bEARER   key-b ")]))[2]["key"] == "b"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"key-a")],
        [(b"authorization", b"Basic key-a")],
        [(b"authorization", b"Bearer key-c")],
        [(b"authorization", b"Bearer KEY-A")],
        [(b"authorization", b"Bearer key-a key-a")],
        [(b"authorization", b"Bearer key-a, Bearer key-a")],
        [(b"authorization", b"Bearer \xff\xfe\x00\xc3\xa9")],
        [(b"authorization", b"Bearer " + b"x" * 1_000_000)],
        [(b"authorization", b"Bearer " + hash_key("key-a").encode())],
        [KEY, KEY],  # ambiguous, even if they are equal
        [KEY, (b"AUTHORIZATION", b"Bearer key-b")],
        [(b"x-api-key", b"key-a")],
    ],
)
def test_any_other_credentials_are_401(headers: list[tuple[bytes, bytes]]) -> None:
    status, response_headers, body = request(guarded(), _scope(headers=headers))
    assert (status, response_headers["www-authenticate"], body["error"]["type"]) == (401, "Bearer", "unauthorized")


@pytest.mark.parametrize("method", ["POST", "HEAD", "OPTIONS", "DELETE"])
def test_every_method_needs_a_key(method: str) -> None:
    assert request(guarded(), _scope(method, headers=[]))[0] == 401


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/openapi.json"])
def test_open_paths_need_no_key_and_accept_a_wrong_one(path: str) -> None:
    for headers in ([], bearer(b"key-c")):
        assert request(guarded(), _scope(path=path, headers=headers))[0] == 200
        assert request(guarded(), {**_scope(path=f"/mounted{path}", headers=headers), "root_path": "/mounted"})[0] == 200


@pytest.mark.parametrize(
    "path", ["/metrics", "/healthz/", "//", "/healthz/../x", "/HEALTHZ", "", "/nowhere", "/mounted/healthz"]
)
def test_every_other_path_needs_a_key(path: str) -> None:
    assert request(guarded(), _scope(path=path, headers=[]))[0] == 401


# --- keys are off


@pytest.mark.parametrize(
    "host",
    [
        b"localhost",
        b"LocalHost:8000",
        b"127.0.0.1",
        b"127.0.0.1:8000",
        b"127.8.9.10:1",
        b"[::1]",
        b"[::1]:8000",
        b"[::ffff:127.0.0.1]",
    ],
)
def test_without_keys_a_host_header_of_this_machine_is_accepted(host: bytes) -> None:
    status, _, body = request(guarded(None), _scope("POST", headers=[(b"Host", host)]))
    assert (status, body["key"]) == (200, "anonymous")


@pytest.mark.parametrize("client", ["127.1.2.3", "::1", "::ffff:127.0.0.1", "::ffff:7f00:1"])
def test_without_keys_a_client_on_this_machine_is_accepted(client: str) -> None:
    assert request(guarded(None), _scope(client=(client, 5)))[0] == 200


@pytest.mark.parametrize(
    "hosts",
    [
        [],
        [b""],
        [b"evil.example"],
        [b"evil.example:8000"],
        [b"localhost.evil.example"],
        [b"127.0.0.1.evil.example"],
        [b"localhost@evil.example"],
        [b"evil.example#localhost"],
        [b"evil.example:80:localhost"],
        [b"127.0.0.1:8000@evil.example"],
        [b"0.0.0.0"],
        [b"192.168.0.1"],
        [b"2130706433"],
        [b"[::2]"],
        [b"::1:8000x"],
        [b"[::1"],
        [b"\xff\xfe"],
        [b"local\xe9host"],
        [b"localhost", b"evil.example"],
        [b"localhost", b"localhost"],
    ],
)
def test_without_keys_a_host_header_of_another_machine_is_403(hosts: list[bytes]) -> None:
    for path in ("/x", "/", "/healthz"):
        status, _, body = request(guarded(None), _scope(path=path, headers=[(b"host", host) for host in hosts]))
        assert (status, body["error"]["type"]) == (403, "forbidden")


@pytest.mark.parametrize(
    "client", [None, (), ("10.0.0.1", 5), ("::ffff:10.0.0.1", 5), ("fe80::1%eth0", 5), ("", 0), ("testclient", 1)]
)
def test_without_keys_a_client_on_another_machine_is_403(client: Any) -> None:
    assert request(guarded(None), _scope(client=client))[0] == 403


def test_with_keys_client_and_host_header_do_not_matter() -> None:
    for client in (None, ("10.0.0.1", 5)):
        assert request(guarded(), _scope(headers=[KEY, (b"host", b"example.org")], client=client))[0] == 200
        assert request(guarded(), _scope(headers=[KEY], client=client))[0] == 200


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("example.org", False),
        ("", False),
    ],
)
def test_loopback_names_and_addresses_are_recognized(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


@given(
    st.lists(
        st.tuples(st.sampled_from([b"host", b"authorization", b"content-length", b"x"]), st.binary(max_size=40)), max_size=4
    )
)
@settings(max_examples=300, deadline=None)
def test_no_header_causes_an_exception(headers: list[tuple[bytes, bytes]]) -> None:
    for keys in (RING, None):
        assert request(guarded(keys), _scope("POST", headers=headers))[0] in (200, 401, 403, 413)


# --- sizes


def test_a_body_up_to_the_limit_arrives_complete_in_any_chunking() -> None:
    app = guarded(limits=KeyLimits(body_bytes=10))
    for chunks in ([b"0123456789"], [b"01234", b"", b"56789", b""], [b""]):
        assert request(app, _scope("POST"), chunks)[2]["body"] == b"".join(chunks).decode()


@pytest.mark.parametrize(
    ("method", "length"), [("POST", n) for n in (None, b"5", b"0", b"10", b"-1", b"abc", b"")] + [("PUT", None)]
)
def test_chunks_above_the_limit_are_413_for_any_content_length(method: str, length: bytes | None) -> None:
    calls = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        calls.append(scope)

    headers = [KEY] + ([] if length is None else [(b"Content-Length", length)])
    status, _, body = request(
        guarded(inner=inner, limits=KeyLimits(body_bytes=10)), _scope(method, headers=headers), [b"01234", b"567890"]
    )
    assert (status, body["error"]["type"], body["error"]["param"]) == (413, "invalid_request", None)
    assert not calls


@pytest.mark.parametrize("length", [b"11", b"0011", b"9" * 10_000])
def test_a_content_length_over_the_limit_is_413_before_a_byte_is_read(length: bytes) -> None:
    app = guarded(limits=KeyLimits(body_bytes=10))

    async def never() -> dict[str, Any]:
        raise AssertionError("the body was read")

    async def run() -> Sent:
        sent: Sent = []

        async def send(message: Any) -> None:
            sent.append(message)

        await app(_scope("POST", headers=[KEY, (b"content-length", length)]), never, send)
        return sent

    assert asyncio.run(run())[0]["status"] == 413


def test_each_of_two_content_lengths_is_checked() -> None:
    headers = [KEY, (b"content-length", b"1"), (b"content-length", b"11")]
    assert request(guarded(limits=KeyLimits(body_bytes=10)), _scope("POST", headers=headers), [b"0"])[0] == 413


def test_an_unknown_caller_is_refused_before_the_body_is_read() -> None:
    assert request(guarded(limits=KeyLimits(body_bytes=10)), _scope("POST", headers=[]), [b"x" * 99])[0] == 401


def test_a_client_that_disconnects_while_sending_releases_its_slot() -> None:
    requests: list[Any] = []
    app = guarded(limits=KeyLimits(concurrent=1), on_request_end=lambda *values: requests.append(values))
    assert request(app, _scope("POST"), [b"01"], disconnects=True)[0] is None
    assert app.rate_limiters["a"].running == 0
    assert [(name, status) for _, name, status, _ in requests] == [("a", 499)]
    assert request(app, _scope("POST"))[0] == 200


def test_routes_receive_a_disconnect_after_the_body() -> None:
    messages = []

    async def inner(scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        messages.extend([await receive(), await receive()])

    request(guarded(inner=inner), _scope("POST"), [b"a", b"b"])
    assert messages == [{"type": "http.request", "body": b"ab", "more_body": False}, {"type": "http.disconnect"}]


# --- rate and concurrency


class PausedApplication:
    """An application whose responses start at once and end after ``resume`` is set."""

    def __init__(self) -> None:
        self.started = asyncio.Semaphore(0)
        self.resume = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}", "more_body": True})
        self.started.release()
        await self.resume.wait()
        if scope["path"] == "/fail":
            raise RuntimeError("half way")
        await send({"type": "http.response.body", "body": b""})


def test_a_stream_holds_a_slot_of_its_key_until_it_ends() -> None:
    async def run() -> None:
        inner = PausedApplication()
        app = guarded(inner=inner, limits=KeyLimits(concurrent=2))
        running = [asyncio.create_task(send_request(app, _scope("POST"))) for _ in range(2)]
        for _ in running:
            await inner.started.acquire()
        status, headers, body = await send_request(app, _scope("POST"))
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(body)["error"]["type"] == "rate_limited"
        other = asyncio.create_task(send_request(app, _scope("POST", headers=bearer(b"key-b"))))
        reading = asyncio.create_task(send_request(app, _scope("GET")))  # neither another key nor a GET is limited
        await inner.started.acquire()
        await inner.started.acquire()
        inner.resume.set()
        assert [(await task)[0] for task in (*running, other, reading)] == [200] * 4
        assert (await send_request(app, _scope("POST")))[0] == 200

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_failed_and_a_cancelled_request_release_their_slots() -> None:
    async def run() -> None:
        inner, requests = PausedApplication(), []
        app = guarded(inner=inner, limits=KeyLimits(concurrent=2), on_request_end=lambda *values: requests.append(values))
        failing = asyncio.create_task(send_request(app, _scope("POST", "/fail")))
        cancelled = asyncio.create_task(send_request(app, _scope("POST")))
        await inner.started.acquire()
        await inner.started.acquire()
        assert app.rate_limiters["a"].running == 2
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert app.rate_limiters["a"].running == 1
        inner.resume.set()
        with pytest.raises(RuntimeError, match="half way"):
            await failing
        assert app.rate_limiters["a"].running == 0
        assert [status for _, _, status, _ in requests] == [200, 200]  # the status that was sent before they ended

    asyncio.run(asyncio.wait_for(run(), 20))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_token_bucket_allows_a_burst_then_its_rate_and_reports_when_to_retry() -> None:
    clock = Clock()
    app = guarded(limits=KeyLimits(concurrent=1, per_minute=30), clock=clock)

    def post(key: bytes = b"key-a") -> tuple[int | None, str | None]:
        status, headers, _ = request(app, _scope("POST", headers=bearer(key)))
        return status, headers.get("retry-after")

    assert [post() for _ in range(4)] == [(200, None)] * 3 + [(429, "2")]  # burst 3, one token per 2 s
    assert post(b"key-b") == (200, None)
    assert [request(app, _scope(method))[0] for method in ("GET", "PUT")] == [200, 200]  # only POST takes tokens
    clock.now += 0.5
    assert post() == (429, "2")  # 1.5 s, rounded up; a refusal takes no token
    clock.now += 1.5
    assert [post(), post()] == [(200, None), (429, "2")]
    clock.now += 3600
    assert [post()[0] for _ in range(4)] == [200, 200, 200, 429]  # an idle hour refills no more than the burst
    clock.now -= 7200
    assert post()[0] == 429
    assert app.rate_limiters["a"].tokens >= 0


def test_the_burst_is_at_least_the_concurrency_limit() -> None:
    app = guarded(limits=KeyLimits(concurrent=5, per_minute=1), clock=Clock())
    assert [request(app, _scope("POST"))[:2] for _ in range(6)][-1][1]["retry-after"] == "60"
    assert [request(app, _scope("POST", headers=bearer(b"key-b")))[0] for _ in range(6)] == [200] * 5 + [429]


def test_without_keys_all_callers_share_one_limit() -> None:
    app = guarded(None, limits=KeyLimits(concurrent=1, per_minute=10), clock=Clock())
    assert [request(app, _scope("POST", client=(client, 1)))[0] for client in ("127.0.0.1", "::1")] == [200, 429]


def test_callers_cannot_make_the_guards_state_grow() -> None:
    app = guarded()
    for number in range(50):
        request(
            app,
            _scope("POST", f"/{number}", headers=bearer(b"x%d" % number), client=(f"10.0.0.{number}", 1)),
        )
        request(app, _scope("POST", "/", headers=bearer(b"x%d" % number)))
    assert set(app.rate_limiters) == {"a", "b", "anonymous"}


# --- counting, websockets, lifespan


def test_a_request_is_counted_under_its_route_not_under_its_path() -> None:
    counted: list[Any] = []
    clock = Clock()

    async def slow(_: Request) -> PlainTextResponse:
        clock.now += 2
        raise RuntimeError("a bug")

    inner = Starlette(routes=[Route("/v1/prompts/{id}", _echo), Route("/slow", slow)])
    app = guarded(inner=inner, on_request_end=lambda *values: counted.append(values), clock=clock)
    request(app, _scope(path="/v1/prompts/made-up"))
    asyncio.run(send_request(app, _scope(path="/nowhere-77")))
    request(app, _scope(path="/v1/prompts/1", headers=[]))
    with pytest.raises(RuntimeError, match="a bug"):
        request(app, _scope(path="/slow"))
    assert counted == [
        ("/v1/prompts/{id}", "a", 200, 0),
        ("other", "a", 404, 0),
        ("other", "unknown", 401, 0),
        ("/slow", "a", 500, 2),
    ]


@pytest.mark.parametrize("keys", [RING, None])
def test_a_websocket_is_closed_before_it_opens(keys: KeyRing | None) -> None:
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        await guarded(keys)({**_scope(), "type": "websocket"}, None, send)  # type: ignore[arg-type]

    asyncio.run(asyncio.wait_for(run(), 20))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_lifespan_events_reach_the_application() -> None:
    types = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        types.append(scope["type"])

    asyncio.run(guarded(inner=inner)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert types == ["lifespan"]
