"""A gallery that another process writes to, followed: every read sees all that was acknowledged before it.

SQLite tells, for the price of a look at shared memory, whether anything was committed; only then is what is new read,
within one transaction. Segments are the writer's, mapped once more. What died is kept by a writer that is followed for
some seconds, so that a read can finish on the snapshot that it took.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from embedding.errors import Busy, DamagedData
from index.live import STORE, SUMS, Live
from index.rows import LiveRows
from index.segments import open_segment
from index.snapshot import Snapshot
from index.store import Store
from index.sums import Sums

_ATTEMPTS = 5


class Following(Live):
    """`Live` that never writes; every method may be called from any thread."""

    def __init__(self, gallery_id: str, folder: Path) -> None:
        self._version = 0
        self._taken: tuple[int, int] | None = None  # generation and next key of what `_rows` hold; None: begin anew
        super().__init__(gallery_id, folder, read_only=True, seal_after=0)

    def newest(self) -> Snapshot:
        """What readers see, all that was acknowledged before the call included. Raises Busy and DamagedData."""
        if not self.is_newest():
            with self._writes.held():
                if not self.is_newest():
                    self._load()
        return self.snapshot

    def is_there(self) -> bool:
        """Whether the folder still holds the file that was opened."""
        try:
            return self.store.path.stat().st_ino == self._inode
        except OSError:
            return False

    def is_newest(self) -> bool:
        """Whether nothing was committed since the snapshot was taken."""
        return self.store.version() == self._version

    def _opened_store(self) -> Store:
        path = self.folder / STORE
        try:
            self._inode = path.stat().st_ino
        except OSError as error:
            raise DamagedData(f"{path} is missing; restore it from a copy") from error
        return Store(path, read_only=True, pinned=False)

    def _load(self) -> None:
        for _ in range(_ATTEMPTS):
            version = self.store.version()
            try:
                with closing(Store(self.folder / STORE, read_only=True)) as moment:
                    self._take(moment)
            except DamagedData:  # of a segment that the writer has replaced meanwhile
                self._taken = None
                if version == self.store.version():
                    raise
                continue
            self._version = version
            return
        raise Busy(f"gallery {self.id!r} changes faster than it can be followed; ask again")

    def _take(self, moment: Store) -> None:
        """Show what the store held at one moment, reading no more of it than is new."""
        header, sealed = moment.header, moment.segments()
        if self._taken is not None and tuple(sealed) == self._sealed:
            (generation, next_key), self._taken = self._taken, None
            rows = self._rows
            dead_R = moment.tombstones(since=generation)
        else:
            known = {} if self._taken is None else {one.digest: one for one in self._rows.segments}
            sums = Sums(self.folder / SUMS)
            segments = [
                known.get(one.digest)
                or open_segment(self.segments_folder, one.digest, decisive=self.store.embeddings, sums=sums)
                for one in sealed
            ]
            rows, next_key = LiveRows(segments, header.model.embedding_dim), sealed[-1].last_key + 1 if sealed else 0
            dead_R = moment.tombstones()
        rows.kill(dead_R)
        for keys_N, vectors_ND in moment.vectors(next_key):
            rows.append(keys_N, vectors_ND)
        if rows.snapshot(0).size != header.size:
            raise DamagedData(f"{moment.path} holds {header.size} items, and its segments others; have it verified")
        self.store.header = header
        self._adopt(rows, sealed, header.generation)
        self._taken = header.generation, header.next_key
