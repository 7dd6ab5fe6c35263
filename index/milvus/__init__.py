"""Galleries on Milvus: the interface of `index.engine` over a cluster, for galleries past one machine (extra `milvus`).

    catalog = MilvusCatalog("http://localhost:19530", token="user:password")    # a server or cluster
    catalog = MilvusCatalog("galleries.db")                                     # Milvus Lite, in this process

Milvus is the store here, not a view: items, metadata, thumbnails and vectors lie in it, and nothing of them on this
machine. It searches exactly, in all its nodes; distances are measured again and decided by `embedding.decision`, as
everywhere. Writes are all or nothing, reads are of one generation (`index.milvus.rows` says how).

Different from the embedded engine: searches are exact whatever the effort, no snapshot is made, thumbnails are at most
48 kB. One process writes; the last to be opened does, and others are refused with Busy.

`index.milvus.link` is the wire, `rows` what lies in Milvus, `store` reads and writes it,
`search` and `filters` ask it, `gallery` is the engine.
"""

from __future__ import annotations

import os
import platform
import re
import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

from embedding.errors import AlreadyExists, Busy, DamagedData, InvalidInput, LookalikeError, NotFound, NotSupported
from index.absent import no_gallery
from index.catalog import HeldFolder
from index.engine import IndexSettings, OnProgress, Problem, Verification
from index.items import GALLERY_ID, ModelRef, check_gallery_id
from index.milvus.filters import literal
from index.milvus.gallery import MilvusGallery, check_settings
from index.milvus.link import Link, Row
from index.milvus.rows import RECORD, Record, collection_name, gallery_schema, records_schema
from index.milvus.store import MilvusStore

Galleries: TypeAlias = list[MilvusGallery]

_OWNER = ".owner"  # no gallery can have this id
_PREFIX = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}")


