"""The guard of the page's server: every request passes it before anything is read.

It refuses foreign Host headers (a rebound name), foreign origins and cross-site requests, calls that change something
without the page's own header, requests without the token where there is one, and bodies or addresses that are too long.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

LONGEST_ADDRESS = 8192  # bytes of path and query
LARGEST_BODY = 4 << 20
LARGEST_HEADERS = 32 << 10  # bytes, all together
BODY_SECONDS = 20.0  # for the whole body to arrive
HEADER = "x-pycircuit"
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
_CHANGING = ("POST", "PUT", "DELETE")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
    "connect-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Access:
    """Who may ask. names: of this server, without ports; any_address: addresses are names of it too; token: or None."""

    names: frozenset[str]
    any_address: bool
    token: str | None
    cookie: str

    def check_host(self, host: str) -> None:
        """Refuse a Host header that is no name of this server: a foreign name was made to lead here."""
        name = host_name(host)
        if name is None or not (name in self.names or (self.any_address and _is_address(name))):
            raise Refused(421, "Host must be a name of this server")

    def has_token(self, headers: dict[str, str]) -> bool:
        """Return True for a request that carries the token as a cookie or as a bearer."""
        if self.token is None:
            return True
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            morsel = None
        offered = [morsel.value if morsel else "", bearer.strip() if scheme.lower() == "bearer" else ""]
        return any(self.is_token(text) for text in offered)

    def is_token(self, text: str) -> bool:
        """Compare a text with the token in constant time."""
        return self.token is not None and hmac.compare_digest(text.encode(), self.token.encode())


def host_name(host: str) -> str | None:
    """Return the name or address of a Host header in lower case, without brackets and port; None for no such thing."""
    if host.startswith("["):
        name, bracket, port = host[1:].partition("]")
        port = port[1:] if port.startswith(":") else port and "x"
        sound = bool(bracket) and _is_address(name)
    else:
        name, colon, port = host.partition(":")
        port = port or colon
        sound = bool(name) and len(name) <= 253 and all(c.isalnum() or c in "-._" for c in name) and name.isascii()
    return name.lower() if sound and (not port or (port.isdecimal() and len(port) <= 5)) else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: App, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:  # a WebSocket, which this server has none of
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_encoded(SECURITY_HEADERS.items())]
            await send(message)

        try:
            headers = _headers(scope)
            self._check(scope, headers)
            if not self.access.has_token(headers):
                await self._enter(scope, send_guarded)
                return
            body = await _body(scope, headers, receive)
        except Refused as refusal:
            await answer(send_guarded, refusal.status, {"error": str(refusal)})
            return
        await self.app(scope, _replay(body, receive), send_guarded)

    def _check(self, scope: Message, headers: dict[str, str]) -> None:
        """Refuse what does not come from the page itself, or from a person who opens it."""
        method = scope["method"]
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > LONGEST_ADDRESS:
            raise Refused(414, f"an address must have at most {LONGEST_ADDRESS} bytes")
        host = headers.get("host", "")
        self.access.check_host(host)
        if method not in METHODS:
            raise Refused(405, f"method must be one of {', '.join(METHODS)}")
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            raise Refused(403, "Origin must be this server")
        navigates = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and not (
            navigates and not scope["path"].startswith("/api")
        ):
            raise Refused(403, "a request must come from this server's page")
        if method in _CHANGING and headers.get(HEADER) != "1":
            raise Refused(403, "a request that changes something must have the header X-Pycircuit: 1")

    async def _enter(self, scope: Message, send: Send) -> None:
        """Set the cookie of someone who opens /?token=..., and refuse everyone else."""
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if scope["method"] == "GET" and scope["path"] == "/" and self.access.is_token(query.get("token", [""])[0]):
            cookie = f"{self.access.cookie}={self.access.token}; HttpOnly; SameSite=Lax; Path=/"
            headers = {"location": "/", "set-cookie": cookie, "cache-control": "no-store", "content-length": "0"}
            await send({"type": "http.response.start", "status": 303, "headers": _encoded(headers.items())})
            await send({"type": "http.response.body", "body": b""})
            return
        await answer(send, 401, {"error": "open the address with ?token= that the server printed"})


async def answer(send: Send, status: int, content: dict[str, Any]) -> None:
    """Send a small JSON answer and close the connection: what else it carries is not read."""
    body = json.dumps(content).encode()
    headers = {
        "content-type": "application/json", "content-length": str(len(body)), "cache-control": "no-store",
        "connection": "close",
    }  # fmt: skip
    await send({"type": "http.response.start", "status": status, "headers": _encoded(headers.items())})
    await send({"type": "http.response.body", "body": body})


def _encoded(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]


def _headers(scope: Message) -> dict[str, str]:
    """Headers by name; one that must be single and is not is refused."""
    if sum(len(name) + len(value) for name, value in scope["headers"]) > LARGEST_HEADERS:
        raise Refused(431, f"headers must have at most {LARGEST_HEADERS} bytes")
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        if name in headers and name in ("host", "origin", "content-length", "authorization", HEADER):
            raise Refused(400, f"{name} must be given once")
        headers[name] = f"{headers[name]}; {value}" if name == "cookie" and name in headers else value
    return headers


async def _body(scope: Message, headers: dict[str, str], receive: Receive) -> bytes:
    """Read the body within its bounds of bytes and seconds."""
    if scope["method"] not in _CHANGING:
        return b""
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > LARGEST_BODY:
        raise Refused(413, f"a body must have at most {LARGEST_BODY} bytes")
    chunks: list[bytes] = []

    async def read() -> None:
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "the body must arrive")
            chunks.append(message.get("body", b""))
            size, more = size + len(chunks[-1]), message.get("more_body", False)
            if size > LARGEST_BODY:
                raise Refused(413, f"a body must have at most {LARGEST_BODY} bytes")

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refused(408, f"a body must arrive within {BODY_SECONDS:.0f} s") from None
    body = b"".join(chunks)
    if body and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "a body must be application/json")
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body again, then waits for the end of the connection."""
    sent = False

    async def receive_again() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        while (message := await receive())["type"] != "http.disconnect":
            pass
        return message

    return receive_again
