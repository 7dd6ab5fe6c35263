"""What a batch job leaves on disk: Parquet shards, and `_job.json`, which says what they are and sums them up.

    folder/
        .lock                held by the process that runs the job
        _job.json            conditions, and a line for each shard that is whole
        part-00000.parquet   the answers to the first queries, and so on

A shard is renamed to its name when it is whole and on the disk, and counts once `_job.json` has its sum: a kill at any
moment loses the work on one shard at most. What `_job.json` does not name is no part of the job.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from embedding.durable import sync_folder
from embedding.errors import AlreadyExists, Busy, DamagedData, JobChanged, StorageFailed
from index.catalog import HeldFolder, holder
from index.sums import FileSum

MANIFEST = "_job.json"
FOOTER = b"lookalike"
"""The key of the footer's JSON object among the metadata of a Parquet file."""
PARTIAL = ".partial-"
_SHARD = re.compile(r"part-\d{5,}\.parquet")  # no looser: what others put beside them is not ours to delete

_SHOWN = 4  # of the conditions that differ


class Conditions(BaseModel):
    """All that the answers of a job depend on; two jobs with equal conditions have equal shards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queries: str
    """Where the queries come from, in a word: folder, manifest, embeddings, gallery."""
    queries_digest: str
    """Tells other queries from these."""
    gallery: str
    """The id of the gallery that is searched, its aliases resolved."""
    gallery_created: str
    """Tells a gallery from an earlier one of the same name."""
    generation: int
    """Of the gallery; every answer is of it."""
    model: str
    fingerprint: str
    """Of the model."""
    calibration: int
    """Its version."""
    parameters: dict[str, Any]
    """What is asked for every query, and how large shards are."""

    @property
    def digest(self) -> str:
        """SHA-256 of the conditions, in hexadecimal."""
        text = json.dumps(self.model_dump(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Shard(BaseModel):
    """One file of answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    first: int
    """Row of its first query, from 0."""
    queries: int
    errors: int
    """Queries that could not be answered."""
    matched: int
    """Queries with a match."""
    matches: int
    truncated: int
    """Queries with more matches than were asked for."""
    rows: int
    last_id: str
    """Of its last query."""
    sum: FileSum


