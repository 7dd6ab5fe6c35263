"""Migrations without a server, beside writers."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embedding.bundle import Bundle
from embedding.encoder import Encoder
from embedding.errors import Busy, Cancelled, ImagesNeeded, InvalidInput, ModelMismatch
from index import GalleryEngine, IndexSettings, Item, Progress
from service import upkeep
from service.engine import Engine
from service.namespace import Namespace
from service.sources import EncodedImage
from service.writes import Draft, UpdateGallery, UpdateItems
from tests.service.harness import make_bundle, png


@pytest.fixture
def old(bundle: Bundle, tmp_path: Path) -> Iterator[Engine]:
    with Engine.open(bundle.path, tmp_path / "galleries", device="cpu", thumbnails=32) as engine:
        engine.create_gallery("old")
        write(engine, *range(6))
        yield engine


@pytest.fixture
def new(old: Engine, tmp_path: Path) -> Engine:
    """The same galleries with another model."""
    return replace(old, encoder=Encoder(make_bundle(tmp_path / "newer", seed=1), device="cpu"))


def write(engine: Engine, *seeds: int, image_of: int | None = None) -> None:
    drafts = [
        Draft(name=f"item-{seed}", image=EncodedImage(data=png(seed if image_of is None else image_of)))
        for seed in seeds
    ]
    for outcome in engine.ask(UpdateItems(gallery="old", drafts=drafts)):
        assert not isinstance(outcome, Exception)


def held(engine: Engine, gallery: str) -> dict[str, bytes]:
    found = engine.gallery(gallery, any_model=True)
    return {item.name: item.embedding.tobytes() for item in found.iterate()}


def expected(engine: Engine, seeds: dict[str, int]) -> dict[str, bytes]:
    emb_ND = engine.encoder.encode([png(seed) for seed in seeds.values()])
    return {name: np.asarray(emb_D).tobytes() for name, emb_D in zip(seeds, emb_ND, strict=True)}


class During:
    """Runs something once, when a migration first says that it embeds."""

    def __init__(self, action: object) -> None:
        self._action = action
        self.passes = 0

    def __call__(self, progress: Progress) -> None:
        if progress.stage.startswith("embedding") and progress.done == progress.total:
            self.passes += 1
            if self.passes == 1:
                self._action()  # type: ignore[operator]


def test_writes_during_a_migration_are_taken_over(old: Engine, new: Engine) -> None:
    def writes() -> None:
        write(old, 7)  # new
        write(old, 1, image_of=8)  # changed
        old.gallery("old").delete(["item-2"])

    during = During(writes)
    target = upkeep.Migration(new, "old", "new", alias="now").run(during)
    assert during.passes == 2
    seeds = {f"item-{seed}": seed for seed in (0, 3, 4, 5, 7)} | {"item-1": 8}
    assert held(new, "new") == expected(new, seeds)
    assert new.names.aliases.get("now") == target.id == "new"
    assert old.gallery("old").size == 6


def test_what_was_imported_into_the_new_gallery_alone_stays(old: Engine, new: Engine) -> None:
    new.create_gallery("new")
    drafts = [Draft(name="extra", image=EncodedImage(data=png(11)))]
    new.ask(UpdateItems(gallery="new", drafts=drafts))
    upkeep.Migration(new, "old", "new").run(lambda progress: None)
    assert held(new, "new") == expected(new, {f"item-{seed}": seed for seed in range(6)} | {"extra": 11})


def test_a_migration_done_again_takes_over_what_has_changed_since(old: Engine, new: Engine) -> None:
    upkeep.Migration(new, "old", "new").run(lambda progress: None)
    by_hand = [Draft(name="item-4", image=EncodedImage(data=png(14)))]
    new.ask(UpdateItems(gallery="new", drafts=by_hand))
    first = new.gallery("new").get("item-0").etag
    draft = Draft(name="item-1", image=EncodedImage(data=png(11)), identity="ada", metadata={"price": 2})
    old.ask(UpdateItems(gallery="old", drafts=[draft]))
    old.gallery("old").delete(["item-2", "item-3"])
    upkeep.Migration(new, "old", "new", alias="now").run(lambda progress: None)
    assert held(new, "now") == expected(new, {"item-0": 0, "item-1": 11, "item-4": 14, "item-5": 5})
    changed = new.gallery("now").get("item-1")
    assert (changed.identity, changed.metadata) == ("ada", {"price": 2})
    assert new.gallery("now").get("item-0").etag == first, "what was sound was embedded again"


def test_one_broken_off_goes_on_with_what_has_changed_since(
    old: Engine, new: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "BATCH", 2)

    def cancel(progress: Progress) -> None:
        if progress.stage.startswith("embedding") and progress.done == 4:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        upkeep.Migration(new, "old", "new").run(cancel)
    write(old, 0, image_of=10)
    old.gallery("old").delete(["item-1"])
    upkeep.Migration(new, "old", "new").run(lambda progress: None)
    assert held(new, "new") == expected(new, {"item-0": 10, "item-2": 2, "item-3": 3, "item-4": 4, "item-5": 5})


def test_what_the_source_has_written_after_an_import_replaces_it(old: Engine, new: Engine) -> None:
    new.create_gallery("new")
    drafts = [Draft(name=f"item-{seed}", image=EncodedImage(data=png(20 + seed))) for seed in (0, 1)]
    new.ask(UpdateItems(gallery="new", drafts=drafts))
    write(old, 1, image_of=9)
    upkeep.Migration(new, "old", "new").run(lambda progress: None)
    seeds = {f"item-{seed}": seed for seed in range(2, 6)} | {"item-0": 20, "item-1": 9}
    assert held(new, "new") == expected(new, seeds)


def test_an_import_beside_a_migration_is_kept(old: Engine, new: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while the item's thumbnail is being embedded, in one case after the migration has looked for it."""
    real_embedded, real_outdated = upkeep.Migration._embedded, upkeep.Migration._outdated
    looks = 0

    def imported(seed: int, image_of: int) -> None:
        drafts = [Draft(name=f"item-{seed}", image=EncodedImage(data=png(image_of)))]
        new.ask(UpdateItems(gallery="new", drafts=drafts))

    def embedded(self: upkeep.Migration, items: Iterable[Item]) -> list[Item]:
        made = real_embedded(self, items)
        if looks == 2:  # the first was for the images
            imported(0, 30)
        return made

    def outdated(self: upkeep.Migration, target: GalleryEngine, items: Collection[Item]) -> dict[Item, str]:
        nonlocal looks
        found = real_outdated(self, target, items)
        looks += 1
        if looks == 3:  # after it has been looked at for the last time
            imported(1, 31)
        return found

    upkeep.Migration(new, "old", "new").run(lambda progress: None)
    write(old, *range(6))
    looks = 0
    monkeypatch.setattr(upkeep.Migration, "_outdated", outdated)
    monkeypatch.setattr(upkeep.Migration, "_embedded", embedded)
    upkeep.Migration(new, "old", "new").run(lambda progress: None)
    seeds = {f"item-{seed}": seed for seed in range(2, 6)} | {"item-0": 30, "item-1": 31}
    assert held(new, "new") == expected(new, seeds)


