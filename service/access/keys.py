"""API keys: what the file of keys holds, and the keys in force, read anew when the file changes.

A key is `lk_ID_SECRET`. The file holds the SHA-256 of the whole key, and never the key. A slow hash with a salt, as for
passwords, would add nothing: it makes guesses dear, and no number of guesses finds a secret of 256 random bits. It
would take a hundred milliseconds of every call instead of a microsecond.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated

import structlog
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from embedding.errors import CredentialsInvalid, DamagedData, InvalidInput, StorageFailed
from service.access.principal import PATTERN, SCOPES, Principal, Scope
from service.access.watched import Watched

PREFIX = "lk_"
SECRET_BYTES = 32

_KEY = re.compile(rf"{PREFIX}([0-9a-f]{{16}})_[A-Za-z0-9_-]{{43}}")
_NOBODY = hashlib.sha256(b"nobody").hexdigest()

_log = structlog.get_logger(__name__)


class Record(BaseModel):
    """One key, or one client certificate, and its rights."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
    """Who holds it, for people and logs."""
    digest: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")] = ""
    """SHA-256 of the key, in hexadecimal; empty for a certificate."""
    certificate: Annotated[str, StringConstraints(max_length=512)] = ""
    """A subject alternative name of a client's certificate, or `CN=` and its common name; empty for a key."""
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    galleries: Annotated[tuple[Annotated[str, StringConstraints(pattern=f"^{PATTERN}$")], ...], Field(min_length=1)]
    """Patterns of ids of galleries and aliases."""
    created: AwareDatetime
    expires: AwareDatetime | None = None
    per_second: Annotated[float | None, Field(gt=0, le=1e6)] = None
    """Calls a second, in the long run; none for no limit."""
    burst: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """Calls that may come at once after a rest."""

    @property
    def principal(self) -> Principal:
        return Principal(
            name=self.name,
            scopes=frozenset(self.scopes),
            galleries=self.galleries,
            per_second=self.per_second,
            burst=self.burst,
            expires=self.expires.timestamp() if self.expires else None,
            key=self.id,
        )

    def has_expired(self, now: datetime) -> bool:
        return self.expires is not None and self.expires <= now


class KeyFile(BaseModel):
    """The file of keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Annotated[int, Field(ge=1, le=1)] = 1
    keys: tuple[Record, ...] = ()


class Keys:
    """The keys in force; belongs to one event loop.

    Raises what `read` raises for the file of the start. Later a file that is missing or damaged is logged, and the
    keys read last stay in force: otherwise a slip of an editor would shut everybody out.
    """

    def __init__(self, path: Path) -> None:
        self._file = Watched(path)
        self._take(read(path))

    def of_key(self, key: str) -> Principal:
        """Who holds this key. Raises CredentialsInvalid, the same for an unknown, a wrong and a revoked one."""
        match = _KEY.fullmatch(key)
        self._look(at_once=match is not None and match[1] not in self._by_id)  # it may have been made just now
        record = self._by_id.get(match[1]) if match else None
        # Compared even when there is nothing to compare with: an id cannot be found out by measuring time.
        right = hmac.compare_digest(digest(key), record.digest if record and record.digest else _NOBODY)
        if record is None or not right:
            raise CredentialsInvalid("this API key is not known here; it may be mistyped or revoked")
        return record.principal

    def of_certificate(self, names: Iterable[str]) -> Principal | None:
        """Who is registered with one of these names of a certificate, the first that is."""
        self._look()
        record = next((self._by_certificate[name] for name in names if name in self._by_certificate), None)
        return None if record is None else record.principal

    def still(self, principal: Principal) -> Principal | None:
        """The same holder with the rights of now; None once revoked."""
        self._look()
        record = self._by_id.get(principal.key)
        return None if record is None else record.principal

    def _look(self, *, at_once: bool = False) -> None:
        if not self._file.has_changed(at_once=at_once):
            return
        file = self._file.read_again(read, failed="keys not read; those in force stay")
        if file is not None:
            self._take(file)
            _log.info("keys read", file=str(self._file.path), keys=len(self._by_id))

    def _take(self, file: KeyFile) -> None:
        self._by_id: Mapping[str, Record] = {record.id: record for record in file.keys}
        self._by_certificate = {record.certificate: record for record in file.keys if record.certificate}


def read(path: Path) -> KeyFile:
    """The file's content.

    Raises InvalidInput when there is none or others may write to it, DamagedData, StorageFailed.
    """
    try:
        if path.stat().st_mode & 0o022:
            raise InvalidInput(
                f"others may write to {path}, and so give themselves rights: chmod 600 {path}", field="keys"
            )
        return KeyFile.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise InvalidInput(
            f"there is no file of keys at {path}; make one with `lookalike keys create NAME --scope read "
            f"--gallery '*' --file {path}`",
            field="keys",
        ) from error
    except OSError as error:
        raise StorageFailed(f"the disk refused {path}: {error.strerror or error}") from error
    except ValidationError as error:
        problem = error.errors(include_input=False)[0]  # what the file holds goes into no log
        where = ".".join(map(str, problem["loc"]))
        raise DamagedData(
            f"{path} is no file of keys: {where}: {problem['msg']}; mend it, or restore a copy"
        ) from error


def digest(key: str) -> str:
    """What the file holds of a key: its SHA-256 in hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def make_key() -> tuple[str, str]:
    """The id and the text of a new key."""
    key_id = secrets.token_hex(8)
    return key_id, f"{PREFIX}{key_id}_{secrets.token_urlsafe(SECRET_BYTES)}"


def scopes_of(names: Iterable[str]) -> frozenset[Scope]:
    """The scopes among `names`."""
    wanted = set(names)
    return frozenset(scope for scope in SCOPES if scope in wanted)