class Totals(BaseModel):
    """What shards have together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queries: int = 0
    errors: int = 0
    matched: int = 0
    matches: int = 0
    truncated: int = 0
    rows: int = 0
    bytes: int = 0

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> Self:
        fields = ("queries", "errors", "matched", "matches", "truncated", "rows")
        counts = {field: sum(getattr(shard, field) for shard in shards) for field in fields}
        return cls(**counts, bytes=sum(shard.sum.bytes for shard in shards))


class Manifest(BaseModel):
    """The content of `_job.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1]
    digest: str
    """Of the conditions."""
    conditions: Conditions
    done: bool
    """Whether every query is answered."""
    totals: Totals
    shards: tuple[Shard, ...]


class JobFolder:
    """The folder of one job, held by this process from `open` to `close`."""

    def __init__(self, path: Path, held: HeldFolder, manifest: Manifest) -> None:
        self.path = path
        self._held = held
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path, conditions: Conditions, *, restart: bool = False) -> Self:
        """Begin a job, or go on with the one that is there; with `restart` whatever job is there is begun anew.

        Raises JobChanged when that was begun under other conditions, AlreadyExists when other things lie in the folder,
        DamagedData for a manifest that cannot be read, Busy while another process runs it, StorageFailed.
        """
        _check_ours(path)
        try:
            held = HeldFolder(path)
        except Busy as error:
            raise Busy(f"process {holder(path)} runs the job in {path}; wait until it has ended, or stop it") from error
        try:
            fresh = Manifest(
                format=1, digest=conditions.digest, conditions=conditions, done=False, totals=Totals(), shards=()
            )
            known = None if restart else read_manifest(path)
            folder = cls(path, held, known or fresh)
            if known is None:
                folder._clear(keep=())
                folder._write(fresh)
            else:
                _check_same(path, known, conditions)
                folder._clear(keep=[shard.name for shard in known.shards])
        except OSError as error:
            held.close()
            raise refused(path, error) from error
        except BaseException:
            held.close()
            raise
        return folder

    def damaged(self) -> list[Shard]:
        """The shards that are missing or have another sum than when they were written."""
        found = []
        for shard in self.manifest.shards:
            path = self.path / shard.name
            try:
                is_whole = path.stat().st_size == shard.sum.bytes and FileSum.of(path) == shard.sum
            except FileNotFoundError:
                is_whole = False
            except OSError as error:
                raise refused(path, error) from error
            if not is_whole:
                found.append(shard)
        return found

    def add(self, shard: Shard) -> None:
        """Count a shard that is on the disk, in the place of the one of its name or after all others."""
        shards = {each.name: each for each in self.manifest.shards} | {shard.name: shard}
        self._write(
            self.manifest.model_copy(
                update={"shards": tuple(shards.values()), "totals": Totals.of(list(shards.values()))}
            )
        )

    def finish(self) -> None:
        """Every query is answered."""
        if not self.manifest.done:
            self._write(self.manifest.model_copy(update={"done": True}))

    def close(self) -> None:
        """Let others run the job."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, manifest: Manifest) -> None:
        partial = self.path / f"{PARTIAL}{MANIFEST}"
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(manifest.model_dump_json(indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path / MANIFEST)
            sync_folder(self.path)
        except OSError as error:
            raise refused(self.path, error) from error
        finally:
            with suppress(OSError):  # a disk that refused may refuse again; the next run removes it
                partial.unlink(missing_ok=True)
        self.manifest = manifest

    def _clear(self, keep: Sequence[str]) -> None:
        """Remove shards that do not count, and what a kill has left of others."""
        kept = set(keep)
        for path in self.path.iterdir():
            if path.name.startswith(PARTIAL) or (_SHARD.fullmatch(path.name) and path.name not in kept):
                path.unlink()


def read_manifest(path: Path) -> Manifest | None:
    """What `_job.json` of a folder says; None where there is none. Raises DamagedData and StorageFailed."""
    try:
        return Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise refused(path / MANIFEST, error) from error
    except ValidationError as error:
        raise DamagedData(
            f"{path / MANIFEST} cannot be read as that of a job; begin it anew with --restart, or choose another folder"
        ) from error


def refused(path: Path, error: OSError) -> StorageFailed:
    """What the disk said, in our words."""
    return StorageFailed(f"the disk refused {path}: {error.strerror or error}; the shards written so far are kept")


def _check_ours(path: Path) -> None:
    """Raises AlreadyExists for a file, and for a folder that holds other things than a job."""
    try:
        names = {each.name for each in path.iterdir()} if path.exists() else set()
    except NotADirectoryError as error:
        raise AlreadyExists(f"{path} is a file; give a folder for the shards of the job") from error
    except OSError as error:
        raise refused(path, error) from error
    strangers = [name for name in names if not (name.startswith(PARTIAL) or name == ".lock")]
    if strangers and MANIFEST not in names:
        raise AlreadyExists(f"{path} holds {sorted(strangers)[0]!r} and no job; give a new or empty folder")


def _check_same(path: Path, known: Manifest, wanted: Conditions) -> None:
    if known.digest == wanted.digest:
        return
    before, now = _flat(known.conditions), _flat(wanted)
    changed = [
        f"{name.replace('_', ' ')} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in now
        if before.get(name) != now[name]
    ]
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    raise JobChanged(
        f"the job in {path} was begun under other conditions: {', '.join(changed[:_SHOWN])}{more}; ask as then to go "
        "on with it, give another folder, or begin it anew with --restart, which deletes its shards"
    )


def _flat(conditions: Conditions) -> dict[str, Any]:
    plain = conditions.model_dump()
    parameters: dict[str, Any] = plain.pop("parameters")
    return parameters | plain
