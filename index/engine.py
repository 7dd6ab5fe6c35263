"""What every gallery engine can do: the one interface that the embedded engine and others implement.

`Gallery` is the embedded implementation; a set of galleries is `index.engine_catalog`. Callers (service, command line,
batch jobs) name these protocols alone. One contract suite, tests/index/contract.py, runs over every implementation.

Promised by every engine:
- A write that has returned is durable, and every search begun afterwards shows it.
- An answer is that of one generation between the call's start and its end.
- Distances are those of `embedding.decision.distances` on the stored vectors, bit for bit; neighbours are sorted by
  (distance, name), ties included, so that equal questions at one generation have equal answers.
- Every method may be called from any thread. Searches never wait for writers.

Shapes: Q queries, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from embedding.decision import Judge, Vectors
from index.deadline import Deadline
from index.found import Answers, Found
from index.items import MAX_MATCHES, Item, ModelRef
from index.receipts import Receipt, Token
from index.telling import Telling

# What is asked


@dataclass(frozen=True, slots=True)
class Exact:
    """Measure every item that may be found: recall is 1."""


@dataclass(frozen=True, slots=True)
class Recall:
    """As fast as the measured curve allows at this recall or more; exact where the curve does not reach it."""

    at_least: float
    """Share of the true answer, in (0, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Raw:
    """Parameters of the structures themselves; a structure ignores those that it does not have."""

    nprobe: int | None = None
    """IVF: lists visited."""
    ef_search: int | None = None
    """HNSW: width of the candidate list."""
    rescore: int | None = None
    """Candidates measured again for each result wanted."""


Effort: TypeAlias = Exact | Recall | Raw
"""None, wherever an effort is asked for, is `Recall` at the gallery's own `min_recall`."""


class Filter(Protocol):
    """A condition on items. `index.filters` parses them from text; immutable, and safe to use from any thread."""

    @property
    def text(self) -> str:
        """The condition in canonical form: equal texts are equal conditions, so that engines may cache by it."""

    @property
    def newer_than(self) -> int:
        """A generation that all accepted items were written after, 0 where it does not say so; engines look no further
        back."""

    def sql(self) -> tuple[str, Sequence[str | int | float | None]]:
        """An SQLite condition and its parameters ("?").

        Over these columns, by their bare names: `name` TEXT, `identity` TEXT or NULL, `metadata` TEXT (a JSON object),
        `generation` INTEGER, `updated_us` INTEGER (microseconds since 1970, UTC).
        """

    def accepts(self, item: Item) -> bool:
        """The same condition on one item, for engines without SQL and as the oracle of tests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a long operation is."""

    stage: str
    """What is being done, for a person: "training", "adding", "copying", …"""
    done: int
    total: int


OnProgress: TypeAlias = Callable[[Progress], None]
"""Called from the working thread, not more often than ten times a second; what it raises ends the operation."""

Precision: TypeAlias = Literal["float32", "float16"]

Structure: TypeAlias = Literal["auto", "exact", "hnsw", "ivf-flat", "ivf-sq8", "ivf-pq"]

Fallback: TypeAlias = Literal["", "few-rows", "odd-width", "sealed-before"]
"""Why a sealed part has another structure than the one asked for by name; "" where it has that, or "auto" chose."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexSettings:
    """How a gallery is to be indexed; stored with it."""

    min_recall: float = 0.99
    """What searches reach unless they ask otherwise, of the 10 nearest and of the matches at the margin; (0, 1]."""
    structure: Structure = "auto"
    """"auto" chooses by number, width and memory."""
    margin: float | None = None
    """Distance that the recall of matches is tuned at; None takes the learned margin that searches judge with."""
    memory_bytes: int | None = None
    """Most that structures may take in memory, besides mapped vectors; None for no bound."""
    vectors: Precision = "float32"
    """What sealed vectors are kept in beside the store. "float16" takes half the memory; decisions are the same, and
    each search reads its candidates from the store."""
    taken_over: str = ""
    """Of what a migration writes to: the old gallery's settings that it has taken over, as the migration notes them; ""
    keeps the note that there is."""


# What is answered, beside `index.found`


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """One measured setting of a structure, on queries of the gallery that it was not trained on."""

    k: int
    """How many nearest `recall` is of."""
    effort: Raw
    recall: float
    match_recall: float
    """Of all items within the margin that the index was tuned at; 1 where there were none."""
    microseconds: float
    """Median of one query in one thread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentStats:
    """One sealed part of a gallery."""

    name: str
    rows: int
    dead: int
    """Rows whose item has since been deleted or overwritten."""
    structure: Structure
    """Never "auto"."""
    fallback: Fallback = ""
    disk_bytes: int
    memory_bytes: int
    """What its structure takes in memory; vectors are mapped and not counted."""
    curve: Sequence[CurvePoint] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """A gallery in numbers, at one moment."""

    size: int
    generation: int
    fresh: int
    """Items not sealed yet: searched exactly."""
    dead: int
    disk_bytes: int
    memory_bytes: int
    segments: Sequence[SegmentStats] = ()
    settings: IndexSettings = field(default_factory=IndexSettings)
    busy: str = ""
    """What happens in the background: "sealing", "compacting", …; "" for nothing."""
    wal_bytes: int = 0
    """The part of `disk_bytes` that is the store's write-ahead log."""
    seals: int = 0
    """Segments written of fresh items alone, since the gallery was opened."""
    compactions: int = 0
    """Segments written that took in older ones, since the gallery was opened."""
    last_failure: str = ""
    """Why background work last failed, until it succeeds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Something that does not agree."""

    path: str
    """Below the gallery's folder; in Milvus, the collection."""
    what: str
    repaired: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What `verify` found."""

    items: int
    files: int
    problems: Sequence[Problem] = ()

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong now."""
        return all(problem.repaired for problem in self.problems)


Items: TypeAlias = list[Item]


class GalleryEngine(Protocol):
    """One gallery.

    All methods raise NotFound once it is closed or deleted, DamagedData when what is stored cannot be read,
    StorageFailed when the disk refuses, Busy when another process is in the way.
    """

    @property
    def id(self) -> str: ...
    @property
    def model(self) -> ModelRef: ...
    @property
    def created(self) -> datetime: ...
    @property
    def size(self) -> int:
        """Items in the gallery."""

    @property
    def generation(self) -> int:
        """Counts writes; a search begun now answers from this generation or a later one."""

    @property
    def closed(self) -> bool: ...

    def check_model(self, model: ModelRef) -> None:
        """Raises ModelMismatch unless this gallery holds embeddings of `model`."""

    def is_quick(self, *, k: int, effort: Effort | None = None) -> bool:
        """Whether a search without a filter takes well under a millisecond and waits for no other machine."""

    # Searching. All raise InvalidInput, InvalidVector, ModelMismatch, Cancelled, DeadlineExceeded, and ResponseTooLarge
    # where `telling` bounds what is read of items; it may be ignored by an engine that bounds it otherwise.

    def search(
        self,
        query_D: Vectors,
        *,
        k: int,
        judge: Judge,
        effort: Effort | None = None,
        allowed: Filter | None = None,
        exclude: Collection[str] = (),
        deadline: Deadline | None = None,
        telling: Telling | None = None,
    ) -> Found:
        """The k nearest items that `allowed` accepts, but those named in `exclude`; all when there are fewer."""

    def search_batch(
        self,
        queries_QD: Vectors,
        *,
        k: int,
        judge: Judge,
        effort: Effort | None = None,
        allowed: Filter | None = None,
        exclude: Sequence[Collection[str]] | None = None,
        deadline: Deadline | None = None,
        threads: int | None = None,
        telling: Telling | None = None,
    ) -> Answers:
        """`search` for each query, all at one generation, by `threads` threads, None for one a core.

        `exclude`, when given, has the names to leave out for each query.
        """

    def matches(
        self,
        query_D: Vectors,
        *,
        judge: Judge,
        limit: int = MAX_MATCHES,
        effort: Effort | None = None,
        allowed: Filter | None = None,
        exclude: Collection[str] = (),
        deadline: Deadline | None = None,
        telling: Telling | None = None,
    ) -> Found:
        """All items at the judge's threshold or nearer; the nearest `limit` of them, and `truncated`, when more.

        Without an effort the answer is exact: complete, whatever the structure. With one, candidates are widened until
        one lies beyond the threshold, and `expected_recall` tells what was measured.
        """

    # Reading

    def get(self, name: str) -> Item:
        """The item of this name. Raises NotFound."""

    def thumbnail(self, name: str) -> bytes | None:
        """The stored thumbnail of an item, None when it has none. Raises NotFound."""

    def origins(self, names: Sequence[str]) -> Mapping[str, str]:
        """The origins, by name, of those of these items that were written with one."""

    def names(self) -> Collection[str]:
        """Of all items, at one generation."""

    def list(
        self,
        *,
        page_size: int = 100,
        page_token: str = "",
        allowed: Filter | None = None,
        deadline: Deadline | None = None,
    ) -> tuple[Items, str]:
        """One page of the accepted items by rising name, and the token of the next page, "" after the last."""

    def iterate(self, *, allowed: Filter | None = None) -> Iterator[Item]:
        """Every accepted item by rising name, all of one generation."""

    def count(self, allowed: Filter, *, deadline: Deadline | None = None) -> int:
        """How many items are accepted."""

    # Writing: all or nothing, durable when it returns.

    def upsert(self, items: Sequence[Item], *, allow_missing: bool = True) -> Items:
        """Insert or overwrite items and return them as stored.

        Raises InvalidInput naming the item that cannot be stored, StaleEtag, and NotFound for an unknown one unless
        `allow_missing`.
        """

    def delete(
        self, names: Sequence[str], *, allow_missing: bool = False, etags: Mapping[str, str] | None = None
    ) -> int:
        """Delete named items and return how many there were.

        Raises NotFound for an unknown one unless `allow_missing`, and StaleEtag where `etags` names another version.
        """

    def purge(self, allowed: Filter, *, deadline: Deadline | None = None) -> int:
        """Delete every item that `allowed` accepts, in one write, and return how many there were."""

    def configure(self, settings: IndexSettings) -> None:
        """Store how the gallery is to be indexed; it holds from the next sealing on."""

    # Keeping. These may take long, and run beside searches and writes.

    def seal(self, *, on_progress: OnProgress | None = None) -> None:
        """Move fresh items into an immutable, indexed segment; done in the background by itself."""

    def compact(self, *, on_progress: OnProgress | None = None) -> None:
        """Merge all into one segment without dead rows, and give disk and memory back."""

    def reindex(self, settings: IndexSettings | None = None, *, on_progress: OnProgress | None = None) -> Stats:
        """Compact and tune anew, whatever there was, as `settings` say when given.

        These are stored with what came of it: work that is broken off leaves the settings that were. So do settings
        that are stored meanwhile, which hold from the next sealing on.
        """

    def snapshot(self, folder: Path, *, on_progress: OnProgress | None = None) -> int:
        """Write a whole copy of one generation into a new folder and return the generation.

        Raises AlreadyExists when there is something at `folder`.
        """

    def verify(self, *, repair: bool = False, on_progress: OnProgress | None = None) -> Verification:
        """Check every sum and every item; with `repair`, rebuild what can be rebuilt from the store."""

    def stats(self) -> Stats: ...

    def close(self) -> None:
        """Refuse new calls, let running ones end, free what is held."""


class Receipting(GalleryEngine, Protocol):
    """A gallery that keeps receipts of requests in the same step as what these wrote."""

    def answered(self, token: Token) -> bytes | None:
        """What a request that wrote to this gallery was answered, None when it has not. Raises RequestIdReused."""

    def upsert(self, items: Sequence[Item], *, allow_missing: bool = True, receipt: Receipt | None = None) -> Items:
        """As `GalleryEngine.upsert`; a write whose receipt says that it had been done before returns no items."""

    def delete(
        self,
        names: Sequence[str],
        *,
        allow_missing: bool = False,
        etags: Mapping[str, str] | None = None,
        receipt: Receipt | None = None,
    ) -> int: ...

    def purge(self, allowed: Filter, *, deadline: Deadline | None = None, receipt: Receipt | None = None) -> int: ...

    def configure(self, settings: IndexSettings, *, token: Token | None = None) -> None:
        """As `GalleryEngine.configure`; an empty answer is kept under `token`."""
