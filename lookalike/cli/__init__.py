"""The commands. Each module imports what is heavy inside the command that needs it, so that `--help` is instant."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import typer
from typer.main import get_command

from lookalike.cli import (
    ask,
    batch,
    compare,
    connection,
    demo,
    doctor,
    feedback,
    gallery,
    keys,
    model,
    one_shot,
    serve,
    train,
    transfer,
    upkeep,
)

app = typer.Typer(
    name="lookalike",
    help="Learn an embedding from labelled images, and answer: do two images match, and what matches this one?",
    epilog="Begin with `lookalike demo`; `lookalike COMMAND --help` says more of each.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SHOWN = {
    "train": "train digits --out bundles/digits",
    "evaluate": "evaluate bundles/digits UNSEEN_IMAGES --json",
    "calibrate": "calibrate bundles/digits --images LABELLED_IMAGES --out bundles/recalibrated",
    "compare": "compare contrasting_losses --quick",
    "serve": "serve --bundle bundles/digits --data galleries",
    "verify": "verify one.jpg other.jpg --target 127.0.0.1:50051",
    "search": "search one.jpg --gallery shelf -k 5 --bundle bundles/digits --data galleries",
    "batch-search": "batch-search images --gallery shelf --out neighbours.parquet --target 127.0.0.1:50051",
}
"""What the help of these commands shows as an example."""


def _example(command: str) -> str:
    return f"\b\nExample:\n  lookalike {SHOWN[command]}"  # \b: a line that is to be copied stays whole


app.callback()(connection.choose)
app.command(epilog=_example("train"))(train.train)
app.command(epilog=_example("evaluate"))(train.evaluate)
app.command(epilog=_example("calibrate"))(feedback.calibrate)
app.command(epilog=_example("compare"))(compare.compare)
app.add_typer(one_shot.app, name="one-shot")
transfer.add_commands(gallery.app)
upkeep.add_commands(gallery.app)
app.add_typer(gallery.app, name="gallery")
app.command(epilog=_example("serve"))(serve.serve)
app.command(epilog=_example("verify"))(ask.verify)
app.command(epilog=_example("search"))(ask.search)
app.command(name="batch-search", epilog=_example("batch-search"))(batch.batch_search)
app.add_typer(model.app, name="model")
app.add_typer(feedback.app, name="feedback")
app.command()(serve.health)
app.add_typer(keys.app, name="keys")
app.command()(doctor.doctor)
app.command()(demo.demo)

# typer exports BadParameter alone of the errors it raises for a command line that does not parse; the others share
# its base class.
_Misuse: type[Exception] = typer.BadParameter.__bases__[0]


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code; raises what the command raises."""
    try:
        code = _command()(args=list(arguments), prog_name="lookalike", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except _Misuse as error:
        return _say_misuse(error)
    except SystemExit as ended:  # typer ends with 1, which here says no, where the reader of the output has left
        if isinstance(ended.__context__, OSError) and ended.__context__.errno == errno.EPIPE:
            raise BrokenPipeError(errno.EPIPE, "the reader of the output has left") from None
        raise
    return code if isinstance(code, int) else 0


@cache
def _command() -> Callable[..., Any]:
    """What `app` runs; making it from the signatures of all commands takes 50 ms, which tests pay but once."""
    return get_command(app)


def _say_misuse(error: Exception) -> int:
    """A whole help text when no command was given, else one line that names the help to read."""
    context = getattr(error, "ctx", None)
    message = getattr(error, "format_message", lambda: str(error))()
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message)
    else:
        command = context.command_path if context else "lookalike"
        words = " ".join(message.split())
        stop = "" if words.endswith((".", "?")) else "."
        print(f"lookalike: {words}{stop}{_place_of(error, command)} See `{command} --help`.", file=sys.stderr)
    return 2


def _place_of(error: Exception, command: str) -> str:
    """Where an option goes that the command does not have and `lookalike` itself does."""
    option = getattr(error, "option_name", None)
    name, _, rest = command.partition(" ")
    if rest and any(option in parameter.opts for parameter in getattr(_command(), "params", ())):
        return f" It goes before the command: `{name} {option} … {rest} …`."
    return ""
