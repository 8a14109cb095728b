"""The routes. Handlers are short: what takes time happens on the engine's thread or on the pool's."""

from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from ..version import __version__
from .admit import require_tokenizer
from .problems import Problem
from .protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from .service import Service
from .streams import EventStream, data, with_comments

PAGE_FILES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "engine.js": "text/javascript; charset=utf-8",
    "tree.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "A field is wrong, or the prompt is too long",
        401: "The key is missing or wrong",
        403: "An unknown host, or a page of another origin",
        404: "No such model",
        408: "The body did not arrive in time",
        413: "The body is too large",
        415: "The body is not JSON",
        429: "The queue is full; see Retry-After",
        500: "The engine failed",
        503: "The engine is loading, draining or gone, or there is no memory for a pass",
    }.items()
}


def openai_routes(service: Service) -> APIRouter:
    router = APIRouter(responses=_ERRORS)

    @router.post("/v1/chat/completions", response_class=JSONResponse)
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        return await service.chat(body, http)

    @router.post("/v1/completions", response_class=JSONResponse)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        return await service.complete(body, http)

    def model() -> dict[str, object]:
        name = service.settings.model_name
        return {"id": name, "object": "model", "created": service.created, "owned_by": "treestream"}

    @router.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [model()]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, object]:
        service.check_model(name)
        return model()

    return router


def text_routes(service: Service) -> APIRouter:
    """The tokenizer at a distance, as lm-eval asks for it."""
    router = APIRouter(responses=_ERRORS)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, object]:
        tokenizer = require_tokenizer(service.worker.ready().tokenizer)
        tokens = await run_in_threadpool(
            lambda: tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        )
        return {"tokens": tokens, "count": len(tokens), "max_model_len": service.worker.ready().plan.text_tokens}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, object]:
        engine = service.worker.ready()
        if any(token_id >= engine.admission.vocab_size for token_id in body.tokens):
            raise Problem(400, "invalid_value", f"the vocabulary has {engine.admission.vocab_size} tokens", "tokens")
        return {"prompt": await run_in_threadpool(require_tokenizer(engine.tokenizer).decode, body.tokens)}

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, object]:
        engine = service.worker.ready()
        tokenizer = require_tokenizer(engine.tokenizer)
        roles: dict[str, str | None] = {"bos_token": None, "eos_token": None, "pad_token": None}
        roles |= tokenizer.special_tokens()
        return {**roles, "chat_template": tokenizer.chat_template, "vocab_size": engine.admission.vocab_size}

    return router


def service_routes(service: Service) -> APIRouter:
    router = APIRouter(responses=_ERRORS)

    @router.get("/health")
    @router.get("/v1/health", include_in_schema=False)
    async def health() -> Response:
        """200 when requests are taken; 503 while loading, draining, or when the engine is gone."""
        state = service.worker.state
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    @router.get("/version")
    async def version() -> dict[str, object]:
        return {"version": __version__}

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(service.telemetry.metrics(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/v1/engine/events", response_class=Response)
    async def events() -> Response:
        """What the engine does, as server-sent events: plan, loading, queue, pass. No text and no token of anyone."""
        listener = service.feed.listen()

        async def lines() -> AsyncIterator[str]:
            async for event in listener:
                yield data(event)

        commented = with_comments(lines(), service.settings.keep_alive_s, service.worker.progress)
        return EventStream(commented, lambda: service.feed.forget(listener))

    return router


def page_routes() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    folder = files(__package__) / "page"
    contents = {name: (folder / name).read_bytes() for name in PAGE_FILES}

    @router.get("/")
    async def index() -> Response:
        return Response(contents["index.html"], media_type=PAGE_FILES["index.html"])

    @router.get("/page/{name}")
    async def page_file(name: str) -> Response:
        if name not in PAGE_FILES:
            raise Problem(404, "not_found", "no such file")
        return Response(contents[name], media_type=PAGE_FILES[name])

    return router
