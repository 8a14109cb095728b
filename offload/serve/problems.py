"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}} and a status."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fastapi.exceptions import RequestValidationError
from starlette.responses import JSONResponse

from ..errors import FitError, ModelError, OffloadError, OutOfMemoryError, UsageError
from ..releases import blamed_for

MEMORY_RETRY_S = 5  # others that use the device may be done by then
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(eq=False)  # neither frozen nor slotted: Python itself writes to exceptions that are raised
class Problem(Exception):
    """What a request is refused with. `message` goes to the client and never to a log."""

    status: int
    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, object]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def from_error(error: Exception) -> Problem:
    """What an error of the engine means to a client. Only what a request can cause is 400."""
    if isinstance(error, OutOfMemoryError):  # before its base, which is what a request can cause
        return Problem(503, "out_of_memory", error.what, headers={"Retry-After": str(MEMORY_RETRY_S)})
    if isinstance(error, FitError):
        return Problem(400, "context_length_exceeded", error.what)
    if isinstance(error, UsageError):
        return Problem(400, "invalid_value", error.what)
    if isinstance(error, ModelError):
        return Problem(500, "model_error", error.what)
    if isinstance(error, OffloadError):
        return Problem(500, type(error).__name__.removesuffix("Error").lower() + "_error", error.what)
    blamed = blamed_for(error)
    place = f"internal error in {blamed}" if blamed else "internal error"
    return Problem(500, "internal_error", f"{place}: {type(error).__name__}")


def place_of(error: BaseException) -> str:
    """Type and place, for a log. Not the message, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else ""
    blamed = blamed_for(error)
    return f"{type(error).__name__}{where}" + (f" of {blamed}" if blamed else "")


@contextmanager
def engine_errors_as_problems(prompt: str) -> Iterator[None]:
    """Turns the engine's errors into Problems. `prompt` is the body's field that holds the prompt: the engine names a flag of
    the command line."""
    try:
        yield
    except OffloadError as error:
        problem = from_error(error)
        if problem.code == "context_length_exceeded" or (problem.status == 400 and "--prompt" in error.where):
            problem.param = prompt
        raise problem from None


NOT_UNICODE = "not Unicode: it holds half a character (a lone surrogate)"
# Where pydantic's words speak of its own classes.
_WORDS = {
    "missing": "it is needed",
    "model_attributes_type": "not a JSON object",
    "model_type": "not a JSON object",
    "string_unicode": NOT_UNICODE,
}


def from_validation(error: RequestValidationError) -> Problem:
    """The first field at fault: where and why, without the value, which may be a prompt."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid" or not place:
        return Problem(400, "invalid_json", "the body is not a JSON object" if not place else "the body is not JSON")
    param = ".".join(place)
    return Problem(400, "invalid_value", f"{param}: {_WORDS.get(first['type'], first['msg'])}", param)
