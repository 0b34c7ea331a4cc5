"""What is refused before any route: keys, loopback, sizes, rates; spoken to as an ASGI server would."""

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

from serve.guard import Guard, Limits, is_loopback
from serve.keys import KeyRing, digest

RING = KeyRing({"a": digest("key-a"), "b": digest("key-b")})
KEY = (b"authorization", b"Bearer key-a")
HOST = (b"host", b"localhost:8000")
Sent = list[dict[str, Any]]


def _scope(method: str = "GET", path: str = "/x", headers: Any = (HOST, KEY), client: Any = ("127.0.0.1", 5)) -> dict[str, Any]:
    return {"type": "http", "method": method, "path": path, "headers": list(headers), "client": client, "state": {}}


async def _ask(
    app: Any, scope: dict[str, Any], chunks: list[bytes] | None = None, *, leaves: bool = False
) -> tuple[int | None, dict[str, str], bytes]:
    """Send a request in ``chunks``; ``leaves``: the client is gone after them. Status None: nothing was answered."""
    chunks = chunks or [b""]
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    if not leaves:
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


def ask(
    app: Any, scope: dict[str, Any], chunks: list[bytes] | None = None, **more: Any
) -> tuple[int | None, dict[str, str], Any]:
    status, headers, body = asyncio.run(_ask(app, scope, chunks, **more))
    if status is not None and status >= 400:
        assert set(json.loads(body)["error"]) == {"message", "type", "param"}
    return status, headers, json.loads(body) if body else None


async def _echo(request: Request) -> JSONResponse:
    """What the routes were given."""
    return JSONResponse({"body": (await request.body()).decode("latin-1"), "key": request.state.key_name})


PATHS = ["/x", "/", "/healthz", "/readyz", "/openapi.json", "/metrics", "/v1/prompts/{id}"]
INNER = Starlette(routes=[Route(path, _echo, methods=["GET", "POST", "PUT"]) for path in PATHS])


def guarded(keys: KeyRing | None = RING, inner: Any = INNER, **more: Any) -> Guard:
    return Guard(inner, keys, **more)


# --- keys


def test_a_known_key_goes_through_and_the_routes_know_whose_it_is() -> None:
    assert ask(guarded(), _scope())[2]["key"] == "a"
    assert ask(guarded(), _scope(headers=[(b"Authorization", b"bEARER   key-b ")]))[2]["key"] == "b"


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
        [(b"authorization", b"Bearer " + digest("key-a").encode())],
        [KEY, KEY],  # which of two counts is not ours to guess
        [KEY, (b"AUTHORIZATION", b"Bearer key-b")],
        [(b"x-api-key", b"key-a")],
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "DELETE"])
def test_anything_else_is_401(headers: list[tuple[bytes, bytes]], method: str) -> None:
    status, answered, body = ask(guarded(), _scope(method, headers=headers))
    assert (status, answered["www-authenticate"], body["error"]["type"]) == (401, "Bearer", "unauthorized")


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/openapi.json"])
def test_the_open_paths_need_no_key_and_mind_no_wrong_one(path: str) -> None:
    for headers in ([], [(b"authorization", b"Bearer key-c")]):
        assert ask(guarded(), _scope(path=path, headers=headers))[0] == 200
        assert ask(guarded(), {**_scope(path=f"/mounted{path}", headers=headers), "root_path": "/mounted"})[0] == 200


