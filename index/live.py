"""A gallery that is written to: the store, what readers see of it, and the sealing that goes on behind.

Readers take one reference to an immutable snapshot and never wait. Writers queue, are committed in groups, and then
the next snapshot is published. Fresh rows live in memory; past a number
of them a background thread seals them into a segment, merging it with those of like size, and publishes that.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

from embedding.errors import Busy, DamagedData, NotFound, StorageFailed
from embedding.runtime import trim_malloc
from index.deadline import Deadline
from index.engine import IndexSettings, OnProgress, Precision
from index.group_commit import WriteQueue
from index.planner import CROSSOVER, plan_segment
from index.progress import LOOK_SECONDS, Steps
from index.reading import SealedRange
from index.receipts import Token
from index.retry import Retry
from index.rows import LiveRows
from index.sealing import is_dying, living_rows, merge_from, moved_most, told
from index.segments import Blocks, Planned, Segment, open_segment, remove_segments, segment_path, write_segment
from index.shown import Shown
from index.snapshot import Part, Snapshot
from index.store import Delete, Outcome, Purge, Store, Upsert, Write, Written
from index.structures import Plan
from index.sums import Sums
from index.threads import step_back

SEAL_AFTER = 4096
"""Fresh rows that are worth a new segment."""

STORE = "store.sqlite"
SEGMENTS = "segments"
SUMS = "sums.json"

_log = logging.getLogger(__name__)


class Live:
    """The state of one gallery in its folder; every method may be called from any thread."""

    def __init__(
        self, gallery_id: str, folder: Path, *, read_only: bool, seal_after: int, followed: bool = False
    ) -> None:
        self.id = gallery_id
        self.folder = folder
        self.read_only = read_only
        self.closed = False
        self.busy = ""
        self.last_failure = ""
        self.found_at_opening: list[tuple[str, str]] = []
        """Segments, by path, whose vectors were taken from the store instead, and why; `verify` tells."""
        self.seals = 0
        self.compactions = 0
        self._failed_at = 0
        self._retry = Retry(self._seal_again)
        self._seal_after = seal_after
        self._writes = WriteQueue()
        self._sealing = threading.RLock()  # taken before the lock of `_writes`
        self._sealer: threading.Thread | None = None
        self._settling = threading.Lock()  # for `settings`, which readers change too; taken after that of `_writes`
        self.snapshot: Snapshot
        """What readers see: one reference, replaced as a whole."""
        self._shown = Shown(followed=followed)
        self.store = self._opened_store()
        try:
            self.settings = _settings(self.store)
            self._load()
        except BaseException:
            self.closed = True
            self._retry.stop()
            self.store.close()
            raise

    @property
    def segments_folder(self) -> Path:
        return self.folder / SEGMENTS

    def newest(self) -> Snapshot:
        """What readers see, all that was acknowledged before the call included."""
        return self.snapshot

    def is_there(self) -> bool:
        """Whether the folder holds this gallery; only another process could change that."""
        return True

    def is_newest(self) -> bool:
        """Whether `newest` returns at once."""
        return True

    # Writing

    def write(self, write: Write, deadline: Deadline | None = None) -> Written:
        """Carry out a write, durably, together with those of other threads; readers see it when this returns.

        Raises what refused it, or what the deadline raises where it passes before the write's turn comes.
        """
        self._check_writable()
        return self._writes.carry_out(write, self._committed, deadline)

    def note_margin(self, margin: float) -> None:
        """Tune the recall of matches at this distance from the next segment on, unless one is set already."""
        if self.settings.margin is None:
            with self._settling:
                if self.settings.margin is None:
                    self.settings = replace(self.settings, margin=margin)

    def change_settings(self, settings: IndexSettings, token: Token | None = None) -> None:
        with self.write_lock():
            settings = self._kept(settings)
            self.store.record_settings(json.dumps(asdict(settings)), token)
            with self._settling:
                self.settings = settings

    def _kept(self, settings: IndexSettings) -> IndexSettings:
        """These, with what nobody chooses as it is where they do not say."""
        return replace(
            settings,
            margin=self.settings.margin if settings.margin is None else settings.margin,
            taken_over=settings.taken_over or self.settings.taken_over,
        )

    @contextmanager
    def write_lock(self) -> Iterator[None]:
        """No write is committed within. Raises NotFound once closed."""
        self._check_writable()
        with self._writes.held():
            self._check_open()
            yield

    @contextmanager
    def pause(self) -> Iterator[Snapshot]:
        """What readers see, while no write is committed."""
        with self._writes.held():
            self._check_open()
            yield self.snapshot

    @contextmanager
    def still(self, step: Steps) -> Iterator[None]:
        """No segment is written or removed within; while it waits for that, `step` may break off."""
        while not self._sealing.acquire(timeout=LOOK_SECONDS):
            step("waiting", 0, 0)
        try:
            step("beginning", 0, 0)
            yield
        finally:
            self._sealing.release()

    def steps(self, on_progress: OnProgress | None) -> Steps:
        """Tells how far work on this gallery is, and ends it when the gallery closes."""
        return Steps(self.id, lambda: self.closed, on_progress)

    # Sealing

    def seal(
        self,
        *,
        everything: bool = False,
        anew: bool = False,
        settings: IndexSettings | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Write fresh rows into a segment, merged with those of like size or with `everything`.

        With `anew` even where there is nothing to merge. Writers wait for the last step alone. It is done as `settings`
        say when given, which are stored in the same step, unless others were stored meanwhile.
        """
        self._check_writable()
        step = self.steps(on_progress)
        with self.still(step):
            with self.write_lock():
                since, sealed = self.snapshot, list(self._sealed)
                last_key = self.store.header.next_key - 1
                start = 0 if everything else merge_from(since, self._seal_after)
                first_key = sealed[start - 1].last_key + 1 if start else 0
                before = self.settings
                # To the end: whether rows are read again depends on them.
                settings = self._kept(settings) if settings is not None else before
                precise = self._read_again(since.parts[start:], first_key, last_key, settings)
            nothing_new = not len(since.fresh.keys_N) and start == len(sealed)
            whole = everything and len(sealed) == 1 and not since.unsealed
            if (nothing_new or whole) and not (anew and sealed):
                if settings != before:
                    self.change_settings(settings)
                self._note_success()
                return
            merges = start < len(sealed)
            self.busy = "compacting" if merges else "sealing"
            try:
                segments = list(self._rows.segments[:start])
                ranges = sealed[:start]
                merged = since.parts[start:]
                if sum(part.size for part in merged):
                    rows = living_rows(merged, step) if precise is None else told(precise, since.size, step)
                    segment = self._write_segment(rows, since.generation, settings, step, moved=moved_most(merged))
                    segments.append(segment)
                    ranges.append(
                        SealedRange(
                            digest=segment.digest,
                            first_key=first_key,
                            last_key=last_key,
                            generation=since.generation,
                        )
                    )
                with self.write_lock():
                    live = self._rows.resealed(segments, since=since)
                    if settings != before and self.settings == self._kept(before):
                        chosen = self._kept(settings)
                        self.store.record_segments(ranges, json.dumps(asdict(chosen)))
                        with self._settling:
                            self.settings = chosen
                    else:
                        self.store.record_segments(ranges)
                    self._adopt(live, ranges, self.snapshot.generation)
            except OSError as error:
                raise StorageFailed(f"gallery {self.id!r} cannot be sealed: {error.strerror or error}") from error
            finally:
                self.busy = ""
            remove_segments(self.segments_folder, except_for=[one.digest for one in ranges])
            self._sums.keep()
            self._note_success()
            self.compactions += merges
            self.seals += not merges
            del since, merged  # which hold what has just been replaced
            if everything:
                self._give_back()

    def rebuild(self, *, on_progress: OnProgress | None = None) -> None:
        """Write all segments anew from the store, a block at a time; writers wait for the first and the last step.

        First without a structure, which takes no longer than reading the store, so that what is damaged answers no
        longer than that.
        """
        step = self.steps(on_progress)
        with self.still(step):
            with self.write_lock():
                generation, size = self.snapshot.generation, self.snapshot.size
                last_key = self.store.header.next_key - 1
                blocks = self.store.vectors(0, last_key)
                first = next(blocks, None)  # from here on what it reads is of this generation
            ranges: list[SealedRange] = []
            segments: list[Segment] = []
            self.busy = "rebuilding"
            try:
                if first is not None:
                    rows = told(chain([first], blocks), size, step)
                    segments = [self._write(rows, generation, lambda vectors_ND, path: Plan(), self.settings.vectors)]
                    ranges = [
                        SealedRange(digest=segments[0].digest, first_key=0, last_key=last_key, generation=generation)
                    ]
                with self.write_lock():
                    self.store.record_segments(ranges)
                    self._adopt(self._loaded(segments, ranges), ranges, self.snapshot.generation)
            except OSError as error:
                raise StorageFailed(f"gallery {self.id!r} cannot be rebuilt: {error.strerror or error}") from error
            finally:
                self.busy = ""
            self.seal(everything=True, anew=True, on_progress=on_progress)
            remove_segments(self.segments_folder, except_for=[one.digest for one in self._sealed])

    def close(self) -> None:
        """Refuse new writes, let running ones end, break off sealing, and close the files."""
        with self._writes.held():
            self.closed = True
            self._retry.stop()
        with self._sealing, self._writes.held():
            self.store.close()

    # Within

    def _give_back(self) -> None:
        """Return what writing since the last compaction has left in caches and allocators."""
        with self._writes.held():
            if not self.closed:
                self.store.shrink()
        trim_malloc()

    def _opened_store(self) -> Store:
        return Store(self.folder / STORE, read_only=self.read_only)

    def _load(self) -> None:
        """Show what the store holds, taking vectors from segments where these are sound."""
        self._sums = Sums(self.folder / SUMS)
        sealed = self.store.segments()
        segments: list[Segment] = []
        try:
            segments.extend(self._open(one.digest) for one in sealed)
        except DamagedData as error:
            # Those that follow are smaller: they are written anew with it, which keeps keys in order.
            _log.warning("gallery %r: %s; taking its vectors from the store instead", self.id, error)
            path = segment_path(self.segments_folder, sealed[len(segments)].digest)
            self.found_at_opening.append((str(path.relative_to(self.folder)), str(error)))
        rows = self._loaded(segments, sealed[: len(segments)])
        if segments and rows.snapshot(0).size != self.store.header.size:
            _log.warning("gallery %r: its segments lack items; taking all vectors from the store instead", self.id)
            self.found_at_opening.append((SEGMENTS, "items are missing"))
            segments = []
            rows = self._loaded([], [])
        if rows.snapshot(0).size != self.store.header.size:
            raise DamagedData(
                f"{self.store.path} says that it holds {self.store.header.size} items and holds "
                f"{rows.snapshot(0).size}; restore it from a copy"
            )
        self._adopt(rows, sealed[: len(segments)], self.store.header.generation)
        if self.read_only:
            return
        if len(segments) == len(sealed):
            remove_segments(self.segments_folder, except_for=[one.digest for one in sealed])
        elif self.snapshot.fresh.size < CROSSOVER:
            self._seal_or_warn()
        self._sums.keep()
        self._seal_behind()

    def _loaded(self, segments: Sequence[Segment], sealed: Sequence[SealedRange]) -> LiveRows:
        rows = LiveRows(segments, self.store.header.model.embedding_dim)
        rows.kill(self.store.tombstones())
        for keys_N, vectors_ND in self.store.vectors(sealed[-1].last_key + 1 if sealed else 0):
            rows.append(keys_N, vectors_ND)
        return rows

    def _adopt(self, rows: LiveRows, sealed: Sequence[SealedRange], generation: int) -> None:
        self._rows = rows
        self._sealed = tuple(sealed)
        self._show(rows.snapshot(generation))

    def _show(self, snapshot: Snapshot) -> None:
        self._shown.add(snapshot, replaced=getattr(self, "snapshot", None))
        self.snapshot = snapshot

    def _committed(self, writes: Sequence[Write]) -> list[Outcome]:
        """Commit these and publish what readers see then; the caller holds the write lock."""
        self._check_open()
        born = sum(len(write.items) for write in writes if isinstance(write, Upsert))
        self._rows.reserve(born, deaths=sum(self._most_deaths(write) for write in writes))
        outcomes = self.store.write(writes, oldest_read=self._shown.oldest())
        for write, outcome in zip(writes, outcomes, strict=True):
            if isinstance(outcome, Written) and not outcome.repeated:
                if isinstance(write, Upsert):
                    self._rows.append(outcome.born_N, write.vectors_ND)
                self._rows.kill(outcome.died_R)
        self._show(self._rows.snapshot(self.store.header.generation))
        self._seal_behind()
        return outcomes

    def _most_deaths(self, write: Write) -> int:
        match write:
            case Upsert():
                return len(write.items)
            case Delete():
                return len(write.names)
            case Purge():
                return self.snapshot.size

    def _seal_behind(self) -> None:
        """Seal in the background where there is enough to seal; the caller holds the write lock, or is alone."""
        snapshot = self.snapshot
        enough = len(snapshot.fresh.keys_N) >= self._seal_at() or (
            not self.last_failure and any(is_dying(part, self._seal_after) for part in snapshot.parts[:-1])
        )
        if enough and (self._sealer is None or not self._sealer.is_alive()):
            self._sealer = threading.Thread(target=self._seal_quietly, name=f"seal-{self.id}")
            self._sealer.start()

    def _seal_at(self) -> int:
        return self._seal_after if not self.last_failure else self._failed_at + self._seal_after

    def _seal_quietly(self) -> None:
        step_back()
        self._seal_or_warn()

    def _seal_or_warn(self) -> None:
        """Seal where nobody waits for the outcome: without a segment the gallery answers as well, from memory."""
        try:
            self.seal()
        except NotFound:
            pass  # closed meanwhile: the next opening finds all vectors in the store
        except (DamagedData, StorageFailed, Busy) as error:
            self._note_failure(str(error))
            _log.warning("gallery %r stays unsealed for now: %s", self.id, error)
        except Exception as error:  # MemoryError among them
            self._note_failure(repr(error))  # or the next write would begin it again, and each after that
            _log.exception("gallery %r stays unsealed for now", self.id)

    def _note_failure(self, why: str) -> None:
        """Tell it, and try again later: there may be room by then, and nobody who writes."""
        with self._writes.held():
            self._failed_at = len(self.snapshot.fresh.keys_N)
            self.last_failure = why
            if not self.closed:
                self._retry.later()

    def _note_success(self) -> None:
        if self.last_failure:
            with self._writes.held():
                self.last_failure = ""
                self._retry.reset()

    def _seal_again(self) -> None:
        if self.last_failure:
            self._seal_quietly()

    def _read_again(
        self, parts: Sequence[Part], first_key: int, last_key: int, settings: IndexSettings
    ) -> Blocks | None:
        """The rows of these parts from the store, of this generation, where they are kept rounded and are not to be.

        The caller holds the write lock.
        """
        if settings.vectors == "float16" or not any(part.halves for part in parts):
            return None
        blocks = self.store.vectors(first_key, last_key)
        first = next(blocks, None)  # from here on what it reads is of this generation
        return chain([first], blocks) if first is not None else []

    def _write_segment(
        self, rows: Blocks, generation: int, settings: IndexSettings, step: Steps, *, moved: float
    ) -> Segment:
        return self._write(
            rows,
            generation,
            lambda vectors_ND, path: plan_segment(
                vectors_ND, path, settings=settings, margin=settings.margin, step=step
            ),
            settings.vectors,
            moved,
        )

    def _write(
        self, rows: Blocks, generation: int, planned: Planned, vectors: Precision, moved: float = 0.0
    ) -> Segment:
        digest = write_segment(
            self.segments_folder,
            rows,
            gallery=self.store.header.uid,
            model_fingerprint=self.store.header.model.fingerprint,
            generation=generation,
            planned=planned,
            vectors=vectors,
            moved=moved,
        )
        return self._open(digest)

    def _open(self, digest: str) -> Segment:
        return open_segment(self.segments_folder, digest, decisive=self.store.embeddings, sums=self._sums)

    def _check_writable(self) -> None:
        if self.read_only:
            raise StorageFailed(f"gallery {self.id!r} is open read-only; open its folder for writing")

    def _check_open(self) -> None:
        if self.closed:
            raise NotFound(f"gallery {self.id!r} has been deleted or closed")


def _settings(store: Store) -> IndexSettings:
    try:
        return IndexSettings(**json.loads(store.header.settings))
    except (ValueError, TypeError) as error:
        raise DamagedData(f"{store.path} holds index settings that cannot be read; restore it from a copy") from error
