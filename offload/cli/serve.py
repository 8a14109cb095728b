"""`serve`: an OpenAI-compatible server and a page, until Ctrl-C or SIGTERM."""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError, reason
from ..serve.settings import ServeSettings
from .flags_to_settings import check_and_announce_models, check_small_files, engine_settings
from .parser import DEMO_NAME
from .terminal import say, say_plan, say_weights

if TYPE_CHECKING:
    from ..engine.admission import Admission
    from ..engine.engine import Engine
    from ..engine.loading import LoadProgress

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def run(arguments: argparse.Namespace) -> int:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the server needs {', '.join(missing)}",
            where="serve",
            cure='install them: pip install -c constraints.txt -e ".[serve]"',
        )
    serve_settings = _serve_settings(arguments)
    settings = engine_settings(arguments, emulate_demo_link=True)
    check_small_files(settings)
    check_and_announce_models(arguments, settings)
    from ..serve.server import Server

    def open_it(progress: "LoadProgress") -> "Engine":
        from ..assemble import open_engine  # torch: while the server answers already
        from ..serve.admit import require_tokenizer

        def admit(admission: "Admission") -> None:
            require_tokenizer(admission.tokenizer)

        engine = open_engine(settings, progress=progress, admit=admit)
        say_weights(engine.weights, quiet=arguments.quiet)
        say_plan(engine.plan, arguments)
        return engine

    server = Server(serve_settings, open_it)
    if not arguments.quiet:
        key = ", with the key" if serve_settings.api_key else ""
        say(f"{serve_settings.model_name} on {server.url}{key}: a page for the browser, and {server.url}/v1 for clients")
    server.serve_until_told()
    return 0


def _serve_settings(arguments: argparse.Namespace) -> ServeSettings:
    key = arguments.api_key
    if arguments.api_key_file is not None:
        try:
            key = Path(arguments.api_key_file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeError) as error:
            raise UsageError(
                f"the key cannot be read: {reason(error)}",
                where="--api-key-file",
                cure="give a text file with one line, the key",
            ) from error
    return ServeSettings(
        model_name=arguments.served_model_name or (Path(arguments.model).name if arguments.model else DEMO_NAME),
        host=arguments.host,
        port=arguments.port,
        api_key=key,
        allow_unauthenticated=arguments.allow_unauthenticated,
        allowed_hosts=tuple(arguments.allowed_host),
        max_waiting=arguments.max_queue,
        grace_s=arguments.grace,
    )