@pytest.mark.parametrize(
    "path", ["/metrics", "/healthz/", "//", "/healthz/../x", "/HEALTHZ", "", "/nowhere", "/mounted/healthz"]
)
def test_no_other_path_is_open(path: str) -> None:
    assert ask(guarded(), _scope(path=path, headers=[]))[0] == 401


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
@pytest.mark.parametrize("client", ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1", "::ffff:7f00:1"])
def test_without_keys_this_machine_is_answered(host: bytes, client: str) -> None:
    status, _, body = ask(guarded(None), _scope("POST", headers=[(b"Host", host)], client=(client, 5)))
    assert (status, body["key"]) == (200, "anonymous")


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
def test_without_keys_a_host_that_is_not_this_machine_is_403(hosts: list[bytes]) -> None:
    for path in ("/x", "/", "/healthz"):
        status, _, body = ask(guarded(None), _scope(path=path, headers=[(b"host", host) for host in hosts]))
        assert (status, body["error"]["type"]) == (403, "forbidden")


@pytest.mark.parametrize(
    "client", [None, (), ("10.0.0.1", 5), ("::ffff:10.0.0.1", 5), ("fe80::1%eth0", 5), ("", 0), ("testclient", 1)]
)
def test_without_keys_another_peer_is_403(client: Any) -> None:
    assert ask(guarded(None), _scope(client=client))[0] == 403


def test_with_keys_neither_peer_nor_host_matters() -> None:
    for client in (None, ("10.0.0.1", 5)):
        assert ask(guarded(), _scope(headers=[KEY, (b"host", b"example.org")], client=client))[0] == 200
        assert ask(guarded(), _scope(headers=[KEY], client=client))[0] == 200


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
def test_an_address_to_listen_on_is_known_as_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


@given(
    st.lists(
        st.tuples(st.sampled_from([b"host", b"authorization", b"content-length", b"x"]), st.binary(max_size=40)), max_size=4
    )
)
@settings(max_examples=300, deadline=None)
def test_no_header_makes_the_guard_fail(headers: list[tuple[bytes, bytes]]) -> None:
    for keys in (RING, None):
        assert ask(guarded(keys), _scope("POST", headers=headers))[0] in (200, 401, 403, 413)


# --- sizes


def test_a_body_up_to_the_limit_arrives_whole_however_it_is_cut() -> None:
    app = guarded(limits=Limits(body_bytes=10))
    for chunks in ([b"0123456789"], [b"01234", b"", b"56789", b""], [b""]):
        assert ask(app, _scope("POST"), chunks)[2]["body"] == b"".join(chunks).decode()


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("length", [None, b"5", b"0", b"10", b"-1", b"abc", b""])
def test_chunks_that_add_up_to_more_are_413_whatever_content_length_says(length: bytes | None, method: str) -> None:
    reached = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope)

    headers = [KEY] + ([] if length is None else [(b"Content-Length", length)])
    status, _, body = ask(
        guarded(inner=inner, limits=Limits(body_bytes=10)), _scope(method, headers=headers), [b"01234", b"567890"]
    )
    assert (status, body["error"]["type"], body["error"]["param"]) == (413, "invalid_request", None)
    assert not reached


@pytest.mark.parametrize("length", [b"11", b"0011", b"9" * 10_000])
def test_a_content_length_over_the_limit_is_413_before_a_byte_is_read(length: bytes) -> None:
    app = guarded(limits=Limits(body_bytes=10))

    async def never() -> dict[str, Any]:
        raise AssertionError("was read")

    async def run() -> Sent:
        sent: Sent = []

        async def send(message: Any) -> None:
            sent.append(message)

        await app(_scope("POST", headers=[KEY, (b"content-length", length)]), never, send)
        return sent

    assert asyncio.run(run())[0]["status"] == 413


def test_two_content_lengths_are_both_heeded() -> None:
    headers = [KEY, (b"content-length", b"1"), (b"content-length", b"11")]
    assert ask(guarded(limits=Limits(body_bytes=10)), _scope("POST", headers=headers), [b"0"])[0] == 413


def test_a_stranger_is_refused_before_his_body_is_read() -> None:
    assert ask(guarded(limits=Limits(body_bytes=10)), _scope("POST", headers=[]), [b"x" * 99])[0] == 401


def test_a_client_that_leaves_while_sending_gives_its_slot_back() -> None:
    seen: list[Any] = []
    app = guarded(limits=Limits(concurrent=1), seen=lambda *of: seen.append(of))
    assert ask(app, _scope("POST"), [b"01"], leaves=True)[0] is None
    assert app.allowances["a"].running == 0
    assert [(name, status) for _, name, status, _ in seen] == [("a", 499)]
    assert ask(app, _scope("POST"))[0] == 200


def test_the_routes_still_hear_of_a_disconnect_after_the_body() -> None:
    heard = []

    async def inner(scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        heard.extend([await receive(), await receive()])

    ask(guarded(inner=inner), _scope("POST"), [b"a", b"b"])
    assert heard == [{"type": "http.request", "body": b"ab", "more_body": False}, {"type": "http.disconnect"}]


# --- rate and concurrency


class Held:
    """An application whose answers begin, and end when they are let go."""

    def __init__(self) -> None:
        self.begun = asyncio.Semaphore(0)
        self.go = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}", "more_body": True})
        self.begun.release()
        await self.go.wait()
        if scope["path"] == "/fail":
            raise RuntimeError("half way")
        await send({"type": "http.response.body", "body": b""})


