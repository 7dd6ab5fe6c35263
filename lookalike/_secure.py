"""How a client knows its server, and says who it is: TLS and API keys."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import grpc

Pem: TypeAlias = str | Path | bytes
"""PEM: the path of a file, or its content as bytes."""

_SCHEMES = ("dns", "ipv4", "ipv6")


@dataclass(frozen=True, kw_only=True)
class Tls:
    """How to know the server, and how to be known to it by a certificate.

    Files are read when the client is made; make another one when they have changed.
    """

    ca: Pem | None = None
    """The roots that the server's certificate may lead to; None for the public ones that gRPC brings."""
    certificate: Pem | None = None
    """The client's own certificate, for servers that ask for one, and those between it and the root."""
    key: Pem | None = field(default=None, repr=False)
    """Its private key."""
    server_name: str | None = None
    """The name that the server's certificate must have, where it is not the one in the target."""

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises OSError for a file that cannot be read, ValueError for one without PEM and for half a pair."""
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a client certificate needs its key, and a key its certificate: give both")
        return grpc.ssl_channel_credentials(_content(self.ca), _content(self.key), _content(self.certificate))


class Server(TypedDict):
    """Arguments of a client that say whom it calls, and as whom."""

    target: str
    tls: Tls | bool
    api_key: str | None
    allow_insecure_key: bool


class Access:
    """What a channel to `target` is opened with, and what is sent with each call.

    Raises ValueError for a key that would travel in plain text to another machine, unless `allow_insecure_key`.
    """

    def __init__(self, target: str, tls: Tls | bool, api_key: str | None, allow_insecure_key: bool) -> None:
        chosen = Tls() if tls is True else tls or None
        self.credentials = None if chosen is None else chosen.credentials()
        self.options: list[tuple[str, Any]] = []
        if chosen is not None and chosen.server_name is not None:
            self.options.append(("grpc.ssl_target_name_override", chosen.server_name))
        api_key = None if api_key is None else api_key.strip()  # of a file, it ends with a line break
        if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
            raise ValueError("the API key must be one line of printable ASCII; it has other characters, or none")
        if api_key is not None and chosen is None:
            if not is_loopback(target) and not allow_insecure_key:
                raise ValueError(
                    f"the API key would travel to {target} in plain text: give tls=True, or tls=Tls(ca=...) for roots "
                    "of your own, or allow_insecure_key=True where the network is trusted"
                )
            # A proxy would read it, even when the server is on this machine.
            self.options.append(("grpc.enable_http_proxy", 0))
        self.metadata: tuple[tuple[str, str], ...] = ()
        if api_key is not None:
            self.metadata = (("authorization", f"Bearer {api_key}"),)


def is_loopback(target: str) -> bool:
    """Whether a target of gRPC surely is this machine; in doubt it is not."""
    scheme, colon, rest = target.partition(":")
    if scheme in {"unix", "unix-abstract"} and colon:
        return True
    if scheme in _SCHEMES and colon:
        target = rest.removeprefix("///") if scheme == "dns" else rest
    if "," in target or "/" in target:
        return False
    host = target[1:].partition("]")[0] if target.startswith("[") else target.rpartition(":")[0] or target
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _content(pem: Pem | None) -> bytes | None:
    if pem is None:
        return None
    content = pem if isinstance(pem, bytes) else Path(pem).read_bytes()
    if b"-----BEGIN " not in content:  # gRPC would say that no server answers
        what = "what was given as PEM" if isinstance(pem, bytes) else str(pem)
        raise ValueError(f"{what} holds no certificate and no key in PEM, which begin with -----BEGIN")
    return content


def from_environment(environment: Mapping[str, str]) -> Server:
    """Whom to call and how, by the variables that the command line reads.

    Raises ValueError, naming the variable, when one is missing or senseless; OSError for a key's file that cannot be
    read.
    """

    def given(name: str) -> str | None:
        return environment.get(f"LOOKALIKE_{name}") or None

    target, key_file = given("TARGET"), given("API_KEY_FILE")
    if target is None:
        raise ValueError("LOOKALIKE_TARGET is not set: name the server, such as localhost:50051")
    pems = {
        "ca": given("TLS_CA"),
        "server_name": given("TLS_SERVER_NAME"),
        "certificate": given("CLIENT_CERTIFICATE"),
        "key": given("CLIENT_KEY"),
    }
    return {
        "target": target,
        "tls": Tls(**pems) if any(pems.values()) else _flag(environment, "LOOKALIKE_TLS"),
        "api_key": given("API_KEY") if key_file is None else Path(key_file).read_text(encoding="utf-8"),
        "allow_insecure_key": _flag(environment, "LOOKALIKE_ALLOW_INSECURE_KEY"),
    }


def _flag(environment: Mapping[str, str], name: str) -> bool:
    text = environment.get(name, "").strip().lower()
    if text in {"1", "true", "t", "yes", "y", "on"}:
        return True
    if text in {"", "0", "false", "f", "no", "n", "off"}:
        return False
    raise ValueError(f"{name} is 1 or 0, true or false, yes or no; got {text!r}")
