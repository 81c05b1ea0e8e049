"""The door: keys, hosts and sizes are checked here, before anything of a request is parsed.

A wrong key gets 401 whatever it asks for, so that nothing can be learnt without one; only /health needs none. On the loopback
interface without a key, a request must name a loopback host: a web page that rebinds its own name to 127.0.0.1 cannot.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from r1q.serve.jobs import Refused

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset(("/health",))
PATIENCE = 8  # times the largest body that is read of a larger one before the connection is closed
BODY_SECONDS = 30.0  # a body that takes longer to arrive is given up


class Guard:
    """An ASGI application in front of another. `key` None lets everyone in; `local` demands a loopback host name.

    `refused` is told the status of everything that is turned away here.
    """

    def __init__(
        self, app: App, *, key: str | None, local: bool, most_bytes: int, refused: Callable[[int], None]
    ) -> None:
        self._app, self._local, self._most, self._refused = app, local, most_bytes, refused
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is turned away, or pass it on with its body read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            self._check(scope["path"], headers)
            receive = await self._read(headers, receive)
        except Refused as refused:
            self._refused(refused.status)
            await send_refusal(refused, send)
            return
        except ConnectionError:
            return
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: MutableMapping[bytes, bytes]) -> None:
        if self._key is not None and path not in OPEN_PATHS:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            # Compared in the same time whatever is right about it.
            if not (hmac.compare_digest(given.strip(), self._key) and scheme.lower() == b"bearer"):
                raise Refused(401, "invalid_request_error", "a valid API key is needed", code="invalid_api_key")
        if self._local and self._key is None and not is_loopback(host_name(headers.get(b"host", b""))):
            message = "this server answers to localhost alone; give it an --api-key or another --host"
            raise Refused(403, "invalid_request_error", message, code="wrong_host")

    async def _read(self, headers: MutableMapping[bytes, bytes], receive: Receive) -> Receive:
        """Read the whole body, at most `most_bytes` of it, and return a `receive` that hands it on at once."""
        if b"transfer-encoding" not in headers and headers.get(b"content-length", b"0") == b"0":
            return receive
        body, seen = bytearray(), 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionAbortedError
                    part = message.get("body", b"")
                    seen += len(part)
                    # Too much is read on for a while, and forgotten: a client that is still sending would never see the answer.
                    if seen > self._most:
                        body.clear()
                    else:
                        body += part
                    if not message.get("more_body", False) or seen > PATIENCE * self._most:
                        break
        except TimeoutError:
            late = f"the request's body did not arrive within {BODY_SECONDS:.0f} seconds"
            raise Refused(408, "invalid_request_error", late, code="timeout") from None
        if seen > self._most:
            raise self._too_large()
        return _after(bytes(body), receive)

    def _too_large(self) -> Refused:
        message = f"a request may have at most {self._most} bytes"
        return Refused(413, "invalid_request_error", message, code="request_too_large")


def _after(body: bytes, receive: Receive) -> Receive:
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


async def send_refusal(refused: Refused, send: Send) -> None:
    """Send an error in OpenAI's form; where the body may be unread, the connection is closed after it."""
    body = json.dumps(refused.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refused.status in (408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def host_name(header: bytes) -> str:
    """Return the name in a Host header, without port and brackets.

    >>> host_name(b"[::1]:8080"), host_name(b"localhost:80")
    ('::1', 'localhost')
    """
    text = header.decode("latin-1").strip().lower()
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]


def is_loopback(name: str) -> bool:
    """Return whether a host's name or address can only mean this machine."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
