"""Batch jobs beside the searches they are made of, and what they take in memory as queries grow.

    python -m benchmarks.batch_jobs [--quick] [--json FILE]

Processor time of all threads, one thread a search: what a busy machine does besides does not count. Jobs run in
processes of their own, whose peak of resident memory is looked at.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.data import Data
from benchmarks.made import CALIBRATION
from benchmarks.measure import machine
from benchmarks.report import Report
from benchmarks.service_search import GALLERY, fill
from benchmarks.service_server import drawings
from embedding.bundle import Bundle
from embedding.decision import Judge
from embedding.encoder import Encoder
from index import Catalog, Gallery
from index.batch import run
from index.batch.images import ImageFolder
from index.batch.queries import Array
from index.batch.search import EMBEDDINGS, IMAGES, GalleryAnswering, Wanted, image_bytes
from index.telling import MANY_NAMES

K = 10
GROWTH = 1.15
"""Times the peak memory of a tenth of the queries that a job may take."""


@dataclass(frozen=True, slots=True)
class Taken:
    """By one way to answer all queries, in a process of its own."""

    processor_s: float
    wall_s: float
    peak_mb: float


def job(place: Path, queries: Path) -> Taken:
    """The answers as Parquet shards; `queries` is an array, or a folder of images."""
    encoder = _encoder_for(place, queries)
    with Catalog(place / "galleries", read_only=True) as catalog, tempfile.TemporaryDirectory(dir=place) as out:
        gallery = catalog.get(GALLERY)
        asked = ImageFolder(queries) if queries.is_dir() else Array(queries)
        answering = GalleryAnswering(
            gallery, Wanted(judge=_judge(gallery), k=K), encoder=encoder, images=queries.is_dir(), threads=1
        )
        conditions = answering.conditions(asked, {"k": K})
        cpu, wall = time.process_time(), time.perf_counter()
        run(Path(out) / "job", asked, answering, conditions)
        return Taken(time.process_time() - cpu, time.perf_counter() - wall, _peak_mb())


def alone(place: Path, queries: Path) -> Taken:
    """The same batches embedded and searched, and nothing kept."""
    encoder = _encoder_for(place, queries)
    with Catalog(place / "galleries", read_only=True) as catalog:
        gallery = catalog.get(GALLERY)
        judge = _judge(gallery)
        cpu, wall = time.process_time(), time.perf_counter()
        if encoder is not None:
            paths = sorted(queries.iterdir())
            for at in range(0, len(paths), IMAGES):
                emb_BD = encoder.encode([image_bytes(path) for path in paths[at : at + IMAGES]])
                gallery.search_batch(emb_BD, k=K, judge=judge, threads=1, telling=MANY_NAMES)
        else:
            rows_ND = np.load(queries, mmap_mode="r")
            for at in range(0, len(rows_ND), EMBEDDINGS):
                some_QD = np.asarray(rows_ND[at : at + EMBEDDINGS])
                gallery.search_batch(some_QD, k=K, judge=judge, threads=1, telling=MANY_NAMES)
        return Taken(time.process_time() - cpu, time.perf_counter() - wall, _peak_mb())


def measure(report: Report, *, rows: int, embeddings: int, images: int, turns: int) -> None:
    """Both ways by turns, on embeddings and on images; then memory by the number of queries."""
    with tempfile.TemporaryDirectory() as made:
        place, data = Path(made), Data(None)
        fill(place / "bundle", place / "galleries", data.rows(rows))
        arrays = {count: place / f"{count}.npy" for count in (embeddings // 10, embeddings)}
        for count, path in arrays.items():
            np.save(path, data.rows(count, seed=1, of=rows))
        (place / "images").mkdir()
        for number, png in enumerate(drawings(images, 92)):
            (place / "images" / f"{number:06}.png").write_bytes(png)

        for what, queries, count in (
            ("embeddings", arrays[embeddings], embeddings),
            ("images of 92 px", place / "images", images),
        ):
            taken = [(_apart(job, place, queries), _apart(alone, place, queries)) for _ in range(turns)]
            ratio = float(np.median([ours.processor_s / bare.processor_s for ours, bare in taken]))
            for name, which in (("job", 0), ("searches alone", 1)):
                best = min((pair[which] for pair in taken), key=lambda one: one.processor_s)
                report.row(
                    f"{count:,} {what}", name, rows, 1e6 * best.processor_s / count, "us of processor a query",
                    note=f"{count / best.wall_s:,.0f} queries/s by the clock",
                )  # fmt: skip
            report.row(f"{count:,} {what}", "job", rows, ratio, "x the searches alone", note="by processor time")
        peaks = {count: _apart(job, place, path).peak_mb for count, path in arrays.items()}
        for count, peak in peaks.items():
            report.row(f"{count:,} embeddings", "job", rows, peak, "MB resident at most")
        few, many = peaks.values()
        report.at_most(f"peak memory of {embeddings:,} queries, x that of a tenth", many / few, GROWTH)


def _encoder_for(place: Path, queries: Path) -> Encoder | None:
    """For images; embeddings need none."""
    return Encoder(Bundle.load(place / "bundle"), device="cpu", threads=1) if queries.is_dir() else None


def _judge(gallery: Gallery) -> Judge:
    return Judge(CALIBRATION, None, model=gallery.model.name)


def _peak_mb() -> float:
    """Of this process since it was executed; `getrusage` would count the parent's before that as well."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def _apart(way: object, place: Path, queries: Path) -> Taken:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        taken: Taken = pool.apply(way, (place, queries))  # type: ignore[arg-type]
        return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and queries, one turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    where = machine()
    print(f"{where}\n\n| measured | rows | engine | figure | recall@10 | |\n| --- | ---: | --- | ---: | ---: | --- |")
    report = Report()
    if options.quick:
        measure(report, rows=20_000, embeddings=20_000, images=512, turns=1)
    else:
        measure(report, rows=100_000, embeddings=200_000, images=5_000, turns=3)
    report.says()
    if options.json is not None:
        report.write(options.json, where)


if __name__ == "__main__":
    main()
