"""The `lookalike` command: `main` runs it, and turns what a user can cause into one line and exit code 2."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Sequence

FAILED = 2
INTERRUPTED = 130

_ENDING = tuple(number for number in signal.Signals if number.name in {"SIGTERM", "SIGHUP"})
_ended_by: list[int] = []

_EXTRA_OF_MODULE = {
    "typer": "serve",
    "rich": "serve",
    "faiss": "serve",
    "threadpoolctl": "serve",
    "uvloop": "serve",
    "torch": "serve",
    "torchvision": "serve",
    "PIL": "serve",
    "pydantic": "serve",
    "safetensors": "serve",
    "jwt": "jwt",
    "lark": "serve",
    "grpc_health": "serve",
    "grpc_reflection": "serve",
    "grpc_status": "serve",
    "pyarrow": "serve",
    "prometheus_client": "serve",
    "structlog": "serve",
    "matplotlib": "train",
    "scipy": "train",
    "sklearn": "train",
    "tomli_w": "train",
    "training": "train",
}
"""The extra that brings each module which the base install, the client alone, lacks."""

_FIELD = re.compile(
    r"(?:(?:gallery\.)?index\.(?=(?:structure|min_recall|memory_bytes|vectors)\b)|(?=target_f(?:ar|pir)\b))(?P<name>\w+)"
)
"""Fields that commands have options for, as messages of servers and engines begin with them."""

_EXTRA_OF_COMMAND = {
    **dict.fromkeys(("train", "evaluate", "calibrate", "compare", "one-shot"), "train"),
    "demo": "serve,train",
}
"""Of those that want more than what answers: all that they lack, in place of one extra after the other."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; a bug alone ends in a traceback.

    Of several processes that `torchrun` has started on this machine the first alone says what went wrong.
    """
    if arguments is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    try:
        code = _run(arguments)
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        if arguments is None:  # this process ends: Python would answer an interrupt from here on with a traceback
            for number in (signal.SIGINT, *_ENDING):
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL)
    return 128 + _ended_by[-1] if _ended_by and code == INTERRUPTED else code


def _run(arguments: Sequence[str] | None) -> int:
    """`main`, but for interrupts, which come while things are imported too: hence all is imported here."""
    import io
    import logging

    if arguments is None and "serve" not in sys.argv:  # gRPC would tell each handshake that fails, in its own words
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from embedding.errors import LookalikeError
    from embedding.extras import installing
    from embedding.printable import printable
    from lookalike.errors import CallFailed

    if not _speaks():
        logging.disable(logging.WARNING)
    if arguments is None and isinstance(sys.stdout, io.TextIOWrapper):  # stderr has it from the start
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        from lookalike.cli import run  # typer comes with an extra, whose absence must be said in words

        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if arguments is None and "serve" not in sys.argv:  # which drains
            for number in _ENDING:
                if signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, _end)
        code = run(sys.argv[1:] if arguments is None else arguments)
        if sys.stdout:  # there is none where it was closed
            sys.stdout.flush()  # here, where a reader that has left is no failure of the interpreter's
        return code
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF_MODULE.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        if extra in {"serve", "train"}:
            words = sys.argv[1:] if arguments is None else arguments
            command = next((word for word in words if not word.startswith("-")), "")
            extra = _EXTRA_OF_COMMAND.get(command, extra)
        return _failed(f"this command needs {error.name}: {installing(extra)}")
    except BrokenPipeError:
        # The reader of the output has left, as `head` does; Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (LookalikeError, CallFailed) as error:
        return _failed(_by_option(str(error)))
    except OSError as error:
        return _failed(_of_disk(error))
    except UnicodeEncodeError as error:
        if not _is_no_text(error):
            raise
        given = printable(error.object)
        return _failed(f"{given} holds bytes that are no UTF-8, as names and filters are; give it as it is listed")


def _by_option(message: str) -> str:
    """A message that begins with a field of the API, with the option of that field instead."""
    found = _FIELD.match(message)
    return message if found is None else f"--{found['name'].replace('_', '-')}{message[found.end() :]}"


def _of_disk(error: OSError) -> str:
    """Its words, without the number that Python begins with."""
    if not error.strerror or error.filename is None:
        return error.strerror or str(error)
    return f"cannot use {error.filename}: {error.strerror}; check the path and its permissions"


def _is_no_text(error: UnicodeEncodeError) -> bool:
    """Whether it is about bytes of the command line that are no text; of files, those are read as text before."""
    return all("\udc80" <= letter <= "\udcff" for letter in error.object[error.start : error.end])


def _end(number: int, _: object) -> None:
    """Told to end, or its terminal is gone: as when it is interrupted, so that nothing half done is left."""
    _ended_by.append(number)
    raise KeyboardInterrupt


def _leave(*_: object) -> None:
    """Answers an interrupt before anything was begun; a KeyboardInterrupt may be lost in callbacks of the importer."""
    os._exit(INTERRUPTED)


def _failed(message: str) -> int:
    if _speaks():
        print(f"lookalike: {' '.join(message.split())}", file=sys.stderr)
    return FAILED


def _speaks() -> bool:
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
