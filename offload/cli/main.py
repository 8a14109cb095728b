"""Dispatch, exit codes and errors. Everything heavy is imported by the command that needs it."""

import errno
import io
import logging
import os
import sys
import traceback

from ..errors import DeviceError, OffloadError, UsageError, reason
from .parser import parse_arguments
from .signals import EXIT_INTERRUPTED, EXIT_TERMINATED, Terminated, raise_on_termination


def main(argv: list[str]) -> int:
    verbose = "--verbose" in argv or "-v" in argv
    try:
        _fill_closed_streams()
        raise_on_termination()
        if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without the model's characters shows them escaped
            sys.stdout.reconfigure(errors="backslashreplace")
        arguments = parse_arguments(argv)
        _configure_logging(verbose, quiet=getattr(arguments, "quiet", False))
        if arguments.command == "generate":
            from .generate import run
        elif arguments.command == "plan":
            from .plan import run
        elif arguments.command == "profile" and arguments.what == "hardware":
            from .profile_hardware import run
        elif arguments.command == "chat":
            from .chat import run
        elif arguments.command == "profile":
            from .profile import run
        elif arguments.command == "doctor":
            from .doctor import run
        elif arguments.command == "serve":
            from .serve import run
        elif arguments.command == "bench":
            from .bench import run
        elif arguments.command == "convert":
            from .convert import run
        elif arguments.command == "datastore":
            from .datastore import run
        elif arguments.command == "verify":
            from .verify import run
        else:
            from .version import run
        return run(arguments)
    except OffloadError as error:
        if verbose and not isinstance(error, UsageError):
            traceback.print_exc()
        print(_render(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Terminated:
        return EXIT_TERMINATED
    except BrokenPipeError:
        # Whoever read our output has left; there is nobody to tell. Without this, flushing at exit would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if verbose:
            traceback.print_exc()
        unexpected = _unexpected(error)
        print(_render(unexpected), file=sys.stderr)
        return unexpected.exit_code


def _fill_closed_streams() -> None:
    """Opens the null device for a standard stream that was closed before we began. Such a stream is None, and the next file to
    be opened would get its number: what is meant for the stream would land in that file."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open until the process ends)


def _render(error: OffloadError) -> str:
    if isinstance(error, UsageError):
        return f"error: {error.what} ({error.where}): {error.cure}"
    return f"error: {error}"


def _unexpected(error: Exception) -> OffloadError:
    """What nobody has translated: a disk that is full under stdout, a dependency of another release, or a fault of ours."""
    from ..releases import translated  # importlib.metadata, which help can do without

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return DeviceError(
            f"the output could not be written in full: {reason(error)}",
            where=str(error.filename or "stdout"),
            cure="free space where it goes, and run again",
        )
    if (blamed := translated(error, _place_of(error))) is not None:
        return blamed
    what = " ".join(str(error).split())[:300] or type(error).__name__
    return OffloadError(
        f"internal error: {type(error).__name__}: {what}",
        where=_place_of(error),
        cure="run again with --verbose and report the traceback",
    )


def _place_of(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{os.path.basename(frames[-1].filename)} line {frames[-1].lineno}" if frames else "unknown"


def _configure_logging(verbose: bool, *, quiet: bool) -> None:
    # Read by transformers and huggingface_hub when they are imported, which has not happened yet.
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
    logging.basicConfig(stream=sys.stderr, level=level, format="%(levelname)s: %(message)s")
