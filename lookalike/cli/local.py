"""The engine in this process, with the face of the client.

Answers pass through the messages of the wire contract, so that they are what a server would have sent.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from embedding import decision as engine_decision
from embedding.bundle import Bundle, learned_by_loss
from embedding.errors import DamagedData, LookalikeError
from lookalike import _messages as messages
from lookalike.types import Decision, Gallery, ImageLike, Item, ItemName, Model, Neighbor, NewItem, OperatingPoint
from service import wire
from service.engine import Engine
from service.questions import Search, SearchBatch, Verify
from service.sources import EncodedImage, GivenEmbedding, Source, StoredItem
from service.writes import Draft, UpdateItems


class LocalBackend:
    """Answers from an engine what the client would ask a server."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @classmethod
    @contextmanager
    def open(cls, bundle: Path, galleries: Path, *, read_only: bool, device: str) -> Iterator[LocalBackend]:
        """Load a bundle and open its galleries; to read, the folder of galleries need not exist."""
        with tempfile.TemporaryDirectory() as empty:
            folder = Path(empty) if read_only and not galleries.exists() else galleries
            with Engine.open(bundle, folder, read_only=read_only, device=device) as engine:
                yield cls(engine)

    def verify(self, a: ImageLike, b: ImageLike, *, operating_point: OperatingPoint | None = None) -> Decision:
        decided = self._engine.ask(Verify(a=_source(a, "a"), b=_source(b, "b"), point=_point(operating_point)))
        return messages.decision(wire.decision(decided))

    def search(
        self, gallery: str, query: ImageLike, *, k: int = 10, operating_point: OperatingPoint | None = None
    ) -> list[Neighbor]:
        found = self._engine.ask(
            Search(gallery=gallery, query=_source(query, "query"), k=k, point=_point(operating_point))
        )
        return [messages.neighbor(neighbor) for neighbor in wire.neighbors(found, gallery)]

    def search_batch(
        self, gallery: str, queries: Iterable[ImageLike], *, k: int = 10, operating_point: OperatingPoint | None = None
    ) -> Sequence[list[Neighbor] | LookalikeError]:
        sources = [_source(query) for query in queries]
        outcomes = self._engine.ask(SearchBatch(gallery=gallery, queries=sources, k=k, point=_point(operating_point)))
        return [
            outcome
            if isinstance(outcome, LookalikeError)
            else [messages.neighbor(neighbor) for neighbor in wire.neighbors(outcome, gallery)]
            for outcome in outcomes
        ]

    def create_gallery(self, gallery: str) -> Gallery:
        return messages.gallery(wire.gallery(self._engine.catalog.create(gallery, self._engine.model)))

    def get_gallery(self, gallery: str) -> Gallery:
        try:
            return messages.gallery(wire.gallery(self._engine.catalog.get(gallery)))
        except DamagedData as error:
            return messages.gallery(wire.damaged_gallery(gallery, error))

    def list_galleries(self) -> Iterator[Gallery]:
        """Every gallery, by name, damaged ones included."""
        return map(messages.gallery, wire.galleries(self._engine.catalog))

    def delete_gallery(self, gallery: str, *, force: bool = False) -> None:
        self._engine.delete_gallery(gallery, force=force)

    def get_item(self, name: ItemName) -> Item:
        stored = self._engine.catalog.get(name.gallery).get(name.id)
        return messages.item(wire.item(stored, name.gallery, with_embedding=True))

    def list_items(self, gallery: str) -> Iterator[Item]:
        """Every item of a gallery, by name, here with its embedding."""
        for item in self._engine.catalog.get(gallery).iterate():
            yield messages.item(wire.item(item, gallery, with_embedding=True))

    def update_items(
        self, gallery: str, items: Iterable[NewItem], *, allow_missing: bool = True
    ) -> Sequence[Item | LookalikeError]:
        drafts = [
            Draft(
                name=item.id,
                image=_source(item.image),
                identity=item.identity,
                metadata=item.metadata,
                etag=item.etag,
            )
            for item in items
        ]
        outcomes = self._engine.ask(UpdateItems(gallery=gallery, drafts=drafts, allow_missing=allow_missing))
        return [
            outcome if isinstance(outcome, LookalikeError) else messages.item(wire.item(outcome, gallery))
            for outcome in outcomes
        ]

    def delete_items(self, gallery: str, ids: Iterable[str], *, allow_missing: bool = False) -> int:
        return self._engine.catalog.get(gallery).delete(list(ids), allow_missing=allow_missing)


def describe_bundle(path: Path) -> Model:
    """A bundle as the server would describe it. Raises NotFound or DamagedData."""
    return messages.model(wire.model(Bundle.load(path), active=False))


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
        case np.ndarray():
            return GivenEmbedding(values=np.asarray(image, dtype=np.float32), path=path)
        case str() | os.PathLike():
            return EncodedImage(data=Path(image).read_bytes(), path=path)


def _point(point: OperatingPoint | None) -> engine_decision.OperatingPoint | None:
    if point is None:
        return None
    return engine_decision.OperatingPoint(
        target_far=point.target_far,
        threshold=point.threshold,
        name=point.name,
        uncertain_within=point.uncertain_within,
    )
