"""TLS: which addresses may go without, and certificates that are read anew when their files change.

gRPC asks for the certificate at every handshake, so that a new one counts from the next connection on, and connections
that stand are left alone. Files that do not fit together, as when only one of two has been replaced yet, change
nothing until they do.
"""

from __future__ import annotations

import ipaddress
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from embedding.errors import InvalidInput
from service.settings import Settings

_log = structlog.get_logger(__name__)

_Stamp = tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class Files:
    """Where the PEM files of a server lie."""

    certificate: Path
    """The server's certificate, then those between it and the root, in this order."""
    key: Path
    """Its private key, without a passphrase."""
    client_ca: Path | None = None
    """The roots that clients' certificates must lead to; with it, no client connects without one."""

    @property
    def named(self) -> dict[str, Path]:
        """The files by the setting that names them."""
        named = {"tls_certificate": self.certificate, "tls_key": self.key, "tls_client_ca": self.client_ca}
        return {setting: path for setting, path in named.items() if path is not None}


class Certificates:
    """The certificates of a server as they are now. Raises InvalidInput, by name, for files that cannot be used."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._stamp, self._read = _read(files)
        self._refused: _Stamp | None = None
        self._said = ""  # why they were not renewed
        self._reading = threading.Lock()  # handshakes run at the same time

    def credentials(self) -> grpc.ServerCredentials:
        """What a port is opened with; asks for the files' state at every handshake."""
        return grpc.dynamic_ssl_server_credentials(
            self._read,
            self._renewed,  # type: ignore[arg-type]  # None is allowed, and means no change
            require_client_authentication=self._files.client_ca is not None,
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration; None, which leaves things as they are, when no file has changed."""
        try:
            with self._reading:
                stamp = _stamp(self._files)
                if stamp in (self._stamp, self._refused):
                    return None
                try:
                    self._stamp, self._read = _read(self._files)
                except InvalidInput as error:
                    if not isinstance(error.__cause__, OSError) or isinstance(error.__cause__, ssl.SSLError):
                        self._refused = stamp  # until a file changes; what the disk refused may be read the next time
                    if str(error) != self._said:  # said once
                        _log.error("certificates not renewed; those in use stay", reason=str(error))
                        self._said = str(error)
                    return None
                self._refused, self._said = None, ""
            _log.info("certificates renewed", certificate=str(self._files.certificate))
            return self._read
        except OSError as error:  # a file is away, as in the middle of its replacement
            _log.warning("certificates not read; those in use stay", reason=str(error))
            return None


def certificates(settings: Settings) -> Certificates | None:
    """The certificates to serve with; None to serve without TLS.

    Raises InvalidInput where settings contradict each other, and for an address that other machines reach without
    TLS, unless `insecure` says that this is meant.
    """
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate is not None and key is not None:
        if settings.insecure:
            raise InvalidInput("insecure contradicts tls_certificate; leave out one of them", field="insecure")
        return Certificates(Files(certificate, key, settings.tls_client_ca))
    if certificate is not None or key is not None or settings.tls_client_ca is not None:
        missing = "tls_key" if certificate is not None else "tls_certificate"
        raise InvalidInput(f"{missing} is missing; TLS needs tls_certificate and tls_key", field=missing)
    if not is_loopback(settings.host) and not settings.insecure:
        raise InvalidInput(
            f"{settings.host} can be reached from other machines, who would read images and keys on the way: give "
            "--tls-certificate and --tls-key, or listen on 127.0.0.1, or say --insecure where the network is trusted",
            field="host",
        )
    return None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. A name is believed only if it is `localhost`: others may move."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return address.is_loopback


def _stamp(files: Files) -> _Stamp:
    states = [path.stat() for path in files.named.values()]
    # With the time of the last change of mode or owner: files that were refused for these may count now.
    return tuple((state.st_ctime_ns, state.st_mtime_ns, state.st_size, state.st_ino) for state in states)


def _read(files: Files) -> tuple[_Stamp, grpc.ServerCertificateConfiguration]:
    """The files and their state, checked to fit together: gRPC itself would only fail every handshake."""
    contents: dict[str, bytes] = {}
    try:
        stamp = _stamp(files)
        for setting, path in files.named.items():
            contents[setting] = path.read_bytes()
    except OSError as error:
        setting = next(name for name, path in files.named.items() if str(path) == str(error.filename))
        raise InvalidInput(f"{setting}: cannot read {error.filename}: {error.strerror}", field=setting) from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.certificate, files.key, password=_no_passphrase)
    except (ssl.SSLError, ValueError) as error:
        raise InvalidInput(
            f"tls_certificate {files.certificate} and tls_key {files.key} are no pair of PEM files that fit together, "
            f"the key without a passphrase ({_reason(error)})",
            field="tls_certificate",
        ) from error
    roots = contents.get("tls_client_ca")
    if roots is not None:
        try:
            context.load_verify_locations(cadata=roots.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise InvalidInput(
                f"tls_client_ca {files.client_ca} holds no PEM certificates ({_reason(error)})", field="tls_client_ca"
            ) from error
    if _stamp(files) != stamp:
        raise InvalidInput("the files change while they are read; try again", field="tls_certificate")
    pair = (contents["tls_key"], contents["tls_certificate"])
    return stamp, grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase")  # OpenSSL would ask for it at the terminal


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error) or type(error).__name__