class MilvusCatalog:
    """The galleries of one Milvus database whose collections begin with `prefix`. Close it after use.

    Raises Busy when Milvus cannot be reached, InvalidInput for a wrong token.
    """

    def __init__(
        self, uri: str, *, token: str = "", database: str = "", prefix: str = "lookalike", folder: Path | None = None
    ) -> None:
        """`folder` holds what else a server keeps; no other process writes to it while this is open."""
        if not _PREFIX.fullmatch(prefix):
            raise InvalidInput(
                "a prefix of collections is 1 to 32 letters, digits and underscores, the first a letter; got "
                f"{prefix!a}",
                field="milvus_prefix",
            )
        self._prefix = prefix
        self._records = f"{prefix}_galleries"
        self._me = uuid.uuid4().hex
        self._open: dict[str, MilvusGallery] = {}
        self._making: set[str] = set()
        """Collections of galleries that are being made, and have no record yet."""
        self._changing = threading.Lock()
        self._folder = None if folder is None else HeldFolder(folder)
        try:
            self._link = Link(uri, token=token, database=database)
        except BaseException:
            self._let_go()
            raise
        try:
            if self._records not in self._link.collections():
                self._link.create(self._records, records_schema(self._link.client), vector="nothing")
            self._link.load(self._records)
            self._take_over()
            self._drop_leftovers()
        except BaseException:
            self._link.close()
            self._let_go()
            raise

    def create(
        self,
        gallery_id: str,
        model: ModelRef,
        *,
        settings: IndexSettings | None = None,
        publishing: AbstractContextManager[None] | None = None,
    ) -> MilvusGallery:
        """Make an empty gallery, which gets its name within `publishing`.

        Raises AlreadyExists, and NotSupported for settings that Milvus does not have.
        """
        check_gallery_id(gallery_id)
        check_settings(settings or IndexSettings())
        self._check_makeable(gallery_id)  # now rather than after the work
        uid = uuid.uuid4().hex
        record = Record(
            id=gallery_id,
            model=model,
            collection=collection_name(self._prefix, gallery_id, uid),
            uid=uid,
            settings=settings or IndexSettings(),
        )
        self._making.add(record.collection)
        try:
            self._link.create(record.collection, gallery_schema(self._link.client, model), vector="vector")
            with publishing or nullcontext(), self._changing:
                self._check_makeable(gallery_id)
                self._link.upsert(self._records, [record.row()])  # from here on there is such a gallery
                return self._opened(record)
        finally:
            self._making.discard(record.collection)  # without a record it goes with the next leftovers

    def opened(self, gallery_id: str) -> MilvusGallery | None:
        """None: Milvus is another machine, or may be."""
        return None

    def get(self, gallery_id: str, *, model: ModelRef | None = None) -> MilvusGallery:
        """Raises NotFound, ModelMismatch, or DamagedData for one whose record cannot be read."""
        check_gallery_id(gallery_id)
        gallery = self._open.get(gallery_id)
        if gallery is None or gallery.closed:
            with self._changing:
                gallery = self._open.get(gallery_id)
                if gallery is None or gallery.closed:
                    row = self._found(gallery_id)
                    if row is None:
                        raise no_gallery(gallery_id)
                    gallery = self._opened(Record.of(row))
        if model is not None:
            gallery.check_model(model)
        return gallery

    def list(self) -> Galleries:
        return self.survey()[0]

    def survey(self) -> tuple[Galleries, dict[str, LookalikeError]]:
        """The galleries that can be opened, by name, and for each of the others why it cannot."""
        galleries: Galleries = []
        damaged: dict[str, LookalikeError] = {}
        for name in sorted(row["id"] for row in self._rows() if GALLERY_ID.fullmatch(row["id"])):
            try:
                galleries.append(self.get(name))
            except NotFound:
                pass  # deleted since
            except (DamagedData, Busy) as error:
                damaged[name] = error
        return galleries, damaged

    def verify(self, gallery_id: str, *, repair: bool = False, on_progress: OnProgress | None = None) -> Verification:
        """Check a gallery, also one whose record cannot be read. Raises NotFound."""
        try:
            gallery = self.get(gallery_id)
        except DamagedData as error:
            return Verification(
                items=0, files=0, problems=[Problem(path=self._records, what=str(error), repaired=False)]
            )
        return gallery.verify(repair=repair, on_progress=on_progress)

    def delete(self, gallery_id: str) -> None:
        """Delete a gallery, damaged or not. Raises NotFound."""
        check_gallery_id(gallery_id)
        with self._changing:
            self._check_owner()
            row = self._found(gallery_id)
            if row is None:
                raise no_gallery(gallery_id)
            gallery = self._open.pop(gallery_id, None)
            if gallery is not None:
                gallery.close()
            self._link.delete(self._records, f"id == {literal(gallery_id)}")
            self._drop_leftovers()

    def restore(
        self,
        gallery_id: str,
        folder: Path,
        *,
        on_progress: OnProgress | None = None,
        publishing: AbstractContextManager[None] | None = None,
    ) -> MilvusGallery:
        """Raises NotSupported."""
        raise NotSupported(
            "a snapshot is restored by the engine that made it; open the server with the embedded engine, or restore "
            "Milvus with its own backup tool"
        )

    def close(self) -> None:
        with self._changing:
            for gallery in self._open.values():
                gallery.close()
            self._open.clear()
            self._link.close()
            self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _let_go(self) -> None:
        if self._folder is not None:
            self._folder.close()

    def _check_makeable(self, gallery_id: str) -> None:
        self._check_owner()
        if self._found(gallery_id):
            raise AlreadyExists(f"there is a gallery {gallery_id!r} already; delete it, or choose another name")

    def _opened(self, record: Record) -> MilvusGallery:
        gallery = MilvusGallery(MilvusStore(self._link, self._records, record, self._check_owner))
        self._open[record.id] = gallery
        return gallery

    def _rows(self, where: str = 'id != ""') -> Sequence[Row]:
        return self._link.query(self._records, where, RECORD)

    def _found(self, gallery_id: str) -> Row | None:
        return next(iter(self._rows(f"id == {literal(gallery_id)}")), None)

    def _take_over(self) -> None:
        state: Mapping[str, str | int] = {"token": self._me, "host": platform.node(), "process": os.getpid()}
        self._link.upsert(self._records, [{"id": _OWNER, "state": dict(state), "nothing": [0.0, 0.0]}])

    def _check_owner(self) -> None:
        """Raises Busy once another process has been opened on these galleries."""
        row = self._found(_OWNER)
        state = {} if row is None else row["state"]
        if state.get("token") != self._me:
            raise Busy(
                f"process {state.get('process')} on {state.get('host')} has taken over writing to these galleries; "
                "send the work to it, or stop it and start this one again"
            )

    def _drop_leftovers(self) -> None:
        """Drop collections of galleries that were deleted, or never got their record."""
        records = [row["state"] for row in self._rows()]
        known = {self._records, *self._making, *(str(state.get("collection")) for state in records)}
        for name in self._link.collections():
            if name.startswith(f"{self._prefix}_") and name not in known:
                self._link.drop(name)
