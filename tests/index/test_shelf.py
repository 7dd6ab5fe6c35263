from __future__ import annotations

from pathlib import Path

import pytest

from embedding.errors import AlreadyExists, DamagedData, InvalidInput, NotFound
from index import Catalog, Gallery, ModelRef
from index.copies import CONTENTS
from index.shelf import FOLDER, Shelf


def test_snapshots_outlive_their_gallery(catalog: Catalog, filled: Gallery) -> None:
    shelf = Shelf(catalog.root)
    copy = shelf.create(filled, "one")
    held = [(item.name, item.embedding.tobytes()) for item in filled.iterate()]
    assert (copy.gallery, copy.id, copy.generation) == ("shapes", "one", filled.generation)
    assert copy.size_bytes == sum(
        path.stat().st_size
        for path in (catalog.root / FOLDER / "shapes" / "one").rglob("*")
        if path.is_file() and path.name != CONTENTS
    )
    catalog.delete("shapes")
    assert shelf.list("shapes") == (copy,)
    restored = shelf.restore(catalog, "shapes", "one", into="again")
    assert [(item.name, item.embedding.tobytes()) for item in restored.iterate()] == held
    shelf.delete("shapes", "one")
    assert shelf.list("shapes") == ()


def test_a_folder_of_snapshots_is_no_gallery(catalog: Catalog, filled: Gallery, model: ModelRef) -> None:
    Shelf(catalog.root).create(filled, "one")
    assert [gallery.id for gallery in catalog.list()] == ["shapes"]


def test_what_the_shelf_refuses(catalog: Catalog, filled: Gallery) -> None:
    shelf = Shelf(catalog.root)
    shelf.create(filled, "one")
    with pytest.raises(AlreadyExists):
        shelf.create(filled, "one")
    for wrong in ("", "../x", "Upper"):
        with pytest.raises(InvalidInput):
            shelf.create(filled, wrong)
    for call in (shelf.get, shelf.delete):
        with pytest.raises(NotFound):
            call("shapes", "two")
    with pytest.raises(AlreadyExists):
        shelf.restore(catalog, "shapes", "one", into="shapes")


def test_a_damaged_snapshot_is_refused_left_out_and_can_be_deleted(catalog: Catalog, filled: Gallery) -> None:
    shelf = Shelf(catalog.root)
    shelf.create(filled, "one")
    contents: Path = catalog.root / FOLDER / "shapes" / "one" / CONTENTS
    contents.write_text("{")
    with pytest.raises(DamagedData):
        shelf.restore(catalog, "shapes", "one", into="again")
    assert shelf.list("shapes") == ()
    shelf.delete("shapes", "one")
    assert not contents.parent.exists()
