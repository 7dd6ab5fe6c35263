"""The engine in this process, with the face of the client.

Answers pass through the messages of the wire contract, so that they are what a server would have sent.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import Message

from embedding import decision as engine_decision
from embedding.bundle import Bundle, learned_by_loss
from embedding.errors import DamagedData, InvalidInput, LookalikeError, NotFound, StorageFailed
from index import MAX_MATCHES, Catalog
from index import engine as engine_interface
from index.aliases import Aliases
from index.catalog import HeldFolder
from index.engine import OnProgress
from index.filters import parse_filter
from lookalike import _messages as messages
from lookalike.types import (
    Alias,
    Decision,
    Effort,
    EmbeddingOf,
    Gallery,
    ImageLike,
    IndexSettings,
    Item,
    ItemName,
    Model,
    Neighbors,
    NewItem,
    OperatingPoint,
    Operation,
    Purged,
    Snapshot,
    Verification,
)
from service import errors, operations, upkeep
from service.engine import Engine
from service.messages import parse, wire
from service.questions import Scope, Search, SearchBatch, SearchMatches, Verify
from service.rollout.stock import Model as Available
from service.sources import EncodedImage, GivenEmbedding, Source, StoredItem
from service.writes import Draft, PurgeItems, UpdateGallery, UpdateItems


class LocalBackend:
    """Answers from an engine what the client would ask a server."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._operations = operations.Operations()

    @classmethod
    @contextmanager
    def open(
        cls, bundle: Path, galleries: Path, *, read_only: bool, device: str, thumbnails: int = 0
    ) -> Iterator[LocalBackend]:
        """Load a bundle and open its galleries; to read, the folder of galleries need not exist."""
        with tempfile.TemporaryDirectory() as empty:
            folder = Path(empty) if read_only and not galleries.exists() else galleries
            with Engine.open(bundle, folder, read_only=read_only, device=device, thumbnails=thumbnails) as engine:
                backend = cls(engine)
                try:
                    yield backend
                except NotFound as error:
                    if galleries.exists():
                        raise
                    what = str(error).partition(";")[0]
                    raise NotFound(f"{what}: there is no folder of galleries at {galleries}; check --data") from error
                finally:
                    backend._operations.close()

    @property
    def engine(self) -> Engine:
        return self._engine

    def verify(self, a: ImageLike, b: ImageLike, *, operating_point: OperatingPoint | None = None) -> Decision:
        decided = self._engine.ask(Verify(a=_source(a, "a"), b=_source(b, "b"), point=engine_point(operating_point)))
        return messages.decision(wire.decision(decided))

    def search(
        self,
        gallery: str,
        query: ImageLike,
        *,
        k: int = 10,
        operating_point: OperatingPoint | None = None,
        filter: str = "",
        effort: Effort | None = None,
    ) -> Neighbors:
        scope = _scope(gallery, operating_point, filter, effort)
        found = self._engine.ask(Search(scope=scope, query=_source(query, "query"), k=k))
        return messages.neighbors(wire.search_response(found, self._id(gallery)))

    def search_matches(
        self,
        gallery: str,
        query: ImageLike,
        *,
        operating_point: OperatingPoint | None = None,
        limit: int = MAX_MATCHES,
        filter: str = "",
        effort: Effort | None = None,
    ) -> Neighbors:
        scope = _scope(gallery, operating_point, filter, effort)
        found = self._engine.ask(SearchMatches(scope=scope, query=_source(query, "query"), limit=limit))
        neighbors = messages.neighbors(wire.search_response(found, self._id(gallery)))
        neighbors.truncated = found.truncated
        return neighbors

    def search_batch(
        self,
        gallery: str,
        queries: Iterable[ImageLike],
        *,
        k: int = 10,
        operating_point: OperatingPoint | None = None,
        filter: str = "",
        effort: Effort | None = None,
    ) -> Sequence[Neighbors | LookalikeError]:
        sources = [_source(query) for query in queries]
        scope = _scope(gallery, operating_point, filter, effort)
        outcomes = self._engine.ask(SearchBatch(scope=scope, queries=sources, k=k))
        return [
            outcome
            if isinstance(outcome, LookalikeError)
            else messages.neighbors(wire.found_neighbors(outcome, self._id(gallery)))
            for outcome in outcomes
        ]

    def create_gallery(self, gallery: str, *, index: IndexSettings | None = None) -> Gallery:
        return messages.gallery(wire.gallery(self._engine.create_gallery(gallery, _settings(index))))

    def get_gallery(self, gallery: str) -> Gallery:
        try:
            found = self._engine.gallery(gallery, any_model=True)
            return messages.gallery(wire.gallery(found, with_stats=True))
        except DamagedData as error:
            return messages.gallery(wire.damaged_gallery(gallery, error))

    def list_galleries(self) -> Iterator[Gallery]:
        """Every gallery, by name, damaged ones included."""
        return map(messages.gallery, wire.galleries(self._engine.names.catalog))

    def update_gallery(self, gallery: str, index: IndexSettings, *, etag: str = "") -> Gallery:
        change = UpdateGallery(
            gallery=gallery,
            settings=parse.index_settings(messages.index_settings(index), "index"),
            parts=parse.INDEX_FIELDS,
            etag=etag,
        )
        return messages.gallery(wire.gallery(change.write(self._engine), with_stats=True))

    def delete_gallery(self, gallery: str, *, force: bool = False) -> None:
        self._engine.names.delete_gallery(gallery, force=force)

    def get_item(self, name: ItemName) -> Item:
        found = self._engine.gallery(name.gallery, any_model=True)
        return messages.item(wire.item_fields(found.get(name.id), found.id, parse.ITEM_FIELDS))

    def list_items(self, gallery: str, *, filter: str = "", embedding: bool = False) -> Iterator[Item]:
        """The accepted items of a gallery, by name."""
        found = self._engine.gallery(gallery, any_model=True)
        fields = parse.ITEM_FIELDS if embedding else parse.ITEM_FIELDS - {"embedding"}
        for item in found.iterate(allowed=parse_filter(filter)):
            yield messages.item(wire.item_fields(item, found.id, fields))

    def update_items(
        self, gallery: str, items: Iterable[NewItem], *, allow_missing: bool = True
    ) -> Sequence[Item | LookalikeError]:
        drafts = [
            Draft(
                name=item.id,
                image=None if item.image is None else _source(item.image),
                identity=item.identity,
                metadata=item.metadata,
                etag=item.etag,
            )
            for item in items
        ]
        outcomes = self._engine.ask(UpdateItems(gallery=gallery, drafts=drafts, allow_missing=allow_missing))
        return [
            outcome if isinstance(outcome, LookalikeError) else messages.item(wire.item(outcome, self._id(gallery)))
            for outcome in outcomes
        ]

    def delete_items(self, gallery: str, ids: Iterable[str], *, allow_missing: bool = False) -> int:
        with self._engine.written(gallery, any_model=True) as found:
            return found.delete(list(ids), allow_missing=allow_missing)

    def purge_items(self, gallery: str, filter: str, *, force: bool = False) -> Purged:
        purge = PurgeItems(gallery=gallery, allowed=parse.purge_filter(filter), force=force)
        purged = purge.write(self._engine)
        sample = tuple(ItemName(purged.gallery, name) for name in purged.sample)
        return Purged(count=purged.count, sample=sample)

    def put_alias(self, alias: str, gallery: str, *, allow_missing: bool = True) -> Alias:
        self._engine.names.put_alias(alias, gallery, allow_missing=allow_missing)
        return Alias(id=alias, gallery=gallery)

    def list_aliases(self) -> Iterator[Alias]:
        return (Alias(id=alias, gallery=gallery) for alias, gallery in self._engine.names.aliases.all().items())

    def delete_alias(self, alias: str) -> None:
        self._engine.names.delete_alias(alias)

    def reindex_gallery(self, gallery: str, *, index: IndexSettings | None = None) -> Operation:
        settings = _settings(index)
        found = self._engine.gallery(gallery, any_model=True)
        return self._begun(
            "reindex",
            found.id,
            lambda tell: wire.gallery(upkeep.reindex(self._engine, found.id, settings, tell), with_stats=True),
        )

    def verify_gallery(self, gallery: str, *, repair: bool = False) -> Operation:
        found = upkeep.existing(self._engine, gallery)
        return self._begun(
            "verify", found, lambda tell: wire.verification(found, upkeep.verify(self._engine, found, repair, tell))
        )

    def migrate_gallery(self, gallery: str, to: str, *, model: str = "", alias: str = "") -> Operation:
        if model not in {"", self._engine.bundle.name}:
            raise InvalidInput(f"the bundle given is of model {self._engine.bundle.name!r}, not {model!r}")
        migration = upkeep.Migration(self._engine, gallery, to, alias=alias)
        return self._begun("migrate", migration.source_id, lambda tell: wire.gallery(migration.run(tell)))

    def create_snapshot(self, gallery: str, snapshot: str) -> Operation:
        found = self._engine.gallery(gallery, any_model=True)
        self._engine.names.shelf.check_free(found.id, snapshot)
        return self._begun(
            "snapshot", found.id, lambda tell: wire.snapshot(upkeep.snapshot(self._engine, found.id, snapshot, tell))
        )

    def list_snapshots(self, gallery: str) -> Iterator[Snapshot]:
        return (messages.snapshot(wire.snapshot(copy)) for copy in self._engine.names.snapshots(gallery)[1])

    def delete_snapshot(self, gallery: str, snapshot: str) -> None:
        self._engine.names.delete_snapshot(gallery, snapshot)

    def restore_gallery(self, gallery: str, snapshot: str, to: str) -> Operation:
        source = self._engine.names.to_restore(to, gallery, snapshot)
        return self._begun("restore", to, lambda tell: wire.gallery(upkeep.restore(self._engine, source, to, tell)))

    def wait_operation(self, operation: str, *, seconds: float = 10.0) -> Operation:
        running = self._operations.get(operation)
        running.wait(seconds)
        return _told(running)

    def cancel_operation(self, operation: str) -> None:
        self._operations.get(operation).cancel()

    def _begun(self, verb: str, target: str, work: Callable[[OnProgress], Message]) -> Operation:
        return _told(self._operations.start(verb, target, work))

    def _id(self, gallery: str) -> str:
        """The gallery that an alias stands for."""
        return self._engine.names.aliases.resolve(gallery)


