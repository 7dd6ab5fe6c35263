"""The engine in this process, with the face of the client."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from embedding import decision as engine_decision
from embedding.bundle import Bundle
from embedding.errors import LookalikeError
from index import Gallery as StoredGallery
from index import Item as StoredItemRow
from index import Neighbor as StoredNeighbor
from lookalike.types import (
    Calibration,
    Decision,
    ErrorRates,
    Gallery,
    ImageLike,
    Item,
    ItemName,
    Model,
    Neighbor,
    NewItem,
    OperatingPoint,
    Verdict,
)
from service.engine import Engine
from service.questions import Search, SearchBatch, Verify
from service.refusals import GalleryNotEmpty
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
        return _decision(self._engine.ask(Verify(a=_source(a), b=_source(b), point=_point(operating_point))))

    def search(
        self, gallery: str, query: ImageLike, *, k: int = 10, operating_point: OperatingPoint | None = None
    ) -> list[Neighbor]:
        question = Search(gallery=gallery, query=_source(query), k=k, point=_point(operating_point))
        return _neighbors(gallery, self._engine.ask(question))

    def search_batch(
        self, gallery: str, queries: Iterable[ImageLike], *, k: int = 10, operating_point: OperatingPoint | None = None
    ) -> Sequence[list[Neighbor] | LookalikeError]:
        sources = [_source(query) for query in queries]
        outcomes = self._engine.ask(SearchBatch(gallery=gallery, queries=sources, k=k, point=_point(operating_point)))
        return [
            outcome if isinstance(outcome, LookalikeError) else _neighbors(gallery, outcome) for outcome in outcomes
        ]

    def create_gallery(self, gallery: str) -> Gallery:
        return _gallery(self._engine.catalog.create(gallery, self._engine.model))

    def get_gallery(self, gallery: str) -> Gallery:
        return _gallery(self._engine.catalog.get(gallery))

    def list_galleries(self) -> Iterator[Gallery]:
        catalog = self._engine.catalog
        return iter(_gallery(gallery) for gallery in catalog.list())

    def delete_gallery(self, gallery: str, *, force: bool = False) -> None:
        if not force and (count := self._engine.catalog.get(gallery).size):
            raise GalleryNotEmpty(f"gallery {gallery!r} holds {count} items; delete them first, or use force")
        self._engine.catalog.delete(gallery)

    def get_item(self, name: ItemName) -> Item:
        return _item(name.gallery, self._engine.catalog.get(name.gallery).get(name.id))

    def list_items(self, gallery: str) -> Iterator[Item]:
        """Every item of a gallery, by name, here with its embedding."""
        return (_item(gallery, item) for item in self._engine.catalog.get(gallery).iterate())

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
        return [outcome if isinstance(outcome, LookalikeError) else _item(gallery, outcome) for outcome in outcomes]

    def delete_items(self, gallery: str, ids: Iterable[str], *, allow_missing: bool = False) -> int:
        return self._engine.gallery(gallery).delete(list(ids), allow_missing=allow_missing)


def _source(image: ImageLike) -> Source:
    match image:
        case bytes():
            return EncodedImage(data=image)
        case ItemName():
            return StoredItem(gallery=image.gallery, item=image.id)
        case np.ndarray():
            return GivenEmbedding(values=np.asarray(image, dtype=np.float32))
        case str() | os.PathLike():
            return EncodedImage(data=Path(image).read_bytes())


def _point(point: OperatingPoint | None) -> engine_decision.OperatingPoint | None:
    if point is None:
        return None
    return engine_decision.OperatingPoint(
        target_far=point.target_far,
        threshold=point.threshold,
        name=point.name,
        uncertain_within=point.uncertain_within,
    )


def _decision(decision: engine_decision.Decision) -> Decision:
    return Decision(
        verdict=Verdict(decision.verdict.value),
        distance=decision.distance,
        threshold=decision.threshold,
        match_probability=decision.match_probability,
        far=decision.far,
        far_upper95=decision.far_upper95,
        frr=decision.frr,
        model=decision.model,
        calibration=decision.calibration,
    )


def _neighbors(gallery: str, neighbors: Sequence[StoredNeighbor]) -> list[Neighbor]:
    return [
        Neighbor(
            item=ItemName(gallery, neighbor.item.name),
            identity=neighbor.item.identity,
            metadata=dict(neighbor.item.metadata),
            decision=_decision(neighbor.decision),
        )
        for neighbor in neighbors
    ]


def _item(gallery: str, item: StoredItemRow) -> Item:
    if item.update_time is None:
        raise ValueError(f"item {item.name!r} was never stored")
    return Item(
        name=ItemName(gallery, item.name),
        identity=item.identity,
        metadata=dict(item.metadata),
        etag=item.etag,
        generation=item.generation,
        update_time=item.update_time,
        embedding=item.embedding,
    )


def _gallery(gallery: StoredGallery) -> Gallery:
    return Gallery(
        id=gallery.id,
        model=gallery.model.name,
        item_count=gallery.size,
        generation=gallery.generation,
        create_time=gallery.created,
        damage="",
    )


def describe_bundle(path: Path) -> Model:
    """A bundle as the server would describe it. Raises NotFound or DamagedData."""
    bundle = Bundle.load(path)
    calibration = bundle.calibration
    return Model(
        id=bundle.name,
        fingerprint=bundle.fingerprint,
        modality=bundle.manifest.modality,
        embedding_dim=bundle.embedding_dim,
        network=bundle.architecture.network,
        image_size=bundle.architecture.image_size,
        create_time=bundle.lineage.created,
        calibration=Calibration(
            version=calibration.version,
            protocol=calibration.protocol,
            identities=calibration.identities,
            matching_pairs=calibration.matching_pairs,
            impostor_pairs=calibration.impostor_pairs,
            learned_margin=calibration.learned_margin,
            probability_slope=calibration.probability.slope,
            curve=tuple(ErrorRates(**row.model_dump()) for row in calibration.curve),
            named_points=dict(calibration.named_points),
            smallest_supported_far=calibration.smallest_supported_far,
        ),
        active=False,
    )
