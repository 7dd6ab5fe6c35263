"""How commands reach a server: options before the command, and what the environment says instead."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from embedding.errors import InvalidInput
from lookalike._secure import Access, Tls
from lookalike._settings import DEFAULT_TIMEOUT
from lookalike.client import Client

_chosen: dict[str, Any] = {}


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(f"lookalike {version('lookalike')}")
        raise typer.Exit


def choose(
    tls: Annotated[
        bool, typer.Option("--tls", envvar="LOOKALIKE_TLS", help="Encrypt, and trust the public roots.")
    ] = False,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-ca", metavar="FILE", envvar="LOOKALIKE_TLS_CA", help="Encrypt, and trust these roots (PEM)."
        ),
    ] = None,
    server_name: Annotated[
        str | None,
        typer.Option(
            "--tls-server-name",
            metavar="NAME",
            envvar="LOOKALIKE_TLS_SERVER_NAME",
            help="The name in the server's certificate, where it is not the target's.",
        ),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(
            "--client-certificate",
            metavar="FILE",
            envvar="LOOKALIKE_CLIENT_CERTIFICATE",
            help="Show this certificate (PEM).",
        ),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option("--client-key", metavar="FILE", envvar="LOOKALIKE_CLIENT_KEY", help="Its private key (PEM)."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            metavar="FILE",
            envvar="LOOKALIKE_API_KEY_FILE",
            help="The file that holds the API key; without it LOOKALIKE_API_KEY is the key itself.",
        ),
    ] = None,
    allow_insecure_key: Annotated[
        bool,
        typer.Option(
            "--allow-insecure-key", envvar="LOOKALIKE_ALLOW_INSECURE_KEY", help="Send the key without TLS too."
        ),
    ] = False,
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="Print the version, and end.")
    ] = False,
) -> None:
    """Learn an embedding from labelled images, and answer: do two images match, and what matches this one?"""
    _chosen.update(
        tls=tls,
        ca=tls_ca,
        server_name=server_name,
        certificate=certificate,
        key=key,
        api_key_file=api_key_file,
        allow_insecure_key=allow_insecure_key,
    )


def connect(target: str, *, timeout: float = DEFAULT_TIMEOUT) -> Client:
    """A client by what was chosen. Raises InvalidInput."""
    if not target.strip():
        raise InvalidInput("the server's address is empty; give --target HOST:PORT")
    with _refusals():
        return Client(target, timeout=timeout, **_access(_chosen, os.environ))


def access(target: str) -> Access:
    """What a channel to `target` is opened with, by what was chosen. Raises InvalidInput."""
    with _refusals():
        return Access(target, **_access(_chosen, os.environ))


@contextmanager
def _refusals() -> Iterator[None]:
    """The client's refusals, for those who type."""
    try:
        yield
    except OSError as error:
        raise InvalidInput(f"cannot read {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidInput(_as_options(str(error))) from error


def _access(chosen: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    given = {name: chosen.get(name) for name in ("ca", "server_name", "certificate", "key")}
    tls: Tls | bool = bool(chosen.get("tls"))
    if any(value is not None for value in given.values()):
        tls = Tls(**given)
    path: Path | None = chosen.get("api_key_file")
    api_key = environment.get("LOOKALIKE_API_KEY") if path is None else _key_in(path)
    return {"tls": tls, "api_key": api_key or None, "allow_insecure_key": bool(chosen.get("allow_insecure_key"))}


def _key_in(path: Path) -> str:
    key = path.read_bytes().strip()
    if not key or not key.isascii():
        raise InvalidInput(f"{path} holds no API key; give the file that `lookalike keys create` was written to")
    return key.decode()


def _as_options(message: str) -> str:
    """The client's words for those who type: its arguments are our options."""
    for argument, option in (
        ("tls=True", "--tls"),
        ("tls=Tls(ca=...)", "--tls-ca FILE"),
        ("allow_insecure_key=True", "--allow-insecure-key"),
    ):
        message = message.replace(argument, option)
    return message