def verified(galleries: Path, gallery: str, *, repair: bool, on_progress: OnProgress) -> Verification:
    """What a check of a gallery in this folder finds; no model is needed. Raises NotFound, and Busy while another
    process writes to the folder."""
    with Catalog(galleries, read_only=not repair) as catalog, nullcontext() if repair else _alone(galleries):
        try:
            found, name = catalog.verify(gallery, repair=repair, on_progress=on_progress), gallery
        except NotFound:
            name = Aliases(galleries, read_only=True).resolve(gallery)
            found = catalog.verify(name, repair=repair, on_progress=on_progress)
    return messages.verification(wire.verification(name, found))


@contextmanager
def _alone(galleries: Path) -> Iterator[None]:
    """Nobody writes within; segments that a writer replaces meanwhile would look damaged."""
    try:
        held = HeldFolder(galleries)
    except StorageFailed:  # a read-only disk
        yield
        return
    try:
        yield
    finally:
        held.close()


def _told(operation: operations.Operation[Any]) -> Operation:
    return messages.operation(wire.operation(operation, errors.status))


def engine_effort(effort: Effort | None) -> engine_interface.Effort | None:
    """The engine's form of an effort."""
    wanted = messages.effort(effort)
    return parse.effort(wanted, "effort") if wanted is not None else None


