"""What stands before every route: keys, the loopback rule, the size of bodies, and each key's rate and concurrency.

Plain ASGI, since Starlette's middleware base class would hold streams back and lose disconnects.
"""

import ipaddress
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api import RequestError
from serve.keys import KeyRing

OPEN = frozenset({"/", "/healthz", "/readyz", "/openapi.json"})  # need no key
ANONYMOUS = "anonymous"  # the bucket and key name of all while keys are off, and of who asks for an open path
STRANGER = "unknown"  # the key name that refused callers are counted under

_HOST = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]+)(?::[0-9]{0,5})?")
_CLIENT_GONE = 499  # nginx's number for it; counted, never sent


@dataclass(frozen=True)
class Limits:
    """What one key may ask of this process.

    ``body_bytes``: of a request. ``concurrent``: POST requests at once. ``per_minute``: POST requests, as a token bucket that
    holds a tenth of a minute's worth, but at least ``concurrent``.
    """

    body_bytes: int = 65_536
    concurrent: int = 64
    per_minute: int = 6000


@dataclass
class Allowance:
    """What one key has left. ``clock`` gives seconds."""

    limits: Limits
    clock: Callable[[], float]
    running: int = 0
    tokens: float = field(init=False)
    filled: float = field(init=False)  # when the tokens were last counted

    def __post_init__(self) -> None:
        self.tokens, self.filled = self._burst(), self.clock()

    def _burst(self) -> float:
        return max(self.limits.per_minute / 10, self.limits.concurrent)

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Holds a place among the key's concurrent requests.

        Raises:
            RequestError: 429, with the seconds after which another try may do. A refused request uses nothing up.
        """
        limits, now = self.limits, self.clock()
        a_second = limits.per_minute / 60
        self.tokens = min(self._burst(), self.tokens + max(now - self.filled, 0) * a_second)
        self.filled = now
        if self.running >= limits.concurrent:
            raise _limited(f"{self.running} requests of this key are running, at most {limits.concurrent}", 1)
        if self.tokens < 1:
            wait = max(math.ceil((1 - self.tokens) / a_second), 1)
            raise _limited(f"more than {limits.per_minute} requests a minute with this key; try again in {wait} s", wait)
        self.tokens -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1


def _limited(message: str, retry_after: int) -> RequestError:
    return RequestError(message, None, 429, "rate_limited", retry_after)


class _Gone(Exception):
    """The client left before its body was read."""


class Guard:
    """ASGI middleware. Refuses with the one error shape; websockets are closed, lifespan goes through.

    With keys, ``request.state.key_name`` names the caller's. Without, only callers on this machine are answered, and only where
    the Host header names this machine too: a page of another site that points its own name at 127.0.0.1 (DNS rebinding) must
    not reach the server through its reader's browser.

    Args:
        keys: the keys that are known; None: keys are off.
        seen: told of each request when it ends: endpoint (its route, never a path that a caller made up), key name, status,
            seconds.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyRing | None,
        limits: Limits | None = None,
        seen: Callable[[str, str, int, float], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app, self.keys, self.limits, self.seen, self.clock = app, keys, limits or Limits(), seen, clock
        # One for each key and no more, whatever callers send.
        self.allowances = {name: Allowance(self.limits, clock) for name in (ANONYMOUS, *(keys.entries if keys else ()))}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "no websockets here"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, status, name = self.clock(), _CLIENT_GONE, STRANGER

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                name = self._caller(scope)
                scope.setdefault("state", {})["key_name"] = name
                await self._admitted(name, scope, receive, watched)
            except RequestError as refusal:
                await refusal.response()(scope, receive, watched)
        except _Gone:
            pass
        except Exception:
            status = 500 if status == _CLIENT_GONE else status  # what Starlette answers with, outside of this
            raise
        finally:
            if self.seen is not None:
                endpoint = getattr(scope.get("route"), "path", None) or "other"
                self.seen(endpoint, name, status, self.clock() - started)

    def _caller(self, scope: Scope) -> str:
        """The name of the caller's key.

        Raises:
            RequestError: 401 or 403.
        """
        if self.keys is None:
            client = scope.get("client")
            if not client or not is_loopback(client[0]) or not _names_loopback(_headers(scope, b"host")):
                raise RequestError("keys are off, so only this machine is answered, as localhost", None, 403, "forbidden")
            return ANONYMOUS
        presented = _bearer(_headers(scope, b"authorization"))
        name = None if presented is None else self.keys.name_of(presented)
        if name is not None:
            return name
        if _path(scope) in OPEN:
            return ANONYMOUS
        said = "the key is not known" if presented else "a key is needed: send Authorization: Bearer KEY"
        raise RequestError(said, None, 401, "unauthorized")

    async def _admitted(self, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        for length in _headers(scope, b"content-length"):
            # Python refuses to read numbers of thousands of digits; 18 are too many already.
            if length.isdigit() and (len(length) > 18 or int(length) > self.limits.body_bytes):
                raise self._too_large()
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)  # no route reads a body of these
        elif scope["method"] != "POST":
            await self.app(scope, await self._whole(receive), send)
        else:
            # The slot is held while the body comes in: slow uploads are bounded like all else.
            with self.allowances[name].slot():
                await self.app(scope, await self._whole(receive), send)

    async def _whole(self, receive: Receive) -> Receive:
        """Read the body up to the limit; return a ``receive`` that gives it and then goes on.

        Raises:
            RequestError: 413, and the routes never hear of the request.
        """
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.limits.body_bytes:
                raise self._too_large()
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return replay

    def _too_large(self) -> RequestError:
        return RequestError(f"the body is larger than {self.limits.body_bytes} bytes", None, 413)


def is_loopback(host: str) -> bool:
    """Whether ``host``, an address without brackets or a name, is this machine's loopback."""
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
    found = _HOST.fullmatch(hosts[0].decode("latin-1"))
    return found is not None and is_loopback(found[1].removeprefix("[").removesuffix("]"))


def _headers(scope: Scope, name: bytes) -> list[bytes]:
    return [value.strip() for key, value in scope["headers"] if key.lower() == name]


def _bearer(headers: list[bytes]) -> str | None:
    """The token of the one ``Authorization: Bearer`` header; None where there is none, or more than one."""
    if len(headers) != 1:
        return None
    scheme, _, token = headers[0].partition(b" ")
    return token.strip().decode("latin-1") if scheme.lower() == b"bearer" else None


def _path(scope: Scope) -> str:
    """The path as routes see it, without the prefix that the application is mounted under."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path
