from __future__ import annotations

from pathlib import Path

import pytest

from embedding.decision import Vectors
from embedding.errors import AlreadyExists, DamagedData, InvalidInput, NotFound
from index import Catalog, Gallery, Item, ModelRef, Progress
from index.copies import CONTENTS
from index.live import STORE
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


def test_what_a_killed_process_has_left_is_cleared_away(catalog: Catalog, filled: Gallery) -> None:
    shelf = Shelf(catalog.root)
    copy = shelf.create(filled, "one")
    for left in (".two.partial-4711", ".deleted-0123"):
        (catalog.root / FOLDER / "shapes" / left / "segments").mkdir(parents=True)
    (catalog.root / FOLDER / "shapes" / ".theirs").mkdir()
    shelf.clear_away()
    assert sorted(path.name for path in (catalog.root / FOLDER / "shapes").iterdir()) == [".theirs", "one"]
    assert shelf.list("shapes") == (copy,)
    Shelf(catalog.root / "nowhere").clear_away()


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


@pytest.mark.parametrize(("of", "name"), [("..", "shapes"), ("shapes", ".."), ("shapes", "../../shapes"), ("", "one")])
def test_no_name_leads_out_of_the_shelf(catalog: Catalog, filled: Gallery, of: str, name: str) -> None:
    shelf = Shelf(catalog.root)
    shelf.create(filled, "one")
    for call in (shelf.get, shelf.delete, shelf.model):
        with pytest.raises(InvalidInput):
            call(of, name)
    with pytest.raises(InvalidInput):
        shelf.restore(catalog, of, name, into="again")
    assert [item.name for item in filled.iterate()]


def test_a_snapshot_goes_at_once_and_its_folder_says_that_there_were_some(
    catalog: Catalog, filled: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(catalog.root)
    assert (shelf.keeps("shapes"), shelf.has_kept("shapes")) == (False, False)
    shelf.create(filled, "one")
    assert (shelf.keeps("shapes"), shelf.has_kept("shapes")) == (True, True)

    with monkeypatch.context() as patch:
        patch.setattr("embedding.durable.shutil.rmtree", lambda *_, **__: None)  # as where the process is killed
        shelf.delete("shapes", "one")
    assert shelf.list("shapes") == (), "never half of one"
    assert (shelf.keeps("shapes"), shelf.has_kept("shapes")) == (False, True)
    with pytest.raises(NotFound):
        shelf.model("shapes", "one")


def test_damage_that_only_reading_finds_is_told_as_such(catalog: Catalog, filled: Gallery) -> None:
    shelf = Shelf(catalog.root)
    shelf.create(filled, "one")
    store: Path = catalog.root / FOLDER / "shapes" / "one" / STORE
    content = bytearray(store.read_bytes())
    content[-1] ^= 1
    store.write_bytes(content)
    assert [bool(copy.damage) for full in (False, True) for copy in shelf.list("shapes", full=full)] == [False, True]
    with pytest.raises(DamagedData):
        shelf.restore(catalog, "shapes", "one", into="again")


def test_a_damaged_snapshot_is_listed_as_such_refused_and_can_be_deleted(catalog: Catalog, filled: Gallery) -> None:
    shelf = Shelf(catalog.root)
    sound = shelf.create(filled, "sound")
    for damage, told in {
        "{": "copy.json is no list of what a snapshot holds",
        "": "copy.json is no list of what a snapshot holds",
        "gone": "copy.json cannot be read: No such file or directory",
        "no store": "store.sqlite is missing",
        "cut": "store.sqlite has 100 bytes instead of",
    }.items():
        shelf.create(filled, "one")
        folder: Path = catalog.root / FOLDER / "shapes" / "one"
        if damage == "gone":
            (folder / CONTENTS).unlink()
        elif damage == "no store":
            (folder / STORE).unlink()
        elif damage == "cut":
            (folder / STORE).write_bytes((folder / STORE).read_bytes()[:100])
        else:
            (folder / CONTENTS).write_text(damage)
        damaged, beside = shelf.list("shapes")
        assert beside == sound
        assert (damaged.id, damaged.generation) == ("one", 0)
        assert damaged.size_bytes > 0
        assert damaged.damage.startswith(told)
        for ask in (lambda: shelf.restore(catalog, "shapes", "one", into="again"), lambda: shelf.get("shapes", "one")):
            with pytest.raises(
                DamagedData, match=r"^snapshot 'one' of gallery 'shapes' cannot be restored: "
            ) as caught:
                ask()
            assert told in str(caught.value)
            assert "restore another one" in str(caught.value)
            assert "\n" not in str(caught.value)
        with pytest.raises(NotFound):
            catalog.get("again")
        shelf.delete("shapes", "one")
        assert not folder.exists()


def test_the_contents_of_a_snapshot_cut_anywhere(catalog: Catalog, filled: Gallery) -> None:
    shelf = Shelf(catalog.root)
    shelf.create(filled, "one")
    contents: Path = catalog.root / FOLDER / "shapes" / "one" / CONTENTS
    whole = contents.read_bytes()
    for length in range(len(whole)):
        contents.write_bytes(whole[:length])
        (copy,) = shelf.list("shapes")
        assert copy.damage, length


def test_what_is_no_snapshot_is_not_listed(catalog: Catalog, filled: Gallery) -> None:
    shelf = Shelf(catalog.root)
    assert shelf.galleries() == ()
    copy = shelf.create(filled, "one")
    (catalog.root / FOLDER / "shapes" / ".one.partial-7").mkdir()
    (catalog.root / FOLDER / "shapes" / "notes.txt").touch()
    (catalog.root / FOLDER / "shapes" / "file").touch()
    assert shelf.list("shapes") == (copy,)
    assert shelf.galleries() == ("shapes",)


@pytest.mark.parametrize("is_made_again", [False, True])
def test_a_snapshot_that_is_deleted_while_it_is_restored_is_not_told_to_be_damaged(
    catalog: Catalog, filled: Gallery, pool: Vectors, is_made_again: bool
) -> None:
    shelf = Shelf(catalog.root)
    shelf.create(filled, "one")
    turns = iter([True])

    def deleting(_: Progress) -> None:
        if next(turns, False):
            shelf.delete("shapes", "one")
            if is_made_again:
                filled.upsert([Item(name="new", embedding=pool[0])])
                filled.compact()
                shelf.create(filled, "one")

    with pytest.raises(NotFound, match="deleted while it was restored"):
        shelf.restore(catalog, "shapes", "one", into="again", on_progress=deleting)
    assert [path.name for path in catalog.root.iterdir() if path.name.startswith((".making", "again"))] == []
