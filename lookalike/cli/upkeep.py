"""`lookalike gallery`, further commands: purge, index anew, copy and restore, move to another model, aliases."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from rich.progress import BarColumn, Progress, TextColumn

from embedding.errors import InvalidInput
from embedding.terminal import is_live
from lookalike.cli import options, show, told
from lookalike.cli.backend import Backend, open_backend
from lookalike.types import Operation

_LOOK_SECONDS = 0.2

_WHY = {
    "few-rows": "with {rows:,} rows exact search is as fast; it is built as the gallery grows",
    "odd-width": "it needs embeddings of an even width of 16 or more",
    "sealed-before": "it was sealed before that structure was asked for; `lookalike gallery reindex` builds it",
}
"""Why a part has another structure than the one asked for."""

Draw: TypeAlias = Callable[[str, int, int], None]
"""Shows the stage of long work, how far that is, and how far it has to go; 0 when that is not known."""

DAMAGED = 1
"""Exit code of `verify` when damage stays."""

SnapshotName = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="1 to 63 lower-case letters, digits, hyphens.")]
NewGallery = Annotated[str, typer.Argument(metavar="NEW", help="The gallery to make.", parser=options.gallery_id)]


def add_commands(app: typer.Typer) -> None:
    """Make these commands of `lookalike gallery`."""
    commands: dict[str, Callable[..., None]] = {
        "show": describe,
        "configure": configure,
        "purge": purge,
        "reindex": reindex,
        "verify": verify,
        "migrate": migrate,
        "snapshot": snapshot,
        "snapshots": snapshots,
        "delete-snapshot": delete_snapshot,
        "restore": restore,
        "alias": alias,
        "aliases": aliases,
        "delete-alias": delete_alias,
    }
    for name, command in commands.items():
        app.command(name=name)(command)


def describe(
    gallery: options.StoredGallery,
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
    json: options.Json = False,
) -> None:
    """Describe a gallery: its size, how it is indexed, and how well that was measured to search."""
    with open_backend(target, bundle, data) as backend:
        found = backend.get_gallery(gallery)
    if json:
        print(show.as_json(found))
        return
    out = show.console()
    items = show.counted(found.item_count, "item")
    out.print(f"gallery {found.id}: {items} of model {found.model}, generation {found.generation}")
    if found.damage:
        out.print(f"damaged: {found.damage}")
    if found.index:
        bound = f", at most {found.index.memory_bytes:,} bytes in memory" if found.index.memory_bytes else ""
        kept = ", vectors in float16" if found.index.vectors == "float16" else ""
        out.print(f"index: {found.index.structure}, recall {found.index.min_recall:g} or more{bound}{kept}")
    if found.stats:
        stats = found.stats
        out.print(
            f"{stats.disk_bytes:,} bytes on disk, {stats.memory_bytes:,} in memory; "
            f"{show.counted(stats.fresh_items, 'item')} not sealed yet, {show.counted(stats.dead_rows, 'dead row')}"
            + (f"; {stats.busy}" if stats.busy else "")
        )
        if stats.last_failure:
            out.print(f"background work last failed: {stats.last_failure}")
        table = show.table(["segment", "rows", "structure", "k", "recall", "of matches", "µs a query"])
        for number, segment in enumerate(stats.segments, start=1):
            if not segment.curve:
                table.add_row(str(number), f"{segment.rows:,}", segment.structure)
            for point in segment.curve:
                table.add_row(
                    str(number),
                    f"{segment.rows:,}",
                    segment.structure,
                    str(point.k),
                    f"{point.recall:.3f}",
                    f"{point.match_recall:.3f}",
                    f"{point.microseconds:,.0f}",
                )
        if stats.segments:
            out.print(table)
        for number, segment in enumerate(stats.segments, start=1):
            if segment.fallback:
                out.print(f"segment {number}: {_WHY[segment.fallback].format(rows=segment.rows)}")


def configure(
    gallery: options.StoredGallery,
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
    min_recall: options.MinRecall = None,
    structure: options.Structure = None,
    memory_bytes: options.MemoryBytes = None,
    vectors: options.Vectors = None,
) -> None:
    """Change how a gallery is indexed, from its next sealing on; `reindex` does it at once."""
    with open_backend(target, bundle, data, read_only=False) as backend:
        found = backend.get_gallery(gallery)
        settings = options.index_settings(found.index, min_recall, structure, memory_bytes, vectors)
        if settings is None:
            raise InvalidInput("nothing to change: give --min-recall, --structure, --memory-bytes or --vectors")
        changed = backend.update_gallery(gallery, settings, etag=found.etag)
    settings = changed.index or settings
    print(f"gallery {changed.id} will be indexed as {settings.structure}, recall {settings.min_recall:g} or more")


def purge(
    gallery: options.StoredGallery,
    filter: Annotated[str, typer.Argument(metavar="FILTER", help="Which items; '*' for all. See docs/filters.md.")],
    force: Annotated[bool, typer.Option("--force", help="Delete them; without it they are only counted.")] = False,
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
) -> None:
    """Delete every item that a filter accepts, in one step."""
    with open_backend(target, bundle, data, read_only=not force) as backend:
        purged = backend.purge_items(gallery, filter, force=force)
    if force:
        print(f"deleted {show.counted(purged.count, 'item')} of gallery {gallery}")
        return
    for name in purged.sample:
        print(name.id)
    more = f", the first {len(purged.sample)} of them above" if purged.count > len(purged.sample) else ""
    print(f"would delete {show.counted(purged.count, 'item')} of gallery {gallery}{more}; --force deletes them")


def reindex(
    gallery: options.StoredGallery,
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
    min_recall: options.MinRecall = None,
    structure: options.Structure = None,
    memory_bytes: options.MemoryBytes = None,
    vectors: options.Vectors = None,
) -> None:
    """Merge a gallery into one segment and tune its index anew."""
    with open_backend(target, bundle, data, read_only=False) as backend:
        settings = None
        if not (min_recall is None and structure is None and memory_bytes is None and vectors is None):
            present = backend.get_gallery(gallery).index
            settings = options.index_settings(present, min_recall, structure, memory_bytes, vectors)
        done = _finished(backend, backend.reindex_gallery(gallery, index=settings))
    segments = done.gallery.stats.segments if done.gallery and done.gallery.stats else ()
    print(f"indexed gallery {done.target}: " + (segments[0].structure if segments else "nothing in it"))
    asked = done.gallery.index.structure if done.gallery and done.gallery.index else "auto"
    if segments and segments[0].fallback:
        print(f"{asked} was asked for and is not used: {_WHY[segments[0].fallback].format(rows=segments[0].rows)}")


def verify(
    gallery: options.StoredGallery,
    repair: Annotated[bool, typer.Option("--repair", help="Make again what is damaged, where the store can.")] = False,
    target: options.Target = None,
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", metavar="DIR", help="Look into the folder, whatever LOOKALIKE_TARGET says; not read."),
    ] = None,
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="DIR", envvar="LOOKALIKE_GALLERIES", help="Without --target: the folder of galleries."
        ),
    ] = options.DEFAULT_GALLERIES,
    json: options.Json = False,
) -> None:
    """Check every file, sum and vector of a gallery, one that cannot be opened too; exit with 1 when damage stays.

    Without --target the gallery is one of the folder given by --data, and no bundle is needed.
    """
    if not target and not bundle:
        target = os.environ.get("LOOKALIKE_TARGET")
    if target:
        with open_backend(target, bundle, data) as backend:
            found = _finished(backend, backend.verify_gallery(gallery, repair=repair)).verification
        if found is None:
            raise InvalidInput("the server has not said what it found; ask one of this version")
    else:
        from lookalike.cli.local import verified

        with _bar("verify") as draw:
            found = verified(data, gallery, repair=repair, on_progress=lambda now: draw(now.stage, now.done, now.total))
    if json:
        print(show.as_json(found))
    else:
        for problem in found.problems:
            print(f"{problem.path}: {problem.what}" + (" (made again)" if problem.repaired else ""))
        left = sum(not problem.repaired for problem in found.problems)
        items, files = show.counted(found.item_count, "item"), show.counted(found.file_count, "file")
        said = f"gallery {found.gallery}: {items}, {files} checked, "
        if not left:
            print(said + ("all damage is mended" if found.problems else "nothing is wrong"))
        else:
            advice = "" if repair else "; --repair mends what the store can"
            print(f"{said}{show.counted(left, 'problem')} left{advice}")
    if not found.sound:
        raise typer.Exit(DAMAGED)


def migrate(
    gallery: options.StoredGallery,
    new: NewGallery,
    alias: Annotated[str, typer.Option("--alias", help="Move this alias to the new gallery when it is whole.")] = "",
    model: Annotated[
        str, typer.Option("--model", help="With --target: which of the server's models; else the active.")
    ] = "",
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
    device: options.DeviceHere = "auto",
) -> None:
    """Embed a gallery's stored thumbnails with another model into a new gallery; the old one answers until it is whole.

    Items whose image is not stored must be in the new gallery before: create it and add their images.
    """
    with open_backend(target, bundle, data, read_only=False, device=device) as backend:
        done = _finished(backend, backend.migrate_gallery(gallery, new, model=model, alias=alias))
    items = show.counted(done.gallery.item_count, "item") if done.gallery else "nothing"
    print(f"gallery {new} holds {items}" + (f"; alias {alias} stands for it" if alias else ""))


def snapshot(
    gallery: options.StoredGallery,
    snapshot: SnapshotName,
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
) -> None:
    """Copy a gallery, at one generation, beside the galleries; searches and writes go on."""
    with open_backend(target, bundle, data, read_only=False) as backend:
        copy = _finished(backend, backend.create_snapshot(gallery, snapshot)).snapshot
    if copy:
        print(f"copied gallery {copy.gallery} at generation {copy.generation} as {copy.id} ({copy.size_bytes:,} bytes)")


def snapshots(
    gallery: options.StoredGallery,
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
    json: options.Json = False,
) -> None:
    """List the snapshots of a gallery; as JSON, one line each."""
    table = show.table(["snapshot", "generation", "bytes", "made", "damage"])
    with open_backend(target, bundle, data) as backend:
        for copy in backend.list_snapshots(gallery):
            generation = "" if copy.damage else str(copy.generation)
            made = f"{copy.create_time:%Y-%m-%d %H:%M}"
            table.add_row(copy.id, generation, f"{copy.size_bytes:,}", made, copy.damage)
            if json:
                print(show.as_json(copy))
    if not json:
        show.console().print(table)
    if not table.row_count:
        print(f"there are no snapshots of a gallery {gallery}", file=sys.stderr)


def delete_snapshot(
    gallery: options.StoredGallery,
    snapshot: SnapshotName,
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
) -> None:
    """Delete a snapshot of a gallery."""
    with open_backend(target, bundle, data, read_only=False) as backend:
        backend.delete_snapshot(gallery, snapshot)
    print(f"deleted snapshot {snapshot} of gallery {gallery}")


def restore(
    gallery: options.StoredGallery,
    snapshot: SnapshotName,
    new: NewGallery,
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
) -> None:
    """Make a new gallery from a snapshot of a gallery."""
    with open_backend(target, bundle, data, read_only=False) as backend:
        done = _finished(backend, backend.restore_gallery(gallery, snapshot, new))
    items = show.counted(done.gallery.item_count, "item") if done.gallery else ""
    print(f"gallery {new} holds {items}" if items else f"restored gallery {new}")


def alias(
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="A name that no gallery has.")],
    gallery: options.StoredGallery,
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
) -> None:
    """Let a name stand for a gallery, or move it to another, in one step."""
    with open_backend(target, bundle, data, read_only=False) as backend:
        put = backend.put_alias(alias, gallery)
    print(f"alias {put.id} stands for gallery {put.gallery}")


def aliases(
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
    json: options.Json = False,
) -> None:
    """List the aliases; as JSON, one line each."""
    table = show.table(["alias", "gallery"])
    with open_backend(target, bundle, data) as backend:
        for found in backend.list_aliases():
            table.add_row(found.id, found.gallery)
            if json:
                print(show.as_json(found))
    if not json:
        show.console().print(table)


def delete_alias(
    alias: Annotated[str, typer.Argument(metavar="ALIAS")],
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
) -> None:
    """Delete an alias; the gallery stays."""
    with open_backend(target, bundle, data, read_only=False) as backend:
        backend.delete_alias(alias)
    print(f"deleted alias {alias}")


def _finished(backend: Backend, operation: Operation) -> Operation:
    """The operation once it is done, shown as it goes. Raises what it failed with; an interrupt cancels it."""
    try:
        with _bar(operation.verb) as draw:
            while not operation.done:
                operation = backend.wait_operation(operation.id, seconds=_LOOK_SECONDS)
                draw(operation.stage, operation.progress, operation.total)
    except KeyboardInterrupt:
        backend.cancel_operation(operation.id)
        raise
    if operation.error is not None:
        raise operation.error
    return operation


@contextmanager
def _bar(verb: str) -> Iterator[Draw]:
    """A bar on the terminal, drawn by what is yielded; a line now and then where stderr is none."""
    console, said = show.console(stderr=True), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f}"))
    with Progress(*columns, console=console, transient=True, disable=not is_live(console)) as bar:
        shown = bar.add_task(verb, total=1)

        def draw(stage: str, done: int, total: int) -> None:
            nonlocal said
            if bar.disable and time.monotonic() - said >= told.SAY_SECONDS:
                said = time.monotonic()
                console.print(f"{verb}: {stage} {done:,.0f}/{max(total, done, 1):,.0f}")
            bar.update(shown, description=f"{verb}: {stage}", completed=done, total=max(total, done, 1))

        yield draw