def _scope(gallery: str, point: OperatingPoint | None, filter: str, effort: Effort | None) -> Scope:
    return Scope(gallery=gallery, point=engine_point(point), allowed=parse_filter(filter), effort=engine_effort(effort))


def _settings(index: IndexSettings | None) -> engine_interface.IndexSettings | None:
    return parse.index_settings(messages.index_settings(index), "index") if index is not None else None


def describe_bundle(path: Path) -> Model:
    """A bundle as the server would describe it. Raises NotFound or DamagedData."""
    bundle = Bundle.load(path)
    known = Available(described=bundle, calibrations=(bundle.calibration.version,), loaded=False, active=False)
    return messages.model(wire.model(known))


def learned_in(path: Path) -> Mapping[str, float]:
    """What the loss of a bundle has learned itself, by name, such as the boundary β of the margin loss."""
    return learned_by_loss(Bundle.load(path).lineage)


def _source(image: ImageLike, path: str | None = None) -> Source:
    """The engine's form of an image; errors about it name `path`, the field of a request that it would stand in."""
    match image:
        case bytes():
            return EncodedImage(data=image, path=path)
        case ItemName():
            return StoredItem(gallery=image.gallery, item=image.id, path=path)
        case EmbeddingOf():
            return GivenEmbedding(values=np.asarray(image.embedding, dtype=np.float32), path=path, model=image.model)
        case np.ndarray() if image.ndim == 1:
            return GivenEmbedding(values=np.asarray(image, dtype=np.float32), path=path)
        case str() | os.PathLike():
            return EncodedImage(data=Path(image).read_bytes(), path=path)
        case _:
            return EncodedImage(data=messages.image_input(image).encoded, path=path)


def engine_point(point: OperatingPoint | None) -> engine_decision.OperatingPoint | None:
    """The engine's form of an operating point."""
    return None if point is None else engine_decision.OperatingPoint(**asdict(point))
