"""The gallery engine beside FAISS, hnswlib, usearch and bare SQLite, on one machine, in one run.

    python -m benchmarks.index [--quick] [--huge] [--embeddings FILE] [--folder DIR] [--plot PNG] [--json FILE]

Searches are measured where libraries answer too: one thread, vectors in, identifiers and exact distances out. The whole
call, with items from the store and decisions, has rows of its own. Approximate peers are tuned to the recall that
ours promises, on the queries that all are measured with, which favours them: ours is tuned on its own rows. Data are
clustered; `--embeddings` takes real ones, an array [N, D] repeated with noise up to the size. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

BLAS_DEFAULT = faiss.cvar.distance_compute_blas_threshold  # before our own import changes it

from benchmarks import index_peers as peers  # noqa: E402
from benchmarks import index_writes as writes  # noqa: E402
from benchmarks.data import Data  # noqa: E402
from benchmarks.index_growth import Size, beside_compaction, growth, plot  # noqa: E402
from benchmarks.index_memory import resident_of_ours, resident_of_raw  # noqa: E402
from benchmarks.index_servers import beside_servers  # noqa: E402
from benchmarks.made import CALIBRATION  # noqa: E402
from benchmarks.measure import alternating_medians, machine  # noqa: E402
from benchmarks.report import Report  # noqa: E402
from benchmarks.servers.remote import PEERS, SLOW_TO_START  # noqa: E402
from embedding.decision import Judge, Vectors  # noqa: E402
from index import Catalog, Exact, Gallery, IndexSettings, Item, ModelRef, Recall  # noqa: E402
from index.engine import Precision  # noqa: E402
from index.rows import LiveRows  # noqa: E402
from index.threads import limit_blas, one_thread  # noqa: E402

K, RECALL = 10, 0.99
EXACT_ROWS, EXACT_BATCH = 100_000, 256
QUERIES = 500
ROUNDED_ROWS = 100_000
ROUNDINGS: tuple[Precision, ...] = ("float32", "float16")


def exact_search(report: Report, data: Data, *, seconds: float) -> None:
    """A batch against all rows of one part."""
    vectors_ND, queries_QD = data.rows(EXACT_ROWS), data.rows(EXACT_BATCH, seed=1, of=EXACT_ROWS)
    rows = LiveRows([], data.width)
    rows.append(np.arange(EXACT_ROWS), vectors_ND)
    search = rows.snapshot(0).search(Exact(), K)
    flat = faiss.IndexFlatL2(data.width)
    flat.add(vectors_ND)

    def theirs(threshold: int) -> Any:
        before = faiss.cvar.distance_compute_blas_threshold
        faiss.cvar.distance_compute_blas_threshold = threshold
        try:
            with one_thread():
                return flat.search(queries_QD, K)
        finally:
            faiss.cvar.distance_compute_blas_threshold = before

    found = [set(keys[np.argsort(dists, kind="stable")[:K]].tolist()) for keys, dists in search.nearest(queries_QD, K)]
    same = np.mean([len(mine & set(other)) / K for mine, other in zip(found, theirs(1)[1].tolist(), strict=True)])
    steps = [lambda: list(search.nearest(queries_QD, K)), lambda: theirs(1), lambda: theirs(BLAS_DEFAULT)]
    times = [EXACT_BATCH / (taken or np.inf) for taken in alternating_medians(steps, seconds=seconds, least=5)]
    names = ("lookalike", "FAISS flat, BLAS threshold lowered", "FAISS flat")
    what = f"exact search, batch {EXACT_BATCH}"
    ours, lowered, default = [
        report.row(what, name, EXACT_ROWS, rate, "queries/s", recall=float(same) if name == "lookalike" else 1.0)
        for name, rate in zip(names, times, strict=True)
    ]
    report.at_least(f"{what}: x FAISS flat with its BLAS threshold lowered", ours / lowered, 0.95)
    report.at_least(f"{what}: x FAISS flat as it comes", ours / default, 3.0)


def approximate_search(report: Report, data: Data, rows: int, folder: Path, *, seconds: float) -> None:
    """One query at a time at the promised recall, the index built by each as it does."""
    queries_QD = data.rows(QUERIES, seed=1, of=rows)
    vectors_ND = data.rows(rows)
    flat = faiss.IndexFlatL2(data.width)
    flat.add(vectors_ND)
    truth_QK = flat.search(queries_QD, K)[1]
    del flat
    what = f"one query, recall@10 >= {RECALL}"
    with Catalog(folder, seal_after=10**9) as catalog:
        gallery, judge = filled(catalog, vectors_ND)
        begun = time.perf_counter()
        stats = gallery.reindex()
        built = time.perf_counter() - begun
        engines: dict[str, Callable[[Vectors], object]] = {}
        search = gallery._live.snapshot.search(Recall(RECALL), K)
        engines["lookalike"] = lambda query_1D: search.nearest(query_1D, K)
        recalls = {"lookalike": recall_of_keys(search, queries_QD, truth_QK)}
        builds = {"lookalike": built}
        report.row("built", "lookalike", rows, built, "s", note=stats.segments[0].structure)
        for peer in peers.build_all(vectors_ND, queries_QD, truth_QK, recall=RECALL):
            if isinstance(peer, peers.TooSlow):
                print(peer, flush=True)
                continue
            report.row("built", peer.name, rows, peer.build_seconds, "s")
            engines[peer.name], recalls[peer.name], builds[peer.name] = peer.ask, peer.recall, peer.build_seconds
        recalls["lookalike, whole call"] = recalls["lookalike"]
        medians = one_by_one(engines, queries_QD, seconds=seconds)
        whole: dict[str, Callable[[Vectors], object]] = {"lookalike, whole call": partial(_whole_call, gallery, judge)}
        medians |= one_by_one(whole, queries_QD, seconds=seconds / 5, clock=time.perf_counter)  # it reads the disk
        for name, microseconds in medians.items():
            note = "" if name in builds else "items and decisions included"
            report.row(what, name, rows, microseconds, "us", recall=recalls[name], note=note)
        reached = {name: medians[name] for name in builds if name != "lookalike" and recalls[name] >= RECALL}
        report.at_least(f"recall of ours at {rows:,}", recalls["lookalike"], RECALL)
        if reached:
            report.at_least(
                f"{what} at {rows:,}: x the fastest peer", min(reached.values()) / medians["lookalike"], 0.8
            )
        report.at_most(f"seconds to build at {rows:,}", built, 60.0)
    ours, raw = resident_of_ours(folder, queries_QD), resident_of_raw(vectors_ND, queries_QD)
    report.row("memory while searching", "lookalike", rows, ours / 1e6, "MB", note="mapped pages included")
    report.row("memory while searching", "FAISS IVF-PQ with refine", rows, raw / 1e6, "MB")
    report.at_most(f"memory at {rows:,}, MB", ours / 1e6, 1.15 * raw / 1e6 + 64)
    with Catalog(folder, seal_after=10**9) as catalog:
        compressed(report, catalog.get("bench"), queries_QD, truth_QK)
    if rows == ROUNDED_ROWS:
        rounded(report, folder, rows, queries_QD, truth_QK, judge, seconds=seconds / 5)


def compressed(report: Report, gallery: Gallery, queries_QD: Vectors, truth_QK: np.ndarray) -> None:
    """What a plan by codes keeps in memory besides mapped vectors, as a share of these; small galleries must ask."""
    if gallery.stats().segments[0].structure == "ivf-flat":
        gallery.reindex(IndexSettings(structure="ivf-pq"))
    (segment, *_) = gallery.stats().segments
    recall = recall_of_keys(gallery._live.snapshot.search(Recall(RECALL), K), queries_QD, truth_QK)
    share = segment.memory_bytes / (4 * queries_QD.shape[1] * segment.rows)
    what = "memory of the structure"
    report.row(what, f"lookalike, {segment.structure}", segment.rows, share, "x float32", recall=recall)
    report.at_least(f"recall of the compressed plan at {segment.rows:,}", recall, 0.95)
    if segment.structure != "exact":
        report.at_most(f"compressed plan at {segment.rows:,}, x float32", share, 0.2)


def rounded(
    report: Report, folder: Path, rows: int, queries_QD: Vectors, truth_QK: np.ndarray, judge: Judge, *, seconds: float
) -> None:
    """Exact search of the same gallery with its vectors in float32 and in float16: whole calls, and memory."""
    residents = []
    for vectors in ROUNDINGS:
        engine = f"lookalike, exact, {vectors}"
        with Catalog(folder, seal_after=10**9) as catalog:
            gallery = catalog.get("bench")
            gallery.reindex(IndexSettings(structure="exact", vectors=vectors))
            recall = recall_of_keys(gallery._live.snapshot.search(Exact(), K), queries_QD, truth_QK)
            whole = {engine: partial(_whole_call, gallery, judge)}
            (taken,) = one_by_one(whole, queries_QD, seconds=seconds, clock=time.perf_counter).values()
        residents.append(resident_of_ours(folder, queries_QD))
        report.row("one exact query, whole call", engine, rows, taken, "us", recall=recall)
        report.row("memory while searching", engine, rows, residents[-1] / 1e6, "MB", note="mapped pages included")
    report.at_most(f"memory at {rows:,} in float16, x float32", residents[1] / residents[0], 0.6)


def _whole_call(gallery: Gallery, judge: Judge, query_1D: Vectors) -> object:
    return gallery.search(query_1D[0], k=K, judge=judge)


def filled(catalog: Catalog, vectors_ND: Vectors) -> tuple[Gallery, Judge]:
    """A gallery of these rows, named by row, and a judge of its model."""
    width = vectors_ND.shape[1]
    gallery = catalog.create("bench", ModelRef(name="bench", fingerprint="0" * 64, embedding_dim=width))
    for start in range(0, len(vectors_ND), 2000):
        gallery.upsert(
            [Item(name=str(start + i), embedding=vector) for i, vector in enumerate(vectors_ND[start : start + 2000])]
        )
    return gallery, Judge(CALIBRATION, model="bench")


def recall_of_keys(search: Any, queries_QD: Vectors, truth_QK: np.ndarray) -> float:
    """Keys of a gallery filled in order count from 1."""
    hits = 0
    for (keys_R, dist_R), true_K in zip(search.nearest(queries_QD, K), truth_QK, strict=True):
        first_R = keys_R[np.argsort(dist_R, kind="stable")[:K]] - 1
        hits += len(np.intersect1d(first_R, true_K))
    return hits / truth_QK.size


def one_by_one(
    engines: Mapping[str, Callable[[Vectors], object]],
    queries_QD: Vectors,
    *,
    seconds: float,
    clock: Callable[[], float] = time.thread_time,
) -> dict[str, float]:
    """Median microseconds of a query; engines take turns of a hundred queries each."""
    some = [queries_QD[at : at + 1] for at in range(100)]

    def turn(ask: Callable[[Vectors], object]) -> Callable[[], object]:
        return lambda: [ask(query_1D) for query_1D in some]

    steps = [turn(ask) for ask in engines.values()]
    medians = alternating_medians(steps, seconds=seconds, least=7, clock=clock)
    return {name: 1e6 * (median or np.inf) / len(some) for name, median in zip(engines, medians, strict=True)}


def durable_writes(report: Report, data: Data, folder: Path, *, quick: bool) -> None:
    """Rows that are on the disk when the call returns."""
    rows = 20_000 if quick else 100_000
    vectors_ND = data.rows(rows)
    rounds = 3
    in_batches = [
        (writes.ours_in_batches(folder, vectors_ND), writes.bare_in_batches(folder, vectors_ND)) for _ in range(rounds)
    ]
    singles_ND = vectors_ND[: 800 if quick else 4000]
    singly = [(writes.ours_singly(folder, singles_ND), writes.bare_singly(folder, singles_ND)) for _ in range(rounds)]
    for what, pairs, reach in (("upserts of 1,000", in_batches, 0.35), ("single upserts, 16 threads", singly, 1.0)):
        ours, bare = np.median(np.array(pairs), axis=0)
        report.row(what, "lookalike", rows, float(ours), "rows/s")
        report.row(
            what, "bare sqlite3" + (", one thread" if reach == 1 else " executemany"), rows, float(bare), "rows/s"
        )
        ratio = float(np.median([mine / other for mine, other in pairs]))
        report.at_least(f"{what}: x bare sqlite3", ratio, reach)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="30,000 rows instead of 100,000 and a million")
    parser.add_argument("--rows", type=int, default=1_000_000, help="instead of a million, to try the full form")
    parser.add_argument("--huge", action="store_true", help="grow to ten million rows too: half an hour, 20 GB of disk")
    parser.add_argument("--embeddings", type=Path, metavar="FILE", help="a .npy of real embeddings [N, D]")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write galleries; a temporary one")
    parser.add_argument(
        "--peers", nargs="*", choices=list(PEERS), help="these servers alone; --quick leaves out the slow one"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the growth there, such as docs/growth.png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too, after each part")
    options = parser.parse_args()
    peers_of = [name for name in PEERS if not options.quick or name != SLOW_TO_START]
    peers = peers_of if options.peers is None else options.peers
    torch.set_num_threads(1)
    limit_blas()
    data = Data(None if options.embeddings is None else np.load(options.embeddings).astype(np.float32))
    where = machine(*(f"{name} {version(name)}" for name in ("faiss-cpu", "hnswlib", "usearch", "numpy")))
    where += f", one thread a search, {data.name} data of width {data.width}"
    print(f"{where}\n\n| measured | rows | engine | figure | recall@10 | |\n| --- | ---: | --- | ---: | ---: | --- |")
    report = Report()
    seconds = 1.5 if options.quick else 10.0
    large = options.rows

    def part(measure: Callable[..., None], *more: Any, **named: Any) -> None:
        """In a folder of its own; what there is so far is written after it."""
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            Path(folder).chmod(0o755)  # PostgreSQL may run as another user
            measure(report, data, *more, Path(folder), **named)
        _write(report, options.json, where)

    exact_search(report, data, seconds=seconds)
    for rows in (30_000,) if options.quick else sorted({min(100_000, large), large}):
        part(approximate_search, rows, seconds=2 * seconds)
    part(durable_writes, quick=options.quick)
    rows, turns = (20_000, 4) if options.quick else (large, 2)
    part(beside_compaction, rows, seconds=seconds / 2, turns=turns)
    part(beside_servers, 5_000 if options.quick else min(50_000, large), seconds=seconds / 3, peers=peers)
    if not options.quick:
        sizes: list[Size] = []
        for rows in (large // 10, 3 * large // 10, large, *([3_000_000, 10_000_000] if options.huge else [])):
            part(lambda *of_growth: sizes.append(growth(*of_growth)), rows)
            if options.plot is not None:
                plot(sizes, options.plot)
    report.says()
    _write(report, options.json, where)


def _write(report: Report, path: Path | None, where: str) -> None:
    """What there is so far, so that a run that is broken off leaves its figures."""
    if path is not None:
        report.write(path, where)


if __name__ == "__main__":
    main()
