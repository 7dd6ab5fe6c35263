"""`lookalike serve` and `lookalike health`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from lookalike.cli import options
from lookalike.cli.connection import connect
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
    tls_certificate: Annotated[
        Path | None,
        typer.Option("--tls-certificate", metavar="FILE", envvar="LOOKALIKE_TLS_CERTIFICATE", help="PEM; serves TLS."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", metavar="FILE", envvar="LOOKALIKE_TLS_KEY", help="Its key, PEM.")
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-client-ca",
            metavar="FILE",
            envvar="LOOKALIKE_TLS_CLIENT_CA",
            help="PEM roots: clients must show a certificate that leads to one.",
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", envvar="LOOKALIKE_INSECURE", help="Let other machines connect without TLS."),
    ] = False,
    keys: Annotated[
        Path | None,
        typer.Option(
            "--keys",
            metavar="FILE",
            envvar="LOOKALIKE_KEYS",
            help="Ask for API keys: those of `lookalike keys create`.",
        ),
    ] = None,
    jwt_keys: Annotated[
        Path | None,
        typer.Option(
            "--jwt-keys",
            metavar="FILE",
            envvar="LOOKALIKE_JWT_KEYS",
            help="Take tokens signed by a key of this JWK set.",
        ),
    ] = None,
    jwt_issuer: Annotated[
        str, typer.Option("--jwt-issuer", envvar="LOOKALIKE_JWT_ISSUER", help="The `iss` of tokens that count.")
    ] = "",
    jwt_audience: Annotated[
        str, typer.Option("--jwt-audience", envvar="LOOKALIKE_JWT_AUDIENCE", help="The `aud` of tokens that count.")
    ] = "",
    audit_log: Annotated[
        Path | None,
        typer.Option(
            "--audit-log",
            metavar="FILE",
            envvar="LOOKALIKE_AUDIT_LOG",
            help="Append who wrote, administered, was refused.",
        ),
    ] = None,
    reflection: Annotated[
        bool | None,
        typer.Option(
            "--reflection/--no-reflection",
            envvar="LOOKALIKE_REFLECTION",
            help="Describe the methods to whoever asks; by default on loopback alone.",
        ),
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
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        insecure=insecure,
        keys=keys,
        jwt_keys=jwt_keys,
        jwt_issuer=jwt_issuer,
        jwt_audience=jwt_audience,
        audit_log=audit_log,
        reflection=reflection,
    )
    run(settings, on_ready=lambda address: print(f"{READY_LINE}{address}", flush=True))


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
