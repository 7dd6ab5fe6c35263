"""The engine: one model and its galleries as an immutable snapshot, and the synchronous way to ask it.

Questions (see `questions.py`) are answered here in the caller's thread, for the command line; `serving.py` answers
the same questions without blocking an event loop. Swapping a model is replacing one Engine by another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar

import numpy as np

from embedding.bundle import Bundle
from embedding.decision import Judge, OperatingPoint, Vectors, checked_embedding, checked_embeddings
from embedding.encoder import Encoder
from embedding.errors import (
    InvalidVector,
    LookalikeError,
    ModelMismatch,
)
from embedding.images import MAX_PIXELS
from embedding.runtime import Precision, Runtime
from index import Catalog, GalleryCatalog, GalleryEngine, IndexSettings, ModelRef
from index.aliases import Aliases, holds
from index.receipts import Token
from index.shelf import Shelf
from service.namespace import Namespace
from service.sources import (
    Embedded,
    EmbeddedRows,
    EncodedImage,
    GivenEmbedding,
    GivenEmbeddings,
    Source,
    StoredItem,
    Unusable,
    distinct_images,
    located,
    naming,
)

Answer = TypeVar("Answer")
AnswerOf = TypeVar("AnswerOf", covariant=True)


class Question(Protocol[AnswerOf]):
    """Images to embed, and what to make of their embeddings; written once, asked in two ways."""

    @property
    def sources(self) -> Sequence[Source]:
        """The images, in the order in which the answer takes their embeddings."""

    def begin(self, engine: Engine) -> Callable[[Sequence[Embedded]], AnswerOf]:
        """Check all that can be checked before images are embedded, and return what turns embeddings into the answer.

        Raises LookalikeError when the question as a whole cannot be answered; so may the answer.
        """


_JUDGES_KEPT = 64  # as many points as callers are likely to use


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """An encoder and the galleries that it answers from. Methods may be called from any thread."""

    encoder: Encoder
    names: Namespace
    """What its galleries are called; shared by the engines of all models of a server."""
    thumbnails: int = 0
    """Side, in pixels, of the thumbnails stored with new items; 0 stores none."""
    max_pixels: int = MAX_PIXELS
    """Largest width × height of an image."""
    model: ModelRef = field(init=False)
    """The model as galleries are stamped with it."""
    _judges: dict[tuple[OperatingPoint | None, int | None], Judge] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        bundle = self.encoder.bundle
        ref = ModelRef(name=bundle.name, fingerprint=bundle.fingerprint, embedding_dim=bundle.embedding_dim)
        object.__setattr__(self, "model", ref)

    @classmethod
    def open(
        cls,
        bundle: Path | str,
        galleries: Path | str,
        *,
        read_only: bool = False,
        follow: bool = False,
        catalog: Callable[[Path], GalleryCatalog] | None = None,
        device: str = "auto",
        batch_size: int = 64,
        max_pixels: int = MAX_PIXELS,
        thumbnails: int = 0,
        runtime: Runtime = "auto",
        threads: int | None = None,
        precision: Precision = "float32",
    ) -> Self:
        """Load a bundle and open a folder of galleries; close it after use, or use it in a `with` statement.

        `catalog` opens galleries that lie elsewhere, or in another way; aliases lie in the folder all the same, and are
        another process's to write when `follow` is set.

        Raises NotFound, DamagedData, StorageFailed, or Busy when another process writes to the galleries and
        `read_only` is not set.
        """
        encoder = Encoder(
            Bundle.load(bundle),
            device=device,
            batch_size=batch_size,
            max_pixels=max_pixels,
            runtime=runtime,
            threads=threads,
            precision=precision,
        )
        root = Path(galleries)
        opened = catalog(root) if catalog else Catalog(root, read_only=read_only)
        try:
            aliases = Aliases(root, read_only=read_only, follow=follow, is_gallery=partial(holds, opened))
        except BaseException:
            opened.close()
            raise
        shelf = Shelf(root)
        if not read_only and not follow:
            shelf.clear_away()
        return cls(
            encoder=encoder,
            names=Namespace(catalog=opened, aliases=aliases, shelf=shelf),
            thumbnails=thumbnails,
            max_pixels=max_pixels,
        )

    @property
    def bundle(self) -> Bundle:
        return self.encoder.bundle

    def judge(self, point: OperatingPoint | None, *, searched: GalleryEngine | None = None) -> Judge:
        """What decides at this operating point, on pairs or in searches of a gallery. Raises InvalidOperatingPoint."""
        among = searched.size if searched is not None and point and point.target_fpir is not None else None
        judge = self._judges.get((point, among))
        if judge is None:
            judge = Judge(self.bundle.calibration, point, model=self.bundle.name, among=among)
            if len(self._judges) >= _JUDGES_KEPT:
                self._judges.clear()
            self._judges[point, among] = judge
        return judge

    def gallery(self, name: str, *, path: str | None = None, any_model: bool = False) -> GalleryEngine:
        """The gallery that a name or an alias stands for, of this model unless `any_model`.

        Raises NotFound, ModelMismatch, DamagedData or GalleryForbidden, naming the request field `path`.
        """
        with naming(path):
            return self.names.catalog.get(self.names.resolved(name), model=None if any_model else self.model)

    @contextmanager
    def written(self, name: str, *, path: str | None = None, any_model: bool = False) -> Iterator[GalleryEngine]:
        """`gallery`, to write to: an alias that moves does so before or after what is written within."""
        with self.names.gate.passing():
            yield self.gallery(name, path=path, any_model=any_model)

    def create_gallery(
        self, gallery_id: str, settings: IndexSettings | None = None, token: Token | None = None
    ) -> GalleryEngine:
        """`Namespace.create_gallery` of this model."""
        return self.names.create_gallery(gallery_id, self.model, settings, token)

    def ask(self, question: Question[Answer]) -> Answer:
        """Answer in this thread. Raises LookalikeError."""
        answer = question.begin(self)
        return answer(self.embedded(question.sources, self._encode(distinct_images(question.sources))))

    def embedded(self, sources: Sequence[Source], images: Mapping[bytes, Embedded]) -> Sequence[Embedded]:
        """What became of each source, given what became of the encoded images among them."""
        given_ND = self._given(sources)
        if given_ND is not None:
            return EmbeddedRows(given_ND)
        return [self._embedded(source, images) for source in sources]

    def close(self) -> None:
        """Close the galleries."""
        self.names.catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _given(self, sources: Sequence[Source]) -> Vectors | None:
        """The embeddings [N, D] where all sources are just that, sent as bytes; None where one is not, or is wrong."""
        width = self.model.embedding_dim
        given: Sequence[bytes | Vectors] = (
            sources.values
            if isinstance(sources, GivenEmbeddings)
            else [
                source.values
                for source in sources
                if type(source) is GivenEmbedding and source.model in {"", self.model.name}
            ]
        )
        values = [each for each in given if type(each) is bytes and len(each) == 4 * width]
        if len(values) != len(sources) or len(values) < 2:
            return None
        given_ND = np.frombuffer(b"".join(values), "<f4").reshape(-1, width).astype(np.float32, copy=False)
        try:
            return checked_embeddings(given_ND, width)
        except InvalidVector:  # found again, and told of its source
            return None

    def _embedded(self, source: Source, images: Mapping[bytes, Embedded]) -> Embedded:
        if isinstance(source, Unusable):
            return source.error
        try:
            if source.model and source.model != self.bundle.name:
                raise ModelMismatch(
                    f"the embedding is of {source.model}, and {self.bundle.name} answers; embed the image anew"
                    if isinstance(source, GivenEmbedding)
                    else f"the image is to be compared by {source.model}, and {self.bundle.name} answers; activate "
                    "that model, or leave `model` out"
                )
            match source:
                case EncodedImage():
                    found = images[source.data]  # raised, its frames would hold it, and all images with it
                    return located(found, source.path) if isinstance(found, LookalikeError) else found
                case StoredItem():
                    return self.gallery(source.gallery).get(source.item).embedding
                case GivenEmbedding():
                    return checked_embedding(source.values, self.bundle.embedding_dim)
        except LookalikeError as error:
            return located(error, source.path)

    def _encode(self, images: Sequence[bytes]) -> dict[bytes, Embedded]:
        outcomes: dict[bytes, Embedded] = {}
        pixels = {}
        for data in images:
            try:
                pixels[data] = self.encoder.prepare(data)
            except LookalikeError as error:
                outcomes[data] = error
        if pixels:
            outcomes.update(zip(pixels, self.encoder.encode_pixels(np.stack(list(pixels.values()))), strict=True))
        return outcomes
