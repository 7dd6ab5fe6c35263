"""`lookalike serve` and `lookalike health`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from lookalike.cli.connection import connect
from lookalike.errors import CallFailed

NOT_SERVING = 1
STOPPED = 128 + signal.SIGTERM
"""Exit code when told to stop before there is a server to drain."""
READY_LINE = "lookalike is SERVING on "
"""How the line begins that `serve` prints once calls are answered; the address ends it."""


def serve(
    bundle: Annotated[
        Path | None, typer.Option("--bundle", metavar="DIR", help="The bundle that answers. [env: LOOKALIKE_BUNDLE]")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="DIR", help="The folder of galleries. [env: LOOKALIKE_GALLERIES] [default: galleries]"
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Address to listen on. [env: LOOKALIKE_HOST] [default: 127.0.0.1]")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", help="Port to listen on; 0 for any. [env: LOOKALIKE_PORT] [default: 50051]"),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="auto, cpu, cuda or mps. [env: LOOKALIKE_DEVICE] [default: auto]")
    ] = None,
    other_bundle: Annotated[
        list[Path] | None,
        typer.Option(
            "--other-bundle",
            metavar="DIR",
            help="A further bundle, for galleries of its model; may repeat. [env: LOOKALIKE_OTHER_BUNDLES]",
        ),
    ] = None,
    thumbnails: Annotated[
        int | None,
        typer.Option(
            "--thumbnails",
            help="Store small images of this side, in pixels, so that another model can embed them. "
            "[env: LOOKALIKE_THUMBNAILS] [default: 0]",
        ),
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option(
            "--models",
            metavar="DIR",
            help="A folder of bundles that can be activated while it runs. [env: LOOKALIKE_MODELS]",
        ),
    ] = None,
    tls_certificate: Annotated[
        Path | None,
        typer.Option(
            "--tls-certificate",
            metavar="FILE",
            help="The server's certificate (PEM); with it, TLS is served. [env: LOOKALIKE_TLS_CERTIFICATE]",
        ),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", metavar="FILE", help="Its key, PEM. [env: LOOKALIKE_TLS_KEY]")
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-client-ca",
            metavar="FILE",
            help="PEM roots: clients must show a certificate that leads to one. [env: LOOKALIKE_TLS_CLIENT_CA]",
        ),
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option("--insecure", help="Let other machines connect without TLS. [env: LOOKALIKE_INSECURE]"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            help="Processes that share the port; one of them writes. [env: LOOKALIKE_WORKERS] [default: 1]",
        ),
    ] = None,
    settings_file: Annotated[
        Path | None,
        typer.Option("--settings", metavar="FILE", help="A TOML file of settings. [env: LOOKALIKE_SETTINGS]"),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any setting by name; may repeat."),
    ] = None,
    print_settings: Annotated[
        bool, typer.Option("--print-settings", help="Print every setting and where it comes from, and end.")
    ] = False,
    keys: Annotated[
        Path | None,
        typer.Option(
            "--keys", metavar="FILE", help="Ask for API keys: those of `lookalike keys create`. [env: LOOKALIKE_KEYS]"
        ),
    ] = None,
    audit_log: Annotated[
        Path | None,
        typer.Option(
            "--audit-log",
            metavar="FILE",
            help="Append a line for each write, administration and refusal. [env: LOOKALIKE_AUDIT_LOG]",
        ),
    ] = None,
) -> None:
    """Serve a bundle and its galleries over gRPC until stopped; SIGTERM lets running calls end first.

    Settings come from a file, then LOOKALIKE_NAME in the environment, then flags; the later wins.
    """
    # The kernel delivers to process 1 of a container no signal that it does not handle, and the imports take seconds.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    from service.settings_sources import Flag, Origins, set_flags

    origins = Origins.read(
        file=settings_file,
        environment=os.environ,
        flags=[
            *set_flags(assignments or ()),
            Flag("bundle", "--bundle", bundle),
            Flag("galleries", "--data", data),
            Flag("host", "--host", host),
            Flag("port", "--port", port),
            Flag("device", "--device", device),
            Flag("other_bundles", "--other-bundle", other_bundle or None),
            Flag("thumbnails", "--thumbnails", thumbnails),
            Flag("models", "--models", models),
            Flag("tls_certificate", "--tls-certificate", tls_certificate),
            Flag("tls_key", "--tls-key", tls_key),
            Flag("tls_client_ca", "--tls-client-ca", tls_client_ca),
            Flag("insecure", "--insecure", insecure),
            Flag("workers", "--workers", workers),
            Flag("keys", "--keys", keys),
            Flag("audit_log", "--audit-log", audit_log),
        ],
    )
    if print_settings:
        print(origins.text())
        return
    from service.process import run

    run(
        origins.settings,
        on_ready=lambda address: print(f"{READY_LINE}{address}", flush=True),
        origins=origins,
    )


def health(
    target: Annotated[
        str, typer.Option("--target", metavar="HOST:PORT", envvar="LOOKALIKE_TARGET", help="The server.")
    ] = "127.0.0.1:50051",
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for an answer.")] = 5.0,
) -> None:
    """Exit with 0 when the server is SERVING, else with 1."""
    with connect(target, timeout=timeout) as client:
        try:
            is_serving = client.is_serving()
        except CallFailed as error:
            print(f"{target}: {error}")
            raise typer.Exit(NOT_SERVING) from error
    print(f"{target}: {'SERVING' if is_serving else 'NOT_SERVING'}")
    if not is_serving:
        raise typer.Exit(NOT_SERVING)
