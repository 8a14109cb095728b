"""The application: routes, errors, and the gate around them."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from ..version import __version__
from .problems import Problem, from_error, from_validation
from .routes import openai_routes, page_routes, service_routes, text_routes
from .security import Gate
from .service import Service


def build_app(service: Service) -> ASGIApp:
    """No interactive documentation: its pages load scripts from elsewhere. /openapi.json is there for tools."""
    app = FastAPI(title="treestream", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.include_router(openai_routes(service))
    app.include_router(text_routes(service))
    app.include_router(service_routes(service))
    app.include_router(page_routes())

    @app.exception_handler(Problem)
    async def on_problem(_request: Request, problem: Problem) -> Response:
        return problem.response()

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_request: Request, error: RequestValidationError) -> Response:
        return from_validation(error).response()

    @app.exception_handler(HTTPException)
    async def on_http(_request: Request, error: HTTPException) -> Response:
        codes = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}  # 400: nested too deeply to be read
        code = codes.get(error.status_code, "invalid_request")
        return Problem(error.status_code, code, code.replace("_", " "), headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def on_bug(_request: Request, error: Exception) -> Response:  # the gate hears of it, too
        return from_error(error).response()

    return Gate(app, service.settings)
