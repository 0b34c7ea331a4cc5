"""Access control in front of every route: keys, the loopback rule, body sizes, rates and concurrency per key.

Plain ASGI, because Starlette's middleware base class buffers streams and hides disconnects.
"""

import ipaddress
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.keys import KeyRing
from serve.request_errors import RequestError

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/openapi.json"})  # need no key
ANONYMOUS = "anonymous"  # key name of every caller while keys are off, and of callers of open paths without a key
UNKNOWN_CALLER = "unknown"  # key name under which refused callers are counted
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a disconnected client; counted, never sent

_HOST_HEADER = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]+)(?::[0-9]{0,5})?")


@dataclass(frozen=True)
class KeyLimits:
    """Limits of one key in this process.

    ``body_bytes``: of a request. ``concurrent``: POST requests at a time. ``per_minute``: POST requests, as a token bucket
    that holds a tenth of a minute's requests, and at least ``concurrent``.
    """

    body_bytes: int = 65_536
    concurrent: int = 64
    per_minute: int = 6000

    @property
    def burst(self) -> float:
        return max(self.per_minute / 10, self.concurrent)


@dataclass
class RateLimiter:
    """The token bucket and the running requests of one key. ``clock`` returns seconds."""

    limits: KeyLimits
    clock: Callable[[], float]
    running: int = 0
    tokens: float = field(init=False)
    refilled_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.tokens, self.refilled_at = self.limits.burst, self.clock()

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Take a token and hold one of the key's concurrent slots.

        Raises:
            RequestError: 429 with the seconds until a retry can succeed. A refused request takes no token.
        """
        limits, now = self.limits, self.clock()
        tokens_per_second = limits.per_minute / 60
        self.tokens = min(limits.burst, self.tokens + max(now - self.refilled_at, 0) * tokens_per_second)
        self.refilled_at = now
        if self.running >= limits.concurrent:
            raise _rate_limit_error(f"too many concurrent requests with this key; the limit is {limits.concurrent}", 1)
        if self.tokens < 1:
            wait = max(math.ceil((1 - self.tokens) / tokens_per_second), 1)
            raise _rate_limit_error(
                f"too many requests with this key; the limit is {limits.per_minute} per minute; try again in {wait} s", wait
            )
        self.tokens -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1


def _rate_limit_error(message: str, retry_after: int) -> RequestError:
    return RequestError(message, None, 429, "rate_limited", retry_after)


class _ClientDisconnectedError(Exception):
    """The client disconnected before its body was complete."""


class GuardMiddleware:
    """ASGI middleware that refuses requests before any route sees them. It closes websockets and passes lifespan events.

    With keys, ``request.state.key_name`` is the name of the caller's key. Without, only callers on this machine are answered,
    and only if the Host header names this machine too: otherwise a web page whose host name resolves to 127.0.0.1 (DNS
    rebinding) could reach the server through a local browser.

    Args:
        keys: None turns keys off.
        on_request_end: called with endpoint (its route, never the path that a caller sent), key name, status and seconds.
        clock: returns seconds; for tests.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyRing | None,
        limits: KeyLimits | None = None,
        on_request_end: Callable[[str, str, int, float], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app, self.keys, self.limits = app, keys, limits or KeyLimits()
        self.on_request_end, self.clock = on_request_end, clock
        # One per key, so that callers cannot make it grow.
        names = (ANONYMOUS, *(keys.entries if keys else ()))
        self.rate_limiters = {name: RateLimiter(self.limits, clock) for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._handle_http(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "websockets are not supported"})

    async def _handle_http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, status, key_name = self.clock(), CLIENT_CLOSED_REQUEST, UNKNOWN_CALLER

        async def send_and_record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                key_name = self._identify_caller(scope)
                scope.setdefault("state", {})["key_name"] = key_name
                await self._forward(key_name, scope, receive, send_and_record_status)
            except RequestError as error:
                await error.response()(scope, receive, send_and_record_status)
        except _ClientDisconnectedError:
            pass
        except Exception:
            # Starlette's outermost middleware answers with 500, which does not pass through here.
            status = 500 if status == CLIENT_CLOSED_REQUEST else status
            raise
        finally:
            if self.on_request_end is not None:
                endpoint = getattr(scope.get("route"), "path", None) or "other"
                self.on_request_end(endpoint, key_name, status, self.clock() - started)

    def _identify_caller(self, scope: Scope) -> str:
        """Return the name of the caller's key.

        Raises:
            RequestError: 401 or 403.
        """
        if self.keys is None:
            client = scope.get("client")
            if not client or not is_loopback(client[0]) or not _names_loopback(_find_headers(scope, b"host")):
                raise RequestError(
                    "keys are off, so only requests from this machine to localhost are answered", None, 403, "forbidden"
                )
            return ANONYMOUS
        token = _parse_bearer_token(_find_headers(scope, b"authorization"))
        key_name = None if token is None else self.keys.find_name(token)
        if key_name is not None:
            return key_name
        if _strip_mount_prefix(scope) in OPEN_PATHS:
            return ANONYMOUS
        message = "unknown key; send a valid one" if token else "no key; send the header Authorization: Bearer KEY"
        raise RequestError(message, None, 401, "unauthorized")

    async def _forward(self, key_name: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on within the limits of its key."""
        for length in _find_headers(scope, b"content-length"):
            # Python refuses to parse numbers of thousands of digits; 18 digits exceed every limit.
            if length.isdigit() and (len(length) > 18 or int(length) > self.limits.body_bytes):
                raise self._too_large_error()
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)  # no route reads a body of these
        elif scope["method"] != "POST":
            await self.app(scope, await self._read_body(receive), send)
        else:
            # The slot is held while the body comes in, so slow uploads count too.
            with self.rate_limiters[key_name].slot():
                await self.app(scope, await self._read_body(receive), send)

    async def _read_body(self, receive: Receive) -> Receive:
        """Read the body; return a ``receive`` that first replays it and then continues with the connection's messages.

        Raises:
            RequestError: 413, before any route sees the request.
        """
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _ClientDisconnectedError
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.limits.body_bytes:
                raise self._too_large_error()
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return replay

    def _too_large_error(self) -> RequestError:
        return RequestError(f"the body is too large; the limit is {self.limits.body_bytes} bytes", None, 413)


def is_loopback(host: str) -> bool:
    """Return whether ``host``, a name or an address without brackets, is this machine's loopback."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _names_loopback(hosts: list[bytes]) -> bool:
    if len(hosts) != 1:
        return False
    match = _HOST_HEADER.fullmatch(hosts[0].decode("latin-1"))
    return match is not None and is_loopback(match[1].removeprefix("[").removesuffix("]"))


def _find_headers(scope: Scope, name: bytes) -> list[bytes]:
    return [value.strip() for key, value in scope["headers"] if key.lower() == name]


def _parse_bearer_token(headers: list[bytes]) -> str | None:
    """Return the token of the ``Authorization: Bearer`` header; None if there is not exactly one."""
    if len(headers) != 1:
        return None
    scheme, _, token = headers[0].partition(b" ")
    return token.strip().decode("latin-1") if scheme.lower() == b"bearer" else None


def _strip_mount_prefix(scope: Scope) -> str:
    """Return the path without the prefix that the application is mounted under, as routes see it."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path
