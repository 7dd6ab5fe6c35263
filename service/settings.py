"""What a server is told at start: every setting with its meaning, unit and range.

Where the values come from, and how they are printed, stands in `settings_sources.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from embedding.errors import InvalidInput
from embedding.images import MAX_PIXELS
from embedding.masking import masked
from embedding.runtime import Precision, Runtime

MiB = 2**20
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cores_of_a_worker(settings: dict[str, Any]) -> int:
    """Threads by default, so that several processes do not start as many threads each as there are cores."""
    workers: int = settings.get("workers", 1)
    return -(-_CORES // workers)


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
    """Largest message received or sent, in bytes; larger requests end with REQUEST_TOO_LARGE, and calls whose answer
    would be larger with RESPONSE_TOO_LARGE. Requests over twice as large, or by more than 16 MiB, gRPC
    ends itself, with RESOURCE_EXHAUSTED."""
    max_message_seconds: Annotated[float, Field(gt=0, le=86400)] = 300.0
    """How long the message of a call that has one may take to come in, an eighth more or less; the call, which counts
    among `max_calls` meanwhile, ends with DEADLINE_EXCEEDED then. Streams may be silent for longer."""
    max_pixels: Annotated[int, Field(ge=1)] = MAX_PIXELS
    """Largest width × height of an image, read from its header before anything is decoded."""
    device: str = "auto"
    """Where the encoder runs: auto, cpu, cuda or mps."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 64
    """Most images embedded in one forward pass."""
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that share the port: one writes, the others answer searches and matches from the same galleries."""
    decode_threads: Annotated[int, Field(ge=1, le=256, default_factory=_cores_of_a_worker)]
    """Images decoded at the same time; small ones are decoded by the thread that embeds them. Unless set, each worker's
    share of the cores."""
    encode_threads: Annotated[int, Field(ge=1, le=256, default_factory=_cores_of_a_worker)]
    """Threads of one forward pass on the CPU, likewise."""
    batch_scheduling: bool = True
    """Threads of the server do not interrupt one another (Linux's SCHED_BATCH): up to 1.9 times the calls."""
    gallery_threads: Annotated[int, Field(ge=1, le=256, default_factory=lambda data: 2 * _cores_of_a_worker(data))]
    """Searches, reads and writes of galleries made at the same time; each uses one thread. Unless set, twice the share
    of the cores."""
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
    keys: Path | None = None
    """File of API keys, as `lookalike keys` makes it, read anew when it changes; without it and `jwt_keys` nobody is
    asked who they are."""
    jwt_keys: Path | None = None
    """File of an identity provider's public keys, a JWK set; with it, its tokens count beside API keys."""
    jwt_issuer: str | None = None
    """The `iss` of tokens that count."""
    jwt_audience: str | None = None
    """The `aud` of tokens that count: this service, as the provider knows it."""
    jwt_algorithms: tuple[str, ...] = ("RS256", "ES256", "EdDSA")
    """Signatures that count."""
    jwt_leeway_seconds: Annotated[float, Field(ge=0, le=600)] = 30.0
    """How far the provider's clock may be off."""
    jwt_scopes_claim: str = "scope"
    """The claim that holds scopes, as a list or as words of one string."""
    jwt_scope_prefix: str = "lookalike:"
    """What precedes read, write and admin in that claim."""
    jwt_galleries_claim: str = "lookalike_galleries"
    """The claim that holds patterns of galleries, as a list or as words of one string."""
    jwt_galleries: tuple[str, ...] = ()
    """Patterns of galleries for tokens without that claim."""
    audit_log: Path | None = None
    """File that writes, administration and refusals are appended to, a line of JSON each."""
    reflection: bool | None = None
    """Whether the server describes its methods to whoever asks; unset, only when it listens on loopback."""

    runtime: Runtime = "auto"
    """What runs the network: auto, torch or onnx (ONNX Runtime: convolutional networks on the CPU; extra `onnx`)."""
    precision: Precision = "float32"
    """What the network computes in on CUDA: float32 or bfloat16, which is faster and agrees to about 1e-2."""
    max_batch_delay_seconds: Annotated[float, Field(ge=0, le=1)] = 0.005
    """Longest that images wait for others that are being decoded, to be embedded together."""
    embedding_cache_bytes: Annotated[int, Field(ge=0)] = 32 * MiB
    """Embeddings of images seen lately, kept by the hash of the image's bytes, a model; 0 embeds every image anew."""
    max_queue_seconds: Annotated[float, Field(gt=0, le=3600)] = 0.4
    """Calls that would wait longer for the encoder or the galleries are refused when they come."""
    max_waiting_images: Annotated[int, Field(ge=1)] = 256
    """Images on their way to their embedding, of all calls and for each model; who comes then is refused."""
    max_waiting_bytes: Annotated[int, Field(ge=1024)] = 256 * MiB
    """The bytes of these images."""
    max_waiting_tasks: Annotated[int, Field(ge=1)] = 512
    """Searches, reads and writes of galleries that wait or run, for each model."""
    max_calls: Annotated[int, Field(ge=1)] = 1024
    """Calls in flight."""
    max_unseen_calls: Annotated[int, Field(ge=1, le=2**31 - 1)] = 256
    """Calls that have come and that the event loop has not looked at yet, where it cannot keep up; gRPC itself refuses
    further ones at once, as CANCELLED without a reason."""
    max_request_bytes: Annotated[int, Field(ge=1024)] = 512 * MiB
    """The bytes of the requests of calls in flight."""
    max_answer_bytes: Annotated[int, Field(ge=1024)] = 512 * MiB
    """The bytes of answers that are not sent yet; those of up to 16 kB are not counted."""

    max_connections: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1024
    """Connections at once; further ones are closed."""
    max_streams: Annotated[int, Field(ge=1, le=2**31 - 1)] = 256
    """Calls at once over one connection; further ones wait in the client."""
    max_metadata_bytes: Annotated[int, Field(ge=1024, le=2**24)] = 16 * 1024
    """Metadata of one call."""
    handshake_seconds: Annotated[float, Field(gt=0, le=3600)] = 20.0
    """How long a new connection may take to begin to speak HTTP/2."""
    keepalive_seconds: Annotated[float, Field(ge=1, le=86400)] = 60.0
    """A connection that is silent for so long is asked whether its other end is still there."""
    keepalive_timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = 20.0
    """And is closed when there is no answer for so long."""
    min_ping_seconds: Annotated[float, Field(ge=0, le=3600)] = 10.0
    """Clients that ping more often without a call are cut off, after `max_ping_strikes`."""
    max_ping_strikes: Annotated[int, Field(ge=0, le=1000)] = 2
    """Pings too early that are forgiven; 0 forgives all."""
    max_connection_idle_seconds: Annotated[float, Field(ge=0, le=86400)] = 1800.0
    """A connection without calls for so long is closed; 0 keeps it. Clients connect again by themselves."""
    max_connection_age_seconds: Annotated[float, Field(ge=0, le=7 * 86400)] = 0.0
    """A connection so old takes no new calls, and ends with those it has after as long again; 0 for never. It bounds
    calls that never end, and balances load over servers; no stream then lasts longer than twice this."""
    stream_window: Annotated[int, Field(ge=1, le=4096)] = 256
    """Most elements of one stream that are worked on together."""
    max_stream_bytes: Annotated[int, Field(ge=1024)] = 256 * MiB
    """The bytes of elements of all streams that are read ahead; each stream may always hold one element."""
    max_batch: Annotated[int, Field(ge=1, le=4096)] = 1024
    """Most elements of one batch call; some calls take fewer (see the reference of the API)."""
    max_k: Annotated[int, Field(ge=1)] = 10_000
    """Most neighbours of one search."""

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """TOML has both, and pydantic takes true for 1; were it strict, it would take no text of variables."""
        if isinstance(value, bool) and not _takes_booleans(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("a boolean is not accepted here")
        return value

    @model_validator(mode="after")
    def _each_is_of_effect(self) -> Self:
        """Raises InvalidInput for one that does nothing without another: `jwt_issuer` alone would let everybody in."""
        for need in NEEDS:
            if need.met(self):
                continue
            for name in need.names:
                # One that has its default changes nothing, whether it was left out or written down: a file made from
                # `--print-settings` names all of them.
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise InvalidInput(
                        f"{name} is of no effect without {need.of}; set that too, or leave out {name}", field=name
                    )
        return self

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """Settings from untrusted values. Raises InvalidInput naming the first that is wrong."""
        try:
            return cls(**values)
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join(map(str, problem["loc"]))
            raise InvalidInput(_told(name, problem), field=name or None) from error


class Need(NamedTuple):
    """Settings that do nothing unless another is set."""

    of: str
    """That other, as messages name it."""
    met: Callable[[Settings], bool]
    names: tuple[str, ...]


NEEDS = (
    Need(
        "jwt_keys",
        lambda settings: settings.jwt_keys is not None,
        (
            "jwt_issuer",
            "jwt_audience",
            "jwt_algorithms",
            "jwt_leeway_seconds",
            "jwt_scopes_claim",
            "jwt_scope_prefix",
            "jwt_galleries_claim",
            "jwt_galleries",
        ),
    ),
    Need("tls_certificate", lambda settings: settings.tls_certificate is not None, ("tls_key", "tls_client_ca")),
    Need(
        'engine = "milvus"',
        lambda settings: settings.engine == "milvus",
        ("milvus_uri", "milvus_token", "milvus_database", "milvus_prefix"),
    ),
    # Drift is told by metrics alone.
    Need("metrics_port", lambda settings: settings.metrics_port is not None, ("metrics_host", "drift_window_seconds")),
    Need("otlp_endpoint", lambda settings: settings.otlp_endpoint is not None, ("otlp_headers", "trace_share")),
    Need("max_ping_strikes above 0", lambda settings: settings.max_ping_strikes > 0, ("min_ping_seconds",)),
    Need("a device other than cpu", lambda settings: settings.device != "cpu", ("precision",)),
)
"""What needs what. A TLS certificate and its key need each other, which `tls.certificates` says for both; `insecure` on
loopback is allowed, so that one environment serves both kinds of address."""


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
    if is_secret(name.partition(".")[0]):
        return f"{name}: {message}"
    return f"{name}: {message}; got {_without_passwords(problem['input'])!r}"


def _without_passwords(value: object) -> object:
    """A refused value as messages quote it: any setting may have been given the address of another."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, (list, tuple)):
        return [_without_passwords(each) for each in value]
    if isinstance(value, dict):
        return {key: _without_passwords(each) for key, each in value.items()}
    return value


def _takes_booleans(annotation: object) -> bool:
    return bool in (annotation, *get_args(annotation))
