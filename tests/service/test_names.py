"""A name is that of one gallery or of one alias, whoever asks for it at the same moment, and an alias stands for a
gallery that is there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from embedding.bundle import Bundle
from embedding.errors import AlreadyExists, GalleryAliased, GalleryNotEmpty, LookalikeError, ModelMismatch, NotFound
from index import Gallery
from index.aliases import Aliases
from index.catalog import Catalog
from index.live import STORE
from service.engine import Engine

_HELD_UP = 0.5  # seconds that somebody who must wait is given to go on all the same


@pytest.fixture
def engine(bundle: Bundle, tmp_path: Path) -> Iterator[Engine]:
    with Engine.open(bundle.path, tmp_path / "galleries", device="cpu") as engine:
        engine.create_gallery("old")
        yield engine


class Meanwhile:
    """What another thread does in the midst of a step that it should wait for."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.error: LookalikeError | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run)

    def __call__(self) -> None:
        self._thread.start()
        self._thread.join(_HELD_UP)

    def ended(self) -> Meanwhile:
        self._thread.join()
        return self

    def _run(self) -> None:
        try:
            self._work()
        except LookalikeError as error:
            self.error = error


def before(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, meanwhile: Callable[[], object]) -> None:
    """Have `meanwhile` done just before the real step."""
    real = getattr(owner, name)

    def stepped(*given: Any, **named: Any) -> Any:
        monkeypatch.setattr(owner, name, real)
        meanwhile()
        return real(*given, **named)

    monkeypatch.setattr(owner, name, stepped)


def names_of(engine: Engine) -> tuple[list[str], dict[str, str]]:
    return [gallery.id for gallery in engine.names.catalog.list()], dict(engine.names.aliases.all())


def test_an_alias_put_while_a_gallery_of_its_name_is_made_keeps_the_name(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Gallery.create

    def filled(*given: Any) -> None:
        real(*given)
        engine.names.put_alias("new", "old")

    monkeypatch.setattr(Gallery, "create", staticmethod(filled))
    with pytest.raises(AlreadyExists, match="'new' is an alias"):
        engine.create_gallery("new")
    assert names_of(engine) == (["old"], {"new": "old"})


def test_an_alias_put_while_a_gallery_of_its_name_is_restored_keeps_the_name(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is put while the copying goes on."""
    engine.names.shelf.create(engine.gallery("old"), "copy")
    monkeypatch.setattr("index.catalog.read_copy", _copied_after(lambda: engine.names.put_alias("new", "old")))
    with pytest.raises(AlreadyExists, match="'new' is an alias"):
        engine.names.restore_gallery("new", ("old", "copy"))
    assert names_of(engine) == (["old"], {"new": "old"})
    assert [path.name for path in engine.names.shelf._root.parent.iterdir() if path.name.startswith(".making")] == []


def _copied_after(meanwhile: Callable[[], object]) -> Callable[..., None]:
    from index.copies import read_copy

    def copied(*given: Any) -> None:
        read_copy(*given)
        meanwhile()

    return copied


def test_a_gallery_made_while_an_alias_of_its_name_is_put_is_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Meanwhile(lambda: engine.create_gallery("new"))
    before(monkeypatch, Aliases, "put", create)
    engine.names.put_alias("new", "old")
    assert isinstance(create.ended().error, AlreadyExists)
    assert names_of(engine) == (["old"], {"new": "old"})


def test_an_alias_put_while_its_gallery_is_deleted_finds_none(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Meanwhile(lambda: engine.names.put_alias("new", "old"))
    before(monkeypatch, Catalog, "delete", put)
    engine.names.delete_gallery("old")
    assert isinstance(put.ended().error, NotFound)
    assert names_of(engine) == ([], {})


def test_a_gallery_deleted_while_an_alias_of_it_is_put_stays(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    delete = Meanwhile(lambda: engine.names.delete_gallery("old"))
    before(monkeypatch, Aliases, "put", delete)
    engine.names.put_alias("new", "old")
    assert isinstance(delete.ended().error, GalleryAliased)
    assert names_of(engine) == (["old"], {"new": "old"})


def test_a_gallery_made_while_its_alias_is_deleted_gets_the_name(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.names.put_alias("new", "old")
    held: list[bool] = []
    before(monkeypatch, Aliases, "delete", lambda: held.append(engine.names.lock.locked()))
    engine.names.delete_alias("new")
    assert held == [True]
    engine.create_gallery("new")
    assert names_of(engine) == (["new", "old"], {})


def test_no_name_is_given_for_what_is_not_there_or_answers_no_more(engine: Engine) -> None:
    names, model = engine.names, engine.gallery("old").model
    names.shelf.create(engine.gallery("old"), "copy")
    assert names.to_restore("new", "old", "copy") == ("old", "copy")
    for name, snapshot in (("old", "none"), ("nowhere", "copy")):
        with pytest.raises(NotFound):
            names.to_restore("new", name, snapshot)
    names.delete_gallery("old", validate_only=True)
    with pytest.raises(NotFound):
        names.delete_gallery("nowhere", force=True, validate_only=True)
    names.put_alias("new", "old", of_loaded=model)
    names.unloaded.add(model.fingerprint)
    with pytest.raises(ModelMismatch, match="unloaded meanwhile"):
        names.put_alias("newer", "old", of_loaded=model)
    with pytest.raises(ModelMismatch, match="unloaded meanwhile"):
        names.create_gallery("newer", model)
    assert names_of(engine) == (["old"], {"new": "old"})


def test_a_damaged_gallery_keeps_its_name_and_can_be_deleted(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "galleries"
    with Engine.open(bundle.path, folder, device="cpu") as engine:
        for name in ("old", "hurt"):
            engine.create_gallery(name)
    (folder / "hurt" / STORE).write_bytes(b"damage")
    with Engine.open(bundle.path, folder, device="cpu") as engine:
        with pytest.raises(AlreadyExists, match="there is a gallery 'hurt'"):
            engine.names.put_alias("hurt", "old")
        with pytest.raises(GalleryNotEmpty, match="damaged and may hold items"):
            engine.names.delete_gallery("hurt")
        engine.names.delete_gallery("hurt", force=True, validate_only=True)
        assert (folder / "hurt").is_dir()
        engine.names.delete_gallery("hurt", force=True)
        engine.names.put_alias("hurt", "old")


def test_the_engines_of_all_models_wait_for_each_other(engine: Engine) -> None:
    assert replace(engine, encoder=engine.encoder).names is engine.names