def test_two_galleries_are_not_migrated_into_one(old: Engine, new: Engine) -> None:
    upkeep.Migration(new, "old", "new").run(lambda progress: None)
    old.create_gallery("other")
    with pytest.raises(InvalidInput, match="migrated from another gallery"):
        upkeep.Migration(new, "other", "new").run(lambda progress: None)
    assert new.gallery("new").size == 6
    old.gallery("old").delete([f"item-{seed}" for seed in range(6)])
    assert upkeep.Migration(new, "old", "new").run(lambda progress: None).size == 0


def test_a_cancelled_migration_moves_no_alias_and_goes_on_later(
    old: Engine, new: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "BATCH", 2)
    new.names.put_alias("now", "old")

    def cancel(progress: Progress) -> None:
        if progress.stage.startswith("embedding") and progress.done == 2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        upkeep.Migration(new, "old", "new", alias="now").run(cancel)
    assert new.names.aliases.get("now") == "old"
    assert len(held(new, "new")) == 2
    upkeep.Migration(new, "old", "new", alias="now").run(lambda progress: None)
    assert new.names.aliases.get("now") == "new"
    assert held(new, "new") == expected(new, {f"item-{seed}": seed for seed in range(6)})


def test_an_image_lost_during_a_migration_stops_it(old: Engine, new: Engine) -> None:
    def bare() -> None:
        gallery = old.gallery("old")
        gallery.upsert([replace(gallery.get("item-0"), etag="", thumbnail=None)])

    new.names.put_alias("now", "old")
    with pytest.raises(ImagesNeeded, match="item-0"):
        upkeep.Migration(new, "old", "new", alias="now").run(During(bare))
    assert new.names.aliases.get("now") == "old"


