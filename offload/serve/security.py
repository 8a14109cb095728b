"""Who may ask: checks that every request passes before any route sees it, as one ASGI layer around the application.

Nothing in here logs what a request holds. A bug behind it becomes a 500 without its message.
"""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import logging
import re
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .problems import Problem, from_error, place_of
from .settings import MAX_BODY_BYTES, ServeSettings
from .streams import Hangup, head_only

logger = logging.getLogger(__name__)

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?")
OPEN_ROUTES = ("/health", "/v1/health")
SECURITY_HEADERS = {
    # The page's own files and nothing else: no inline script, no other origin, no frame around it.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


def host_name(host: str) -> str:
    """`host` of a Host header, without port and brackets, in lower case; "" when it is none."""
    match = _HOST.fullmatch(host.lower())
    return (match[1] or match[2]) if match else ""


def is_known_host(host: str, settings: ServeSettings) -> bool:
    """Whether a request for `host` is meant for us. A name that a stranger's DNS leads here is not: his page would be of
    the same origin as ours (DNS rebinding). Addresses cannot be rebound; they are taken where all addresses are served."""
    name = host_name(host)
    if name in {"localhost", "127.0.0.1", "::1", settings.host.lower(), *(known.lower() for known in settings.allowed_hosts)}:
        return True
    try:
        ipaddress.ip_address(name)
        return ipaddress.ip_address(settings.host).is_unspecified
    except ValueError:
        return False


def is_foreign_page(headers: Headers, path: str) -> bool:
    """Whether a browser sends this for a page of another origin. Links to our page are welcome."""
    origin = headers.get("origin")
    if origin is not None:
        return urlsplit(origin).netloc.lower() != headers.get("host", "").lower() if origin != "null" else True
    return headers.get("sec-fetch-site", "none") in ("cross-site", "same-site") and path != "/"


def given_key(authorization: str) -> str:
    """The key in `Bearer KEY`, or in the password of `Basic`, which is how a browser asks for it; "" without one."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return ""


def is_key(given: str, key: str) -> bool:
    """Whether `given` is the key. The time that this takes does not tell how much of it was right."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key.encode())


class Gate:
    """The layer. Order: host, origin, key, body."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["method"] == "HEAD":  # answered as GET is, without the body: by every route, and by the checks before it
            scope, send = {**scope, "method": "GET"}, head_only(send)
        with suppress(Hangup):
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_secured(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(raw=message["headers"])
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                message = {**message, "headers": headers.raw}
            await send(message)

        try:
            self._check(Headers(scope=scope), scope["path"])
            await self._app(scope, await self._with_body(scope, receive), send_secured)
        except Problem as problem:
            await problem.response()(scope, receive, send_secured)
        except Hangup:
            raise
        except Exception as error:
            logger.error("a request failed: %s", place_of(error))
            if not started:
                await from_error(error).response()(scope, receive, send_secured)

    def _check(self, headers: Headers, path: str) -> None:
        if not is_known_host(headers.get("host", ""), self._settings):
            raise Problem(
                403, "unknown_host", "this server does not answer to that name; it is told its names by --allowed-host"
            )
        if is_foreign_page(headers, path):
            raise Problem(403, "foreign_origin", "requests from pages of other origins are refused")
        key = self._settings.api_key
        if key is not None and path not in OPEN_ROUTES and not is_key(given_key(headers.get("authorization", "")), key):
            schemes = (
                'Basic realm="treestream, the key as password", charset="UTF-8"' if _is_browser(headers, path) else "Bearer"
            )
            message = "a key is needed: Authorization: Bearer KEY"
            raise Problem(401, "invalid_api_key", message, headers={"WWW-Authenticate": schemes})

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """The whole body, read within its bounds; then `receive` says only whether the client is still there."""
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > MAX_BODY_BYTES:
            raise Problem(413, "body_too_large", f"a body has at most {MAX_BODY_BYTES} bytes")
        try:
            body = await asyncio.wait_for(_read(receive), self._settings.body_s)
        except asyncio.TimeoutError:
            raise Problem(408, "body_timeout", "the body did not arrive in time", headers={"Connection": "close"}) from None
        # A form of another page can send text/plain here without asking first, JSON it cannot.
        if body and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Problem(415, "not_json", "send JSON, with Content-Type: application/json")
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return replay


async def _read(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Hangup
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise Problem(413, "body_too_large", f"a body has at most {MAX_BODY_BYTES} bytes", headers={"Connection": "close"})
        if not message.get("more_body"):
            return bytes(body)


def _is_browser(headers: Headers, path: str) -> bool:
    return path == "/" and "text/html" in headers.get("accept", "")
