"""What a server is told at start: every setting with its meaning, unit and range.

Where the values come from, and how they are printed, stands in `settings_sources.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_core import ErrorDetails

from embedding.errors import InvalidInput
from embedding.images import MAX_PIXELS

MiB = 2**20
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Settings(BaseModel):
    """Settings of one server process; `Settings.checked` names the one that is wrong in one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    bundle: Path
    """Directory of the bundle whose model answers."""
    other_bundles: tuple[Path, ...] = ()
    """Bundles of further models, which answer where a gallery holds embeddings of theirs."""
    galleries: Path = Path("galleries")
    """Folder of the galleries; made when it is missing. One process writes to it."""
    host: str = "127.0.0.1"
    """Name or address to listen on; the default is reachable from this machine alone."""
    port: Annotated[int, Field(ge=0, le=65535)] = 50051
    """TCP port to listen on; 0 takes any free one."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe records that are logged; each call is one of level info."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """One JSON object a line, text for a person, or the latter where stderr is a terminal."""
    metrics_port: Annotated[int | None, Field(ge=0, le=65535)] = None
    """HTTP port of /metrics, /healthz and /readyz; 0 takes any free one, unset opens none."""
    metrics_host: str = "127.0.0.1"
    """Name or address that it listens on; what it tells is neither encrypted nor authenticated."""
    drift_window_seconds: Annotated[float, Field(ge=60, le=30 * 86400)] = 3600.0
    """How far back live distances and norms are compared with the calibration's, in seconds."""
    otlp_endpoint: Annotated[str | None, Field(pattern=r"^https?://")] = None
    """Where OpenTelemetry traces are sent, by OTLP over gRPC, such as `http://127.0.0.1:4317`; unset makes none."""
    otlp_headers: SecretStr | None = None
    """Metadata sent with them, as `name=value` separated by commas: a collector's key, for example."""
    trace_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the traces beginning here that is recorded; what a caller has decided is kept."""
    max_message_bytes: Annotated[int, Field(ge=1024, le=2**31 - 1)] = 64 * MiB
    """Largest message received or sent, in bytes; larger requests end with RESOURCE_EXHAUSTED."""
    max_pixels: Annotated[int, Field(ge=1)] = MAX_PIXELS
    """Largest width × height of an image, read from its header before anything is decoded."""
    device: str = "auto"
    """Where the encoder runs: auto, cpu, cuda or mps."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 64
    """Most images embedded in one forward pass."""
    decode_threads: Annotated[int, Field(ge=1, le=256)] = _CORES
    """Images decoded at the same time."""
    encode_threads: Annotated[int, Field(ge=1, le=256)] = _CORES
    """Threads of one forward pass on the CPU."""
    gallery_threads: Annotated[int, Field(ge=1, le=256)] = 2 * _CORES
    """Searches, reads and writes of galleries made at the same time; each uses one thread."""
    thumbnails: Annotated[int, Field(ge=0, le=1024)] = 0
    """Side, in pixels, of the small images stored with new items, so that another model can embed them; 0 for none."""
    drain_seconds: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """How long calls in flight may take to finish once the server is told to stop."""
    tls_certificate: Path | None = None
    """PEM file of the server's certificate and those between it and the root; read anew when it changes."""
    tls_key: Path | None = None
    """PEM file of the certificate's private key, without a passphrase."""
    tls_client_ca: Path | None = None
    """PEM file of the roots that clients' certificates must lead to; with it, no client connects without one."""
    insecure: bool = False
    """Listen without TLS on an address that other machines reach."""
    models: Path | None = None
    """Folder of further bundles, a directory each, that can be activated while the server runs; it is read again each
    time it is asked about."""

    engine: Literal["embedded", "milvus"] = "embedded"
    """What holds the galleries: the folder itself, or a Milvus database (extra `milvus`)."""
    milvus_uri: str | None = None
    """With engine milvus, its address, "http://host:19530", or the path of a Milvus Lite file, which ends in ".db"."""
    milvus_token: SecretStr | None = None
    """What Milvus asks of clients: "user:password" or an API key."""
    milvus_database: str | None = None
    """The database of Milvus; its default one unless set."""
    milvus_prefix: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,31}$")] = "lookalike"
    """How the names of its collections begin."""

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """Settings from untrusted values. Raises InvalidInput naming the first that is wrong."""
        try:
            return cls(**values)
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join(map(str, problem["loc"]))
            raise InvalidInput(_told(name, problem), field=name or None) from error


def is_secret(name: str) -> bool:
    """Whether the setting must never be shown: its type is SecretStr."""
    field = Settings.model_fields.get(name)
    return field is not None and SecretStr in (field.annotation, *get_args(field.annotation))


def _told(name: str, problem: ErrorDetails) -> str:
    if problem["type"] == "missing":
        return f"{name} is not set, and has no default"
    message = problem["msg"].removeprefix("Value error, ")
    if not name:  # a rule about several settings: its input is all of them
        return message
    return f"{name}: {message}" if is_secret(name.partition(".")[0]) else f"{name}: {message}; got {problem['input']!r}"