def test_a_keys_streams_hold_its_slots_until_they_end() -> None:
    async def run() -> None:
        held = Held()
        app = guarded(inner=held, limits=Limits(concurrent=2))
        running = [asyncio.create_task(_ask(app, _scope("POST"))) for _ in range(2)]
        for _ in running:
            await held.begun.acquire()
        status, headers, body = await _ask(app, _scope("POST"))
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(body)["error"]["type"] == "rate_limited"
        other = asyncio.create_task(_ask(app, _scope("POST", headers=[(b"authorization", b"Bearer key-b")])))
        reading = asyncio.create_task(_ask(app, _scope("GET")))  # neither another key nor a GET is held up
        await held.begun.acquire()
        await held.begun.acquire()
        held.go.set()
        assert [(await task)[0] for task in (*running, other, reading)] == [200] * 4
        assert (await _ask(app, _scope("POST")))[0] == 200

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_slot_comes_back_from_a_failure_and_from_a_cancelled_request() -> None:
    async def run() -> None:
        held, seen = Held(), []
        app = guarded(inner=held, limits=Limits(concurrent=2), seen=lambda *of: seen.append(of))
        failing = asyncio.create_task(_ask(app, _scope("POST", "/fail")))
        leaving = asyncio.create_task(_ask(app, _scope("POST")))
        await held.begun.acquire()
        await held.begun.acquire()
        assert app.allowances["a"].running == 2
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert app.allowances["a"].running == 1
        held.go.set()
        with pytest.raises(RuntimeError, match="half way"):
            await failing
        assert app.allowances["a"].running == 0
        assert [status for _, _, status, _ in seen] == [200, 200]  # what had gone out when they ended

    asyncio.run(asyncio.wait_for(run(), 20))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_rate_has_a_burst_and_then_its_pace_and_says_when_to_come_again() -> None:
    clock = Clock()
    app = guarded(limits=Limits(concurrent=1, per_minute=30), clock=clock)

    def post(key: bytes = b"key-a") -> tuple[int | None, str | None]:
        status, headers, _ = ask(app, _scope("POST", headers=[(b"authorization", b"Bearer " + key)]))
        return status, headers.get("retry-after")

    assert [post() for _ in range(4)] == [(200, None)] * 3 + [(429, "2")]  # a tenth of 30; one comes back in 2 s
    assert post(b"key-b") == (200, None)
    assert [ask(app, _scope(method))[0] for method in ("GET", "PUT")] == [200, 200]  # what writes nothing is not counted
    clock.now += 0.5
    assert post() == (429, "2")  # 1.5 s, rounded up; the refusal cost nothing
    clock.now += 1.5
    assert [post(), post()] == [(200, None), (429, "2")]
    clock.now += 3600
    assert [post()[0] for _ in range(4)] == [200, 200, 200, 429]  # an hour of rest saves up no more than the burst
    clock.now -= 7200
    assert post()[0] == 429
    assert app.allowances["a"].tokens >= 0


def test_the_burst_is_at_least_what_may_run_at_once() -> None:
    app = guarded(limits=Limits(concurrent=5, per_minute=1), clock=Clock())
    assert [ask(app, _scope("POST"))[:2] for _ in range(6)][-1][1]["retry-after"] == "60"
    assert [ask(app, _scope("POST", headers=[(b"authorization", b"Bearer key-b")]))[0] for _ in range(6)] == [200] * 5 + [429]


def test_without_keys_all_share_one_allowance() -> None:
    app = guarded(None, limits=Limits(concurrent=1, per_minute=10), clock=Clock())
    assert [ask(app, _scope("POST", client=(client, 1)))[0] for client in ("127.0.0.1", "::1")] == [200, 429]


def test_what_is_kept_does_not_grow_with_what_callers_send() -> None:
    app = guarded()
    for number in range(50):
        ask(
            app,
            _scope("POST", f"/{number}", headers=[(b"authorization", b"Bearer x%d" % number)], client=(f"10.0.0.{number}", 1)),
        )
        ask(app, _scope("POST", "/", headers=[(b"authorization", b"Bearer x%d" % number)]))
    assert set(app.allowances) == {"a", "b", "anonymous"}


# --- the rest


def test_each_request_is_counted_under_its_route_not_under_what_was_typed() -> None:
    seen: list[Any] = []
    clock = Clock()

    async def slow(_: Request) -> PlainTextResponse:
        clock.now += 2
        raise RuntimeError("ours")

    inner = Starlette(routes=[Route("/v1/prompts/{id}", _echo), Route("/slow", slow)])
    app = guarded(inner=inner, seen=lambda *of: seen.append(of), clock=clock)
    ask(app, _scope(path="/v1/prompts/made-up"))
    asyncio.run(_ask(app, _scope(path="/nowhere-77")))
    ask(app, _scope(path="/v1/prompts/1", headers=[]))
    with pytest.raises(RuntimeError, match="ours"):
        ask(app, _scope(path="/slow"))
    assert seen == [
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


def test_lifespan_goes_through() -> None:
    seen = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(guarded(inner=inner)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]
