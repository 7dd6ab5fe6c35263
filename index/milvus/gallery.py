"""One gallery on Milvus; implements `index.engine.GalleryEngine`. See `index.milvus`."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np

from embedding.decision import UNIT_TOLERANCE, Judge, Vectors, checked_embedding
from embedding.errors import InvalidInput, ModelMismatch, NotSupported
from index.absent import no_item
from index.checks import checked_items
from index.deadline import Deadline
from index.engine import Effort, Filter, IndexSettings, Items, OnProgress, Problem, SegmentStats, Stats, Verification
from index.found import Answers, Found
from index.items import (
    MAX_K,
    MAX_MATCHES,
    MAX_PAGE,
    Item,
    ModelRef,
    Neighbors,
    check_count,
    check_item_name,
    name_of_page_token,
    page_token_after,
)
from index.milvus.filters import expression
from index.milvus.rows import WHOLE, Record
from index.milvus.search import Answer, Asking
from index.milvus.store import MilvusStore
from index.progress import Steps
from index.schema import as_datetime
from index.telling import Telling

_WIDEST_PAGE = 1_000


class MilvusGallery:
    """Exact whatever the effort: Milvus keeps vectors in a FLAT index, and searches it in all its nodes."""

    def __init__(self, store: MilvusStore) -> None:
        self._store = store

    @property
    def id(self) -> str:
        return self._store.record.id

    @property
    def model(self) -> ModelRef:
        return self._store.record.model

    @property
    def created(self) -> datetime:
        return as_datetime(self._store.record.created_us)

    @property
    def size(self) -> int:
        return self._store.record.size

    @property
    def generation(self) -> int:
        return self._store.record.generation

    @property
    def closed(self) -> bool:
        return self._store.closed

    def is_quick(self, *, k: int, effort: Effort | None = None) -> bool:
        """Never: Milvus is another machine, or may be."""
        return False

    def check_model(self, model: ModelRef) -> None:
        """Raises ModelMismatch unless this gallery holds embeddings of `model`."""
        if model.fingerprint != self.model.fingerprint:
            raise self._other_model(model.name)

    # Searching

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
        """The k nearest accepted items but those named in `exclude`, by rising (distance, name); exact."""
        check_count(k, MAX_K, field="k")
        self._check_judge(judge)
        query_D = checked_embedding(query_D, self.model.embedding_dim, field="query")
        with self._store.view() as record:
            asking = Asking(store=self._store, record=record, most=k, allowed=allowed, deadline=deadline)
            (answer,) = asking.answers(query_D[None], [frozenset(exclude)])
            return self._found(record, answer, judge, deadline)

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
        """`search` for each query, all at one generation; Milvus's own threads do the work."""
        check_count(k, MAX_K, field="k")
        self._check_judge(judge)
        width = self.model.embedding_dim
        checked = [checked_embedding(query, width, field=f"queries[{i}]") for i, query in enumerate(queries_QD)]
        if not checked:
            return Answers.of([], judge, self.generation)
        excluded = [frozenset(names) for names in exclude] if exclude else [frozenset[str]()] * len(checked)
        with self._store.view() as record:
            asking = Asking(store=self._store, record=record, most=k, allowed=allowed, deadline=deadline)
            answers = asking.answers(np.stack(checked), excluded)
            return self._all_found(record, answers, judge, deadline)

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
        """Every accepted item at the judge's threshold or nearer; the nearest `limit`, and `truncated`, when more."""
        check_count(limit, MAX_MATCHES, field="limit")
        self._check_judge(judge)
        query_D = checked_embedding(query_D, self.model.embedding_dim, field="query")
        with self._store.view() as record:
            asking = Asking(
                store=self._store,
                record=record,
                most=limit + 1,
                within=judge.threshold,
                allowed=allowed,
                deadline=deadline,
            )
            (answer,) = asking.answers(query_D[None], [frozenset(exclude)])
            kept = replace(answer, candidates=answer.candidates[:limit])
            found = self._found(record, kept, judge, deadline)
            return replace(found, truncated=len(answer.candidates) > limit)

    # Reading. All raise Busy when a part of the gallery cannot be reached.

    def get(self, name: str) -> Item:
        check_item_name(name)
        with self._store.view() as record:
            row = self._store.named(record, [name], WHOLE).get(name)
            if row is None:
                raise no_item(name, record.id)
            return record.item(row)

    def thumbnail(self, name: str) -> bytes | None:
        check_item_name(name)
        with self._store.view() as record:
            return self._store.thumbnail(record, name)

    def origins(self, names: Sequence[str]) -> Mapping[str, str]:
        with self._store.view() as record:
            return self._store.origins(record, names)

    def names(self) -> Collection[str]:
        return [item.name for item in self.iterate()]

    def list(
        self,
        *,
        page_size: int = 100,
        page_token: str = "",
        allowed: Filter | None = None,
        deadline: Deadline | None = None,
    ) -> tuple[Items, str]:
        check_count(page_size, MAX_PAGE, field="page_size")
        items: Items = []
        with closing(self._items(name_of_page_token(page_token), allowed, page_size + 1, deadline)) as accepted:
            for item in accepted:
                items.append(item)
                if len(items) > page_size:
                    return items[:page_size], page_token_after(items[page_size - 1].name)
        return items, ""

    def iterate(self, *, allowed: Filter | None = None) -> Iterator[Item]:
        return self._items("", allowed, _WIDEST_PAGE)

    def count(self, allowed: Filter, *, deadline: Deadline | None = None) -> int:
        asked = expression(allowed)
        with self._store.view() as record:
            self._store.whole(record, list, deadline)
            if asked.whole:
                return self._store.count(record, asked.text)
            return sum(map(len, self._store.accepted(record, allowed, WHOLE, deadline)))

    # Writing

    def upsert(self, items: Sequence[Item], *, allow_missing: bool = True) -> Items:
        if not items:
            return []
        vectors_ND, _ = checked_items(items, self.model.embedding_dim)
        return self._store.upsert(items, vectors_ND, allow_missing=allow_missing)

    def delete(
        self, names: Sequence[str], *, allow_missing: bool = False, etags: Mapping[str, str] | None = None
    ) -> int:
        for i, name in enumerate(names):
            check_item_name(name, field=f"names[{i}]")
        if not names:
            return 0
        return self._store.delete(names, allow_missing=allow_missing, etags=etags or {})

    def purge(self, allowed: Filter, *, deadline: Deadline | None = None) -> int:
        return self._store.purge(allowed, deadline)

    def configure(self, settings: IndexSettings) -> None:
        """Raises NotSupported for a structure that this engine does not have."""
        check_settings(settings)
        self._store.change_settings(settings)

    # Keeping

    def seal(self, *, on_progress: OnProgress | None = None) -> None:
        """Nothing: Milvus seals by itself."""
        self._store.check_open()

    def compact(self, *, on_progress: OnProgress | None = None) -> None:
        """Forget dead rows, and have Milvus give their space back in its own time."""
        self._store.check_open()
        self._store.tidy(everything=True)
        self._store.link.compact(self._store.record.collection)

    def reindex(self, settings: IndexSettings | None = None, *, on_progress: OnProgress | None = None) -> Stats:
        if settings is not None:
            check_settings(settings)
        self.compact(on_progress=on_progress)
        if settings is not None:
            self.configure(settings)
        return self.stats()

    def snapshot(self, folder: Path, *, on_progress: OnProgress | None = None) -> int:
        """Raises NotSupported: Milvus's own tools copy it."""
        self._store.check_open()
        raise NotSupported(
            f"gallery {self.id!r} lies in Milvus, of which no snapshot is made here; back up collection "
            f"{self._store.record.collection!r} and that of the records with Milvus's own backup tool"
        )

    def verify(self, *, repair: bool = False, on_progress: OnProgress | None = None) -> Verification:
        """Read every item and compare with the record; with `repair`, have the record say what is there."""
        wrong: list[str] = []
        seen = 0
        names: set[str] = set()
        twice: list[str] = []
        all_unit = True
        step = Steps(self.id, lambda: self.closed, on_progress)
        with self._store.view() as record:
            for rows in self._store.scan(record, "", WHOLE):
                step("comparing", seen, record.size)
                seen += len(rows)
                for row in rows:
                    if row["name"] in names:
                        twice.append(row["name"])
                    names.add(row["name"])
                if rows:
                    all_unit = all_unit and _are_unit(np.array([row["vector"] for row in rows], np.float32))
            if twice:
                wrong.append(f"{len(twice)} items are there twice, {twice[0]!r} among them")
            if not all_unit:
                wrong.append("there are vectors that are not of unit length")
            if seen != record.size:
                wrong.append(f"the record says {record.size} items and {seen} are there")
        repaired = repair and seen != record.size and len(wrong) == 1
        if repaired:
            self._store.correct_size()
        problems = [Problem(path=record.collection, what=what, repaired=repaired) for what in wrong]
        return Verification(items=seen, files=0, problems=problems)

    def stats(self) -> Stats:
        """Disk and memory are Milvus's, and not counted."""
        record, dead = self._store.record, self._store.dead()
        part = SegmentStats(
            name=record.collection,
            rows=record.size + dead,
            dead=dead,
            structure="exact",
            disk_bytes=0,
            memory_bytes=0,
        )
        return Stats(
            size=record.size,
            generation=record.generation,
            fresh=0,
            dead=dead,
            disk_bytes=0,
            memory_bytes=0,
            segments=[part],
            settings=record.settings,
        )

    def close(self) -> None:
        self._store.close()

    # Within

    def _items(
        self, after: str, allowed: Filter | None, size: int, deadline: Deadline | None = None
    ) -> Generator[Item]:
        asked = expression(allowed)
        with self._store.view() as record:
            for rows in self._store.by_name(record, after, asked, size):
                if deadline:
                    deadline.check()
                for row in rows:
                    item = record.item(row)
                    if asked.whole or (allowed is not None and allowed.accepts(item)):
                        yield item

    def _found(self, record: Record, answer: Answer, judge: Judge, deadline: Deadline | None) -> Found:
        (found,) = self._all_found(record, [answer], judge, deadline)
        return found

    def _all_found(self, record: Record, answers: Sequence[Answer], judge: Judge, deadline: Deadline | None) -> Answers:
        """With the items themselves, which are asked for once all answers are known."""
        wanted = {one.row["key"] for answer in answers for one in answer.candidates if "metadata" not in one.row}
        rows = {row["key"]: row for row in self._store.keyed(record, sorted(wanted), WHOLE, deadline)}
        found: list[Found] = []
        for answer in answers:
            kept = [one for one in answer.candidates if one.row["key"] in rows or "metadata" in one.row]
            items = [record.item(rows.get(one.row["key"], one.row)) for one in kept]
            decisions = judge.judge_all(np.array([one.distance for one in kept], np.float32))
            lost = len(kept) < len(answer.candidates)
            found.append(
                Found(
                    neighbors=Neighbors(items, decisions),
                    generation=record.generation,
                    partial=answer.partial or lost,
                )
            )
        return Answers.of(found, judge, record.generation)

    def _check_judge(self, judge: Judge) -> None:
        if judge.model != self.model.name:
            raise self._other_model(judge.model)

    def _other_model(self, name: str) -> ModelMismatch:
        return ModelMismatch(
            f"gallery {self.id!r} holds embeddings of {self.model.name}, which cannot be compared with those of "
            f"{name}; use that model, or build a new gallery"
        )


def check_settings(settings: IndexSettings) -> None:
    """Raises NotSupported for what this engine does not have, InvalidInput for a recall that none has."""
    if settings.structure not in {"auto", "exact"}:
        raise NotSupported(
            f"galleries on Milvus are searched exactly; structure {settings.structure!r} is one of the embedded "
            "engine: ask for auto or exact",
            field="index.structure",
        )
    if settings.vectors != "float32":
        raise NotSupported(
            f"galleries on Milvus keep float32 vectors; {settings.vectors} is of the embedded engine: ask for float32",
            field="index.vectors",
        )
    if not 0 < settings.min_recall <= 1:
        raise InvalidInput(f"min_recall must lie in (0, 1]; got {settings.min_recall}", field="index.min_recall")


def _are_unit(vectors_ND: Vectors) -> bool:
    lengths_N = np.linalg.norm(vectors_ND.astype(np.float64), axis=1)
    return bool((np.abs(lengths_N - 1) <= UNIT_TOLERANCE).all())
