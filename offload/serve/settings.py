"""What the server is told, checked before anything is loaded; and the caps on what strangers may ask."""

import ipaddress
from dataclasses import dataclass

from ..errors import UsageError

# What one request may ask for at most. Beyond them: 400, or 413 for the body.
MAX_BODY_BYTES = 2**20
MAX_CHOICES = 4  # `n`, per prompt
MAX_PROMPTS = 64
MAX_MESSAGES = 1024
MAX_LOGPROBS = 20
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS, MAX_STOP_TOKENS = 16, 256, 64
# What all clients together may hold.
MAX_CONNECTIONS = 512
MAX_LISTENERS = 16  # of /v1/engine/events

MIN_KEY_CHARACTERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """`max_waiting` requests wait while one runs. `api_key` is asked for on every route but /health.

    Times in seconds: a client has `header_s` to send its headers and `body_s` for its body, and may leave written bytes
    unread for `send_s`; silent streams carry a comment every `keep_alive_s`; SIGTERM leaves `grace_s` for what runs.
    UsageError for an address that strangers can reach when nothing says who may use it.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allow_unauthenticated: bool = False
    allowed_hosts: tuple[str, ...] = ()
    max_waiting: int = 16
    grace_s: float = 30.0
    header_s: float = 10.0
    body_s: float = 20.0
    send_s: float = 30.0
    keep_alive_s: float = 1.0

    def __post_init__(self) -> None:
        if self.api_key is None and not self.allow_unauthenticated and not is_loopback(self.host):
            raise UsageError(
                f"{self.host} can be reached from other machines, and anyone who reaches it could use the model",
                where="--host",
                cure="add --api-key-file FILE, or --allow-unauthenticated if that is what you want",
            )
        if self.api_key is not None and not (len(self.api_key) >= MIN_KEY_CHARACTERS and _is_visible_ascii(self.api_key)):
            raise UsageError(
                f"not a key: {MIN_KEY_CHARACTERS} or more visible ASCII characters are needed",
                where="--api-key, --api-key-file",
                cure="make one with: python -c 'import secrets; print(secrets.token_urlsafe())'",
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. Names are not looked up: any but localhost may lead anywhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_visible_ascii(text: str) -> bool:
    return all("!" <= character <= "~" for character in text)
