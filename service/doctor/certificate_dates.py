"""When a certificate ends, found by a handshake in memory: the standard library decodes only what it has verified."""

from __future__ import annotations

import ssl
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path


class NotValid(Exception):
    """The certificate is expired, or not valid yet."""


def expiry(certificate: Path, key: Path) -> datetime:
    """When the certificate of this PEM file ends. Raises NotValid; the files are known to fit together."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate, key)
    client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_side.check_hostname = False
    client_side.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # trust the certificate itself, whoever issued it
    client_side.load_verify_locations(certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    client = client_side.wrap_bio(to_client, to_server)
    is_done = False
    while not is_done:
        try:
            client.do_handshake()
            is_done = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLCertVerificationError as error:
            raise NotValid(error.verify_message) from error
        with suppress(ssl.SSLWantReadError):
            server.do_handshake()
    decoded = client.getpeercert() or {}
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(decoded["notAfter"])), UTC)
