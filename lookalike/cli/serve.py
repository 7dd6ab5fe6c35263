"""`lookalike serve` and `lookalike health`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from lookalike.cli import options
from lookalike.client import Client
from lookalike.errors import CallFailed

NOT_SERVING = 1
STOPPED = 128 + signal.SIGTERM
"""Exit code when told to stop before there is a server to drain."""
READY_LINE = "lookalike is SERVING on "
"""How the line begins that `serve` prints once calls are answered; the address ends it."""


def serve(
    bundle: Annotated[
        Path, typer.Option("--bundle", metavar="DIR", envvar="LOOKALIKE_BUNDLE", help="The bundle that answers.")
    ],
    data: Annotated[
        Path,
        typer.Option("--data", metavar="DIR", envvar="LOOKALIKE_GALLERIES", help="The folder of galleries."),
    ] = options.DEFAULT_GALLERIES,
    host: Annotated[str, typer.Option("--host", envvar="LOOKALIKE_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", envvar="LOOKALIKE_PORT", help="Port to listen on; 0 for any free one.")
    ] = 50051,
    device: options.Device = "auto",
    other_bundle: Annotated[
        list[Path] | None,
        typer.Option("--other-bundle", metavar="DIR", help="A further bundle, for galleries of its model; may repeat."),
    ] = None,
    thumbnails: options.Thumbnails = 0,
    models: Annotated[
        Path | None,
        typer.Option("--models", metavar="DIR", help="A folder of bundles that can be activated while it runs."),
    ] = None,
) -> None:
    """Serve a bundle and its galleries over gRPC until stopped; SIGTERM lets running calls end first."""
    # The kernel delivers to process 1 of a container no signal that it does not handle, and the imports take seconds.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    from service.server import run
    from service.settings import Settings

    settings = Settings.checked(
        bundle=bundle,
        galleries=data,
        host=host,
        port=port,
        device=device,
        other_bundles=tuple(other_bundle or ()),
        thumbnails=thumbnails,
        models=models,
    )
    run(settings, on_ready=lambda address: print(f"{READY_LINE}{address}", flush=True))


def health(
    target: Annotated[
        str, typer.Option("--target", metavar="HOST:PORT", envvar="LOOKALIKE_TARGET", help="The server.")
    ] = "127.0.0.1:50051",
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for an answer.")] = 5.0,
) -> None:
    """Exit with 0 when the server is SERVING, else with 1."""
    with Client(target, timeout=timeout) as client:
        try:
            is_serving = client.is_serving()
        except CallFailed as error:
            print(f"{target}: {error}")
            raise typer.Exit(NOT_SERVING) from error
    print(f"{target}: {'SERVING' if is_serving else 'NOT_SERVING'}")
    if not is_serving:
        raise typer.Exit(NOT_SERVING)
