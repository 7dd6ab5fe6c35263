"""What is wrong in a folder of galleries: them, and what a server keeps beside them. Read only, beside a server too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from embedding.bundle import Bundle
from embedding.errors import LookalikeError, StorageFailed
from index import Catalog, Gallery, aliases
from index.catalog import LOCK
from index.engine import GalleryEngine
from index.schema import OtherVersion
from index.shelf import Shelf
from service import feedback_store, once
from service.doctor.finding import Finding
from service.settings import Settings
from service.side_store import ASIDE, reading


def galleries(
    settings: Settings, answering: Sequence[Bundle], opened: list[GalleryEngine], *, full: bool
) -> Iterator[Finding]:
    """Every check of the folder, which exists, for a server that answers with these models.

    Galleries that can be read are added to `opened`, to be closed later.
    """
    if settings.engine == "embedded":
        yield from _opened(settings, answering, opened, full=full)
    yield from _snapshots(settings.galleries, full=full)
    yield from _aliases(settings.galleries)
    yield from _requests(settings.galleries)
    yield from _feedback(settings.galleries)


def _opened(
    settings: Settings, answering: Sequence[Bundle], opened: list[GalleryEngine], *, full: bool
) -> Iterator[Finding]:
    try:
        found, damaged = Catalog(settings.galleries, read_only=True).survey()
    except LookalikeError as error:
        yield Finding(check="galleries", state="fail", what=str(error), do="correct the rights of the folder")
        return
    for name, why in damaged.items():
        if isinstance(why, OtherVersion):
            yield _of_another_version(name, why)
            continue
        if isinstance(why, StorageFailed):
            yield Finding(
                check=f"gallery {name}", state="fail", what=str(why), do=f"correct the rights of {name}: chown"
            )
            continue
        yield Finding(
            check=f"gallery {name}",
            state="fail",
            what=str(why),
            do=f"restore it from a snapshot: lookalike gallery restore {name} SNAPSHOT NEW",
        )
    models = {bundle.fingerprint: bundle.name for bundle in answering}
    for gallery in found:
        opened.append(gallery)
        yield from _gallery(gallery, models, full=full)
    if not found and not damaged:
        yield Finding(check="galleries", state="ok", what=f"none yet in {settings.galleries}")


def _of_another_version(name: str, why: OtherVersion) -> Finding:
    if why.newer:
        do = "install the version of lookalike that wrote it, or a later one; or restore a snapshot that this one made"
        return Finding(check=f"gallery {name}", state="fail", what=str(why), do=do)
    return Finding(
        check=f"gallery {name}",
        state="warn",
        what=f"it is sound, and of an earlier version: {why}",
        do="nothing has to be done: the server brings it forward at its start, after which earlier versions refuse it; "
        "its items were not looked at",
    )


def _gallery(gallery: Gallery, models: dict[str, str], *, full: bool) -> Iterator[Finding]:
    check = f"gallery {gallery.id}"
    if models and gallery.model.fingerprint not in models:
        yield Finding(
            check=check,
            state="fail",
            what=f"it holds embeddings of {gallery.model.name}, and {', '.join(models.values())} "
            f"{'answer' if len(models) > 1 else 'answers'}",
            do="serve that model too (`other_bundles`, or lookalike model activate MODEL --keep-previous), or migrate "
            "the gallery: lookalike gallery migrate",
        )
        return
    if full:
        problems = gallery.verify().problems
        for problem in problems:
            yield Finding(
                check=check,
                state="fail",
                what=f"{problem.path}: {problem.what}",
                do=f"run lookalike gallery verify {gallery.id} --repair, which makes segments again from the store; "
                "where the store itself is damaged, restore a snapshot",
            )
        if problems:
            return
    for path, what in gallery.found_at_opening():
        yield Finding(
            check=check,
            state="warn",
            what=f"{path}: {what}",
            do="nothing has to be done: a server takes the vectors from the store, and writes the segment anew; look "
            "whether the disk is sound (dmesg, smartctl)",
        )
    read = "every item agrees" if full else "opens"
    yield Finding(check=check, state="ok", what=f"{read}: {gallery.size:,} items of {gallery.model.name}")


def _snapshots(folder: Path, *, full: bool) -> Iterator[Finding]:
    """Nothing is said of those that are sound, without `full` as far as their sizes tell."""
    shelf = Shelf(folder)
    try:
        for copy in (copy for gallery in shelf.galleries() for copy in shelf.list(gallery, full=full)):
            if copy.damage:
                yield Finding(
                    check=f"snapshot {copy.gallery}/{copy.id}",
                    state="warn",
                    what=f"it cannot be restored: {copy.damage}",
                    do=f"make another one (lookalike gallery snapshot {copy.gallery} NAME), then delete this one: "
                    f"lookalike gallery delete-snapshot {copy.gallery} {copy.id}",
                )
    except (LookalikeError, OSError) as error:
        what = f"they cannot be read: {getattr(error, 'strerror', None) or error}"
        yield Finding(check="snapshots", state="fail", what=what, do="correct the rights of the folder")


def _aliases(folder: Path) -> Iterator[Finding]:
    """Nothing is said of aliases that are sound."""
    try:
        if why := aliases.examined(folder):
            yield Finding(
                check="aliases",
                state="warn",
                what=f"{why}; its copy {aliases.COPY} is sound",
                do="nothing has to be done: the server takes the copy, and sets the damaged file aside",
            )
    except LookalikeError as error:
        yield Finding(
            check="aliases",
            state="fail",
            what=str(error),
            do=f"restore {aliases.FILE} from a backup; or delete it and {aliases.COPY}, and name the aliases again: "
            "lookalike gallery alias",
        )
    yield from _set_aside(folder, "aliases", f"{aliases.ASIDE}*")


def _set_aside(folder: Path, check: str, pattern: str) -> Iterator[Finding]:
    """Files of this name are what a server found damaged."""
    for aside in sorted(folder.glob(pattern)):
        if not aside.name.endswith(("-wal", "-shm")):
            yield Finding(
                check=check,
                state="warn",
                what=f"{aside} was damaged, and set aside by the server",
                do="look whether the disk is sound (dmesg, smartctl), then delete it, and what begins with its name",
            )


def _requests(folder: Path) -> Iterator[Finding]:
    """The ledger of requests; nothing is said of one that is sound or was never needed."""
    path = folder / once.FILE
    try:
        if _is_used(path):
            with reading(path, once.TABLES, advice="a server replaces it", whole=True):
                pass
    except LookalikeError as error:
        yield Finding(
            check="requests",
            state="warn",
            what=str(error),
            do="nothing has to be done: the server sets it aside at the next write and makes a new one; writes of the "
            "last hour that are asked for again are then done again",
        )
    yield from _set_aside(folder, "requests", f"{path.stem}{ASIDE}*")


def _feedback(folder: Path) -> Iterator[Finding]:
    path = folder / feedback_store.FILE
    try:
        if not _is_used(path):
            return
        with reading(path, feedback_store.TABLES, advice=feedback_store.ADVICE, whole=True) as connection:
            (cases,) = connection.execute("SELECT count(*) FROM feedback").fetchone()
    except LookalikeError as error:
        yield Finding(check="feedback", state="fail", what=str(error), do="restore a copy of the file, or move it away")
        return
    yield Finding(check="feedback", state="ok", what=f"{cases:,} cases")


def _is_used(path: Path) -> bool:
    """Whether a store was made: one whose process was killed at its first moment is empty, and made anew."""
    return path.exists() and (not path.is_file() or path.stat().st_size > 0)


def holder(folder: Path) -> int | None:
    """The number of the process that writes to the galleries; None when nobody does, or the system does not say.

    The lock is not touched: a server that starts at this moment must not find it taken by us.
    """
    try:
        inode = (folder / LOCK).stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()  # 7: FLOCK ADVISORY WRITE 4242 08:01:131077 0 EOF
            if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode):
                return int(fields[4])
    except (OSError, ValueError, IndexError):
        return None
    return None
