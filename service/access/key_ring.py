"""Changes of the file of keys, each as a whole: made, revoked, rotated. Without grpc, for the command."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import ValidationError

from embedding.durable import sync_folder
from embedding.errors import AlreadyExists, Busy, InvalidInput, NotFound, StorageFailed
from service.access.keys import KeyFile, Record, digest, make_key, read
from service.access.principal import Scope

LOCK_SECONDS = 10.0
"""How long a change waits for another one, which takes milliseconds."""

_LOOK_SECONDS = 0.02
_MAX_DAYS = 36_500

_ACCEPTED = {
    "name": "1 to 64 letters, digits and . _ @ -, the first a letter or digit",
    "scopes": "among read, write and admin",
    "galleries": "ids of lower-case letters, digits and hyphens, in which * stands for anything",
    "per_second": "above 0, and 1,000,000 at most",
    "burst": "1 to 1,000,000",
}


class KeyRing:
    """The file of keys at `path`, whose changes wait for each other, in whatever process they are made."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def all(self) -> Sequence[Record]:
        """Every record, in the order of creation. Raises InvalidInput when there is no file."""
        return read(self._path).keys

    def create(
        self,
        name: str,
        *,
        scopes: Sequence[Scope],
        galleries: Sequence[str],
        days: float | None = None,
        per_second: float | None = None,
        burst: int | None = None,
        certificate: str = "",
    ) -> tuple[Record, str]:
        """A record, and the key itself, which is kept nowhere; empty when it is for a certificate.

        Raises InvalidInput, and AlreadyExists when the name or the certificate has a record that has not expired.
        """
        if burst is not None and per_second is None:
            raise InvalidInput(
                "a burst is of no effect without a rate; give --rate too, or leave out --burst", field="burst"
            )
        now = datetime.now(UTC)
        key_id, key = make_key()
        record = _checked(
            id=key_id,
            name=name,
            digest="" if certificate else digest(key),
            certificate=certificate,
            scopes=tuple(dict.fromkeys(scopes)),
            galleries=tuple(dict.fromkeys(galleries)),
            created=now,
            expires=_after(now, days),
            per_second=per_second,
            burst=burst or max(1, round(per_second or 1)),
        )
        with self._changing() as (records, write):
            for other in records:
                if other.has_expired(now):
                    continue
                if other.name == name:
                    raise AlreadyExists(f"{name!r} has key {other.id}; rotate or revoke it, or choose another name")
                if certificate and other.certificate == certificate:
                    raise AlreadyExists(f"{certificate!r} is registered for {other.name!r}; revoke {other.id} first")
            write([*records, record])
        return record, "" if certificate else key

    def rotate(self, which: str, *, overlap: timedelta, days: float | None = None) -> tuple[Record, str]:
        """A new key with the rights of the one named by id or name, which goes on for `overlap` and then expires.

        `days` is how long the new key lives; None for as long as the old one was to. Raises NotFound, InvalidInput.
        """
        if not timedelta(0) <= overlap <= timedelta(days=_MAX_DAYS):
            raise InvalidInput(f"an old key counts for 0 hours to 100 years more; got {overlap}", field="overlap")
        now = datetime.now(UTC)
        with self._changing() as (records, write):
            old = _named(records, which, now)
            if old.certificate:
                raise InvalidInput(f"{which!r} is a certificate; issue another one with the same name")
            key_id, key = make_key()
            life = old.expires - old.created if old.expires else None
            expires = _after(now, days) if days is not None else (now + life if life else None)
            new = old.model_copy(update={"id": key_id, "digest": digest(key), "created": now, "expires": expires})
            ends = min(now + overlap, old.expires) if old.expires else now + overlap
            write([old.model_copy(update={"expires": ends}) if each is old else each for each in records] + [new])
        return new, key

    def revoke(self, which: str) -> list[Record]:
        """Take away the key of this id, or all of this name. Raises NotFound."""
        with self._changing() as (records, write):
            gone = [record for record in records if which in (record.id, record.name)]
            if not gone:
                raise _unknown(which)
            write([record for record in records if record not in gone])
        return gone

    @contextmanager
    def _changing(self) -> Iterator[tuple[list[Record], _Write]]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with _held(self._path):
                records = list(read(self._path).keys) if self._path.exists() else []
                yield records, _Write(self._path)
        except OSError as error:
            raise StorageFailed(
                f"the disk refused {error.filename or self._path}: {error.strerror or error}"
            ) from error


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Nobody else changes the file within. Raises Busy, naming the process that does, and OSError."""
    lock = path.with_name(f"{path.name}.lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        until = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
                    raise Busy(f"process {holder} is changing {path}; wait until it has ended, or stop it") from None
                time.sleep(_LOOK_SECONDS)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


class _Write:
    """Replaces the file as a whole: a server that reads meanwhile sees the old or the new one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, records: Sequence[Record]) -> None:
        partial = self._path.with_name(f"{self._path.name}.partial")
        text = KeyFile(keys=tuple(records)).model_dump_json(indent=1, exclude_none=True)
        mode, owner = 0o600, None
        if self._path.exists():  # made by root, read by the server's user: that stays so
            state = self._path.stat()
            mode, owner = state.st_mode & 0o755, (state.st_uid, state.st_gid)
        partial.unlink(missing_ok=True)  # of a process that was killed; never written through, it may be a link
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, mode)
            if owner is not None and owner != (os.geteuid(), os.getegid()):
                os.fchown(descriptor, *owner)
            file.write(text + "\n")
            file.flush()
            os.fsync(descriptor)
        partial.replace(self._path)
        sync_folder(self._path.parent)


def _checked(**values: object) -> Record:
    try:
        return Record.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else "key"
        accepted = _ACCEPTED.get(name, problem["msg"])
        raise InvalidInput(f"{name} must be {accepted}; got {problem['input']!r}", field=name) from error


def _named(records: Sequence[Record], which: str, now: datetime) -> Record:
    """The record of this id, or the newest of this name that has not expired."""
    found = [each for each in records if which in (each.id, each.name) and not each.has_expired(now)]
    if not found:
        raise _unknown(which)
    return found[-1]


def _unknown(which: str) -> NotFound:
    return NotFound(f"no key has the id or name {which!r}; `lookalike keys list` shows them")


def _after(now: datetime, days: float | None) -> datetime | None:
    if days is None:
        return None
    if not 0 < days <= _MAX_DAYS:
        raise InvalidInput(f"expiry lies 1 second to 100 years ahead; got {days:g} days", field="expires")
    return now + timedelta(days=days)