def test_a_damaged_thumbnail_is_named(old: Engine, new: Engine) -> None:
    gallery = old.gallery("old")
    gallery.upsert([replace(gallery.get("item-3"), etag="", thumbnail=b"not an image")])
    with pytest.raises(ImagesNeeded, match=r"item-3.*cannot be read"):
        upkeep.Migration(new, "old", "new").run(lambda progress: None)


def test_thumbnails_survive_an_update_of_other_fields(old: Engine) -> None:
    draft = Draft(name="item-0", image=None, identity="ada", parts=frozenset({"identity"}))
    (outcome,) = old.ask(UpdateItems(gallery="old", drafts=[draft]))
    assert not isinstance(outcome, Exception)
    assert old.gallery("old").thumbnail("item-0") == png(0)


def test_no_write_is_lost_in_the_moment_in_which_an_alias_moves(
    old: Engine, new: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writers that came through the alias: one is in the midst of its write when the migration has caught up and wants
    to move the alias; another comes while it moves, and a third has named its gallery before and stores afterwards."""
    new.names.put_alias("now", "old")
    inside, go_on = threading.Event(), threading.Event()
    source = old.gallery("old")
    real_upsert, real_closed, real_put = type(source).upsert, new.names.gate.closed, Namespace.put_alias
    refused: list[Exception] = []
    deletions: list[int] = []

    def slow(self: object, items: object, **more: object) -> object:
        if self is source:
            inside.set()
            assert go_on.wait(timeout=20)
        return real_upsert(self, items, **more)  # type: ignore[arg-type]

    def closing() -> object:
        go_on.set()
        return real_closed()

    late = UpdateItems(gallery="now", drafts=[Draft(name="late", image=EncodedImage(data=png(30)))])
    answer = late.begin(old)
    emb_D = old.encoder.encode([png(30)])[0]

    def deleting() -> None:
        with old.written("now", any_model=True) as gallery:
            deletions.append(gallery.delete(["item-1"]))

    deleter = threading.Thread(target=deleting)

    def moving(self: Namespace, *names: str, **more: object) -> None:
        deleter.start()  # held up until the alias has moved
        real_put(self, *names, **more)  # type: ignore[arg-type]

    drafts = [Draft(name="amid", image=EncodedImage(data=png(20)))]
    writer = threading.Thread(target=old.ask, args=(UpdateItems(gallery="now", drafts=drafts),))
    with monkeypatch.context() as patch:
        patch.setattr(type(source), "upsert", slow)
        patch.setattr(new.names.gate, "closed", closing)
        patch.setattr(Namespace, "put_alias", moving)
        writer.start()
        assert inside.wait(timeout=20)
        upkeep.Migration(new, "old", "new", alias="now").run(lambda progress: None)
        writer.join(timeout=20)
        deleter.join(timeout=20)
    try:
        answer([emb_D])
    except ModelMismatch as error:
        refused.append(error)
    assert len(refused) == 1, "an embedding of the old model was stored as one of the new"
    assert deletions == [1]
    assert old.gallery("old", any_model=True).size == 7
    seeds = {f"item-{seed}": seed for seed in (0, 2, 3, 4, 5)} | {"amid": 20}
    assert held(new, "now") == expected(new, seeds)


def test_a_migration_ends_beside_writers_who_never_pause(old: Engine, new: Engine) -> None:
    """Each pass finds that something was written during the one before; the last of it is copied while writes wait."""
    new.names.put_alias("now", "old")
    passes: set[str] = set()

    def writing(progress: Progress) -> None:
        if progress.stage.startswith("embedding, pass") and progress.stage not in passes:
            passes.add(progress.stage)
            write(old, 30 + len(passes))
            old.gallery("old").delete([f"item-{len(passes) - 1}"])

    upkeep.Migration(new, "old", "new", alias="now").run(writing)
    assert len(passes) == 3
    assert held(new, "now") == expected(new, {f"item-{seed}": seed for seed in (3, 4, 5, 31, 32, 33)})


def test_writers_who_are_faster_than_the_encoder_keep_a_migration_from_ending(
    old: Engine, new: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "BATCH", 2)
    new.names.put_alias("now", "old")
    done: set[tuple[str, int]] = set()

    def writing(progress: Progress) -> None:
        if progress.stage.startswith("embedding, pass") and (progress.stage, progress.done) not in done:
            done.add((progress.stage, progress.done))
            write(old, len(done) % 6)

    with pytest.raises(Busy, match="pause the writes"):
        upkeep.Migration(new, "old", "new", alias="now").run(writing)
    assert new.names.aliases.get("now") == "old"
    upkeep.Migration(new, "old", "new", alias="now").run(lambda progress: None)
    assert held(new, "now") == expected(new, {f"item-{seed}": seed for seed in range(6)})


def configure(engine: Engine, gallery: str, settings: IndexSettings, part: str) -> None:
    UpdateGallery(gallery=gallery, settings=settings, parts=[part]).write(engine)


def test_settings_changed_during_a_migration_are_taken_over(old: Engine, new: Engine) -> None:
    new.create_gallery("new", IndexSettings(structure="hnsw", min_recall=0.7))
    new.names.put_alias("now", "old")
    configuring = During(lambda: configure(old, "now", IndexSettings(min_recall=0.8), "min_recall"))
    upkeep.Migration(new, "old", "new", alias="now").run(configuring)
    settings = new.gallery("now").stats().settings
    assert (settings.min_recall, settings.structure) == (0.8, "hnsw")


@pytest.mark.parametrize("made_before", [False, True])
def test_settings_changed_after_a_migration_was_broken_off_are_taken_over(
    old: Engine, new: Engine, monkeypatch: pytest.MonkeyPatch, made_before: bool
) -> None:
    monkeypatch.setattr(upkeep, "BATCH", 2)
    new.names.put_alias("now", "old")
    if made_before:
        new.create_gallery("new")

    def cancel(progress: Progress) -> None:
        if progress.stage.startswith("embedding") and progress.done == 2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        upkeep.Migration(new, "old", "new", alias="now").run(cancel)
    new.gallery("new").reindex(IndexSettings(structure="hnsw", memory_bytes=7))
    configure(old, "now", IndexSettings(min_recall=0.8), "min_recall")
    upkeep.Migration(new, "old", "new", alias="now").run(lambda progress: None)
    settings = new.gallery("now").stats().settings
    assert (settings.min_recall, settings.structure, settings.memory_bytes) == (0.8, "hnsw", 7)

    configure(new, "now", IndexSettings(min_recall=0.6), "min_recall")
    upkeep.Migration(new, "old", "new", alias="now").run(lambda progress: None)
    assert new.gallery("now").stats().settings.min_recall == 0.6, "of the old gallery nothing was changed since"


def test_settings_changed_while_an_alias_moves_are_those_of_its_new_gallery(
    old: Engine, new: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    new.names.put_alias("now", "old")
    come = threading.Event()
    real_passing, real_put = new.names.gate.passing, Namespace.put_alias
    configuring = threading.Thread(target=configure, args=(old, "now", IndexSettings(min_recall=0.8), "min_recall"))

    def passing() -> object:
        come.set()
        return real_passing()

    def moving(self: Namespace, *names: str, **more: object) -> None:
        configuring.start()
        assert come.wait(timeout=20)
        real_put(self, *names, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(new.names.gate, "passing", passing)
        patch.setattr(Namespace, "put_alias", moving)
        upkeep.Migration(new, "old", "new", alias="now").run(lambda progress: None)
        configuring.join(timeout=20)
    assert new.gallery("now").stats().settings.min_recall == 0.8
    assert old.gallery("old").stats().settings.min_recall != 0.8
