"""The engine: one model and its galleries as an immutable snapshot, and the synchronous way to ask it.

Questions (see `questions.py`) are answered here in the caller's thread, for the command line; `serving.py` answers
the same questions without blocking an event loop. Swapping a model is replacing one Engine by another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
    AlreadyExists,
    DamagedData,
    GalleryAliased,
    GalleryForbidden,
    GalleryNotEmpty,
    InvalidVector,
    LookalikeError,
    ModelMismatch,
    NotFound,
)
from embedding.images import MAX_PIXELS
from embedding.runtime import Precision, Runtime
from index import Catalog, GalleryCatalog, GalleryEngine, IndexSettings, ModelRef
from index.aliases import Aliases, holds
from index.engine import OnProgress
from index.receipts import Token
from index.shelf import Copy, Shelf
from service.call import principal
from service.gate import Gate
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
    catalog: GalleryCatalog
    aliases: Aliases
    shelf: Shelf
    thumbnails: int = 0
    """Side, in pixels, of the thumbnails stored with new items; 0 stores none."""
    max_pixels: int = MAX_PIXELS
    """Largest width × height of an image."""
    gate: Gate = field(default_factory=Gate)
    """Writes to galleries pass it; shared by the engines of all models of a server."""
    names: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Held from looking whether a gallery or an alias may get or lose a name until it has; shared as `gate` is, and
    taken after it."""
    unloaded: set[str] = field(default_factory=set, repr=False)
    """Fingerprints of models that no longer answer; shared as `names` is, and changed by who holds that."""
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
            catalog=opened,
            aliases=aliases,
            shelf=shelf,
            thumbnails=thumbnails,
            max_pixels=max_pixels,
        )

    @property
    def bundle(self) -> Bundle:
        return self.encoder.bundle

    @property
    def keeps_receipts(self) -> bool:
        """Whether galleries keep receipts of requests in the same step as what these wrote."""
        return isinstance(self.catalog, Catalog)

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

    def resolved(self, name: str) -> str:
        """The id of the gallery that a name or an alias stands for now.

        Raises GalleryForbidden where whoever makes the call being served has no rights on it: he had when the call
        came, and the alias may have moved since.
        """
        gallery_id = self.aliases.resolve(name)
        by = principal()
        if not by.allows(gallery_id):
            raise GalleryForbidden(
                f"{name!r} stands for another gallery since the call came, on which {by.name!r} has no rights",
                needed={"gallery": name},
            )
        return gallery_id

    def gallery(self, name: str, *, path: str | None = None, any_model: bool = False) -> GalleryEngine:
        """The gallery that a name or an alias stands for, of this model unless `any_model`.

        Raises NotFound, ModelMismatch, DamagedData or GalleryForbidden, naming the request field `path`.
        """
        with naming(path):
            return self.catalog.get(self.resolved(name), model=None if any_model else self.model)

    @contextmanager
    def written(self, name: str, *, path: str | None = None, any_model: bool = False) -> Iterator[GalleryEngine]:
        """`gallery`, to write to: an alias that moves does so before or after what is written within."""
        with self.gate.passing():
            yield self.gallery(name, path=path, any_model=any_model)

    def create_gallery(
        self, gallery_id: str, settings: IndexSettings | None = None, token: Token | None = None
    ) -> GalleryEngine:
        """An empty gallery of this model, with a receipt of the request when it has a token.

        Raises AlreadyExists, and ModelMismatch when this model has been unloaded.
        """
        self.check_no_alias(gallery_id)  # now rather than after the work
        publishing = self._named(gallery_id, if_loaded=True)
        if isinstance(self.catalog, Catalog):
            return self.catalog.create(gallery_id, self.model, settings=settings, token=token, publishing=publishing)
        return self.catalog.create(gallery_id, self.model, settings=settings, publishing=publishing)

    def snapshots(self, name: str) -> tuple[str, tuple[Copy, ...]]:
        """The id of the gallery whose snapshots a name or an alias stands for, and these."""
        gallery_id = self._kept_under(name)
        return gallery_id, self.shelf.list(gallery_id)

    def delete_snapshot(self, gallery_id: str, snapshot_id: str) -> None:
        """Delete a snapshot, named by its own gallery: what an alias stands for may change, and who asked twice would
        delete two.

        Raises NotFound, GalleryAliased for the name of an alias under which nothing was ever kept, and GalleryForbidden
        as `resolved`.
        """
        try:
            self.shelf.delete(gallery_id, snapshot_id)
        except NotFound as error:
            aliased = self.resolved(gallery_id)
            if aliased == gallery_id:
                raise
            why = f"{gallery_id!r} is an alias of gallery {aliased!r}; to delete a snapshot of that, name it itself"
            if self.shelf.has_kept(gallery_id):
                raise NotFound(f"{error}; {why}", field="name") from error
            raise GalleryAliased(why, field="name") from error

    def to_restore(self, gallery_id: str, name: str, snapshot_id: str) -> tuple[str, str]:
        """The snapshot of the gallery that a name or an alias stands for, as `restore_gallery` takes it.

        Raises NotFound, and AlreadyExists when there is a gallery or an alias of the new name.
        """
        self.check_no_alias(gallery_id)
        source = self._kept_under(name), snapshot_id
        self.shelf.get(*source)
        try:
            self.catalog.get(gallery_id)
        except NotFound:
            return source
        raise AlreadyExists(f"there is a gallery {gallery_id!r} already; delete it, or choose another name")

    def restore_gallery(
        self, gallery_id: str, snapshot: tuple[str, str], *, on_progress: OnProgress | None = None
    ) -> GalleryEngine:
        """A gallery made from a snapshot, given as the ids of its gallery and its own. Raises AlreadyExists."""
        self.check_no_alias(gallery_id)
        return self.shelf.restore(
            self.catalog,
            *snapshot,
            into=gallery_id,
            on_progress=on_progress,
            publishing=self._named(gallery_id),
        )

    def check_loaded(self) -> None:
        """Raises ModelMismatch when this model has been unloaded; until it is loaded again."""
        if self.model.fingerprint in self.unloaded:
            raise ModelMismatch(
                f"{self.model.name} has been unloaded meanwhile, so that nobody could search what is made with it; "
                "load it, then ask again"
            )

    def put_alias(self, alias: str, gallery_id: str, *, allow_missing: bool = True, if_loaded: bool = False) -> None:
        """Let `alias` stand for a gallery from now on.

        Raises NotFound, AlreadyExists when a gallery has that name, GalleryForbidden as `resolved`, and with
        `if_loaded` ModelMismatch when this model has been unloaded.
        """
        with naming("alias.gallery"):
            self.catalog.get(gallery_id)  # opening a large one takes long: nobody else waits for it to name something
        with self.names:
            with naming("alias.gallery"):
                self.catalog.get(gallery_id)
            self.check_no_gallery(alias, path="alias.name")
            with naming("alias.name"):
                self.resolved(alias)  # or it would be taken away from those who use it now
            if if_loaded:
                self.check_loaded()
            self.aliases.put(alias, gallery_id, allow_missing=allow_missing)

    def check_no_alias(self, gallery_id: str) -> None:
        """Raises AlreadyExists when an alias has this name."""
        if gallery_id in self.aliases.all():
            raise AlreadyExists(
                f"{gallery_id!r} is an alias of gallery {self.aliases.resolve(gallery_id)!r}; choose another name"
            )

    def check_no_gallery(self, alias: str, *, path: str) -> None:
        """Raises AlreadyExists, naming the request field `path`, when a gallery has this name, damaged or not."""
        with naming(path):
            try:
                self.catalog.get(alias)
            except NotFound:
                return
            except DamagedData:
                pass
            raise AlreadyExists(f"there is a gallery {alias!r}; choose another name for the alias")

    def delete_alias(self, alias: str) -> None:
        """Delete an alias; the gallery stays. Raises NotFound, and GalleryForbidden as `resolved`."""
        with self.names:
            self.resolved(alias)
            self.aliases.delete(alias)

    def delete_gallery(self, gallery_id: str, *, force: bool = False, validate_only: bool = False) -> None:
        """Delete a gallery of any model, or with `validate_only` look whether it could be.

        Raises NotFound, GalleryAliased, and GalleryNotEmpty unless it is empty or `force` is set.
        """
        with self.names, naming("name"):
            if aliases := self.aliases.of(gallery_id):
                raise GalleryAliased(
                    f"alias {aliases[0]!r} stands for gallery {gallery_id!r}; move or delete the alias first"
                )
            if gallery_id in self.aliases.all():
                raise GalleryAliased(
                    f"{gallery_id!r} is an alias of gallery {self.aliases.resolve(gallery_id)!r}; delete the alias, or "
                    "name the gallery itself"
                )
            if not force:
                self._check_empty(gallery_id)
            if not validate_only:
                self.catalog.delete(gallery_id)
                return
            with suppress(DamagedData):  # such a one can be deleted
                self.catalog.get(gallery_id)

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
        self.catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _kept_under(self, name: str) -> str:
        """The id of the gallery whose snapshots a name or an alias stands for: its own, where there are any, since an
        alias may have the name of a gallery that is gone. Raises GalleryForbidden."""
        gallery_id = self.resolved(name)
        return name if gallery_id != name and self.shelf.keeps(name) else gallery_id

    @contextmanager
    def _named(self, gallery_id: str, *, if_loaded: bool = False) -> Iterator[None]:
        """Within, no other name is given or taken, and no model unloaded.

        Raises AlreadyExists when an alias has this one, and with `if_loaded` ModelMismatch when this model has been
        unloaded.
        """
        with self.names:
            self.check_no_alias(gallery_id)
            if if_loaded:
                self.check_loaded()
            yield

    def _check_empty(self, gallery_id: str) -> None:
        try:
            size = self.catalog.get(gallery_id).size
        except DamagedData as error:
            raise GalleryNotEmpty(
                f"gallery {gallery_id!r} is damaged and may hold items; set force to delete it all the same"
            ) from error
        if size:
            raise GalleryNotEmpty(f"gallery {gallery_id!r} holds {size} items; delete them with it by force (--force)")

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
