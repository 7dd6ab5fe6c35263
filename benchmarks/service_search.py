"""Searches over gRPC: beside the same server with the search left out, an empty server, and servers of others.

Server and load generator have cores of their own. All answer from the same rows at the same recall; ratios are of turns
that follow one another, so that what else the machine does meets both.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import faiss
import numpy as np

from benchmarks.data import Data
from benchmarks.report import Report
from benchmarks.servers import h2load, remote, running
from benchmarks.servers.remote import CLIENT_CPUS, PEERS, SERVER_CPUS, SLOW_TO_START, Load, Measured
from embedding.decision import Vectors
from index import Catalog, IndexSettings, Item, ModelRef
from index.threads import CORES
from lookalike.v1 import common_pb2, search_pb2

K, RECALL, IN_FLIGHT = 10, 0.99, 16
REACHES = {"PostgreSQL + pgvector": 1.0, "Chroma": 3.0, "milvus-lite": 50.0, "Milvus 2.3.5": 1.0}
METHOD = "/lookalike.v1.SearchService/Search"
GALLERY = "bench"

_ALL_CPUS = ",".join(sorted({*SERVER_CPUS.split(","), *CLIENT_CPUS.split(",")}))


def search_rows(
    report: Report,
    *,
    rows: int,
    queries: int,
    seconds: float,
    turns: int,
    peers: Sequence[str],
    folder: Path,
    workers: bool,
) -> None:
    """Everything that is searched over the wire; two `workers` beside one too, or not."""
    data = Data(None)
    vectors_ND, queries_QD = data.rows(rows), data.rows(queries, seed=1, of=rows)
    flat = faiss.IndexFlatL2(data.width)
    flat.add(vectors_ND)
    truth_QK = flat.search(queries_QD, K)[1]
    files = remote.Data.written(folder, vectors_ND, queries_QD, truth_QK)
    bundle, galleries = folder / "bundle", folder / "galleries"
    with ExitStack() as stack:
        with ExitStack() as others, ThreadPoolExecutor(len(PEERS)) as pool:

            def start(peer: str) -> Future[tuple[Load, float]]:
                return pool.submit(_filled, others, peer, files)

            # One that is busy of itself would disturb the others, and comes last.
            filling = {peer: start(peer) for peer in peers if peer != SLOW_TO_START}
            fill(bundle, galleries, vectors_ND)
            ours = stack.enter_context(running.serving(bundle, galleries, cpus=SERVER_CPUS))
            wait(filling.values())
            theirs = ((peer, (filling.get(peer) or start(peer)).result) for peer in REACHES if peer in peers)
            _from_python(report, others, ours, files, rows, seconds, turns, theirs, bundle, galleries)
        _of_batches(report, ours, files, rows, seconds, turns, vectors_ND, queries_QD)
        if h2load.is_there():
            _from_c(report, ours, queries_QD[0], rows, seconds, turns)
        else:
            print("h2load is not there (Debian: nghttp2-client): rows of a C client are left out")
    if workers and h2load.is_there():
        _two_workers(report, bundle, galleries, queries_QD[0], rows, seconds, turns)


def start_rows(report: Report, *, rows: int, folder: Path) -> None:
    """From the start of the process to SERVING, the time of an empty folder being the model's."""
    bundle, galleries = folder / "bundle", folder / "galleries"
    fill(bundle, galleries, Data(None).rows(rows))
    (folder / "empty").mkdir()
    taken = []
    for where in (folder / "empty", galleries, folder / "empty", galleries):
        begun = time.perf_counter()
        with running.serving(bundle, where, cpus=_ALL_CPUS):
            taken.append(time.perf_counter() - begun)
    empty, full = min(taken[0::2]), min(taken[1::2])
    report.row("start to SERVING", "lookalike", rows, full, "s", note=f"{empty:.2f} s of it without a gallery")
    report.at_most(f"seconds to SERVING with {rows:,} items beyond those without", full - empty, 5.0)


def fill(bundle: Path, galleries: Path, vectors_ND: Vectors) -> None:
    """A bundle, and a gallery of its model that holds these rows, named by their number, in one indexed segment."""
    name, fingerprint = running.make_bundle(bundle, vectors_ND.shape[1])
    with Catalog(galleries, seal_after=10**9) as catalog:
        model = ModelRef(name=name, fingerprint=fingerprint, embedding_dim=vectors_ND.shape[1])
        gallery = catalog.create(GALLERY, model, settings=IndexSettings(min_recall=RECALL))
        for start in range(0, len(vectors_ND), 2000):
            some_nD = vectors_ND[start : start + 2000]
            gallery.upsert([Item(name=str(start + i), embedding=vector) for i, vector in enumerate(some_nD)])
        gallery.compact()


def _from_python(
    report: Report,
    stack: ExitStack,
    ours: str,
    files: remote.Data,
    rows: int,
    seconds: float,
    turns: int,
    peers: Iterable[tuple[str, Callable[[], tuple[Load, float]]]],
    bundle: Path,
    galleries: Path,
) -> None:
    """One vector a call, 16 calls in flight; batches of 32 as each server takes them."""
    load = stack.enter_context(remote.loading("ours", ours, GALLERY, data=files))
    stream = stack.enter_context(remote.loading("ours", ours, GALLERY, "stream", data=files))
    recall = load.tune(RECALL)
    report.at_least("recall of ours", recall, RECALL)
    what = f"Search, {IN_FLIGHT} in flight, Python client"
    with (
        running.serving(bundle, _copied(galleries, "copied"), cpus=SERVER_CPUS, left_out=True) as without,
        remote.loading("ours", without, GALLERY, data=files) as other,
    ):
        mine, empty = _in_turn([_unary(load, seconds), _unary(other, seconds)], turns)
    report.row(what, "lookalike", rows, _rate(mine), "/s", recall=recall, note=_latency(mine))
    report.row(what, "lookalike, search left out", rows, _rate(empty), "/s", note=_latency(empty))
    report.at_least(f"{what}: x the search left out", _ratio(mine, empty), 0.65)
    many = "32 vectors a call, 1 in flight, Python client"
    batched, streamed, single = _in_turn(
        [_batch(load, 32, seconds), _batch(stream, 32, seconds), _unary(load, seconds)], turns
    )
    report.row(many, "lookalike BatchSearch", rows, _rate(batched), "vectors/s", recall=recall)
    report.row(many, "lookalike StreamSearch", rows, _rate(streamed), "vectors/s", recall=recall)
    report.at_least("BatchSearch of 32, per vector: x unary", _ratio(batched, single), 3.0)
    report.at_least("StreamSearch of 32, per vector: x unary", _ratio(streamed, single), 3.0)
    for peer, started in peers:
        try:
            theirs, filled = started()
            theirs.resume()
            reached = theirs.tune(RECALL)
            mine, other_rate = _in_turn([_unary(load, seconds), _unary(theirs, seconds)], turns)
            report.row(
                what,
                peer,
                rows,
                _rate(other_rate),
                "/s",
                recall=reached,
                note=f"filled in {filled:.0f} s beside the others",
            )
            report.at_least(f"{what}: x {peer}", _ratio(mine, other_rate), REACHES[peer])
            mine_many, streamed, theirs_many = _in_turn(
                [_batch(load, 32, seconds), _batch(stream, 32, seconds), _batch(theirs, 32, seconds)], turns
            )
            report.row(many, peer, rows, _rate(theirs_many), "vectors/s", recall=reached)
            for name, taken in (("BatchSearch", mine_many), ("StreamSearch", streamed)):
                at_least = 3.0 if peer == "PostgreSQL + pgvector" else 1.0
                report.at_least(f"{name} of 32, per vector: x {peer}", _ratio(taken, theirs_many), at_least)
            theirs.pause()
        except (RuntimeError, OSError) as error:
            print(f"{peer} is left out: {error}", flush=True)


def _filled(stack: ExitStack, peer: str, files: remote.Data) -> tuple[Load, float]:
    """A peer that holds the rows and stands still, and the seconds that they took; it ends with the stack."""
    theirs = stack.enter_context(remote.loading(*PEERS[peer], data=files))
    filled = theirs.fill()
    theirs.pause()
    return theirs, filled


def _of_batches(
    report: Report,
    ours: str,
    files: remote.Data,
    rows: int,
    seconds: float,
    turns: int,
    vectors_ND: Vectors,
    queries_QD: Vectors,
) -> None:
    """BatchSearch of 256 beside FAISS in process, on the cores of the server: both exact, and both at the same recall,
    FAISS by its own IVF-PQ with refinement."""
    queries_QD = queries_QD[:256]
    ivf_pq = _ivf_pq(vectors_ND, queries_QD, files.truth)
    ways = (
        ("call", "BatchSearch", "FAISS IVF-PQ with refine, in process", ivf_pq),
        ("columns", "BatchSearch in columns", "FAISS IVF-PQ with refine, in process", ivf_pq),
        (
            "exact",
            "BatchSearch, exact",
            "FAISS flat, BLAS threshold lowered, in process",
            _flat(vectors_ND, queries_QD),
        ),
    )
    what = "256 vectors a call, 2 in flight"
    for way, asked, peer, (search, recall) in ways:
        raw = partial(_in_process, search, len(queries_QD), seconds)
        with remote.loading("ours", ours, GALLERY, way, data=files) as load:
            mine, theirs = _in_turn([_batch(load, len(queries_QD), seconds, in_flight=2), raw], turns)
        report.row(what, f"lookalike {asked}", rows, _rate(mine), "vectors/s", note=_latency(mine))
        report.row(what, peer, rows, _rate(theirs), "vectors/s", recall=recall)
        report.at_least(f"{asked} of 256: x {peer}", _ratio(mine, theirs), 0.85)


def _ivf_pq(vectors_ND: Vectors, queries_QD: Vectors, truth: Path) -> tuple[Callable[[], object], float]:
    """A search of all queries by FAISS alone, and its recall@10."""
    rows, width = vectors_ND.shape
    lists = 1 << round(np.log2(4 * np.sqrt(rows)))
    index = faiss.index_factory(width, f"IVF{lists},PQ{width // 2}x4fs,RFlat")
    index.train(vectors_ND[np.random.default_rng(0).permutation(rows)[: 64 * lists]])
    index.add(vectors_ND)
    truth_QK = np.load(truth)[: len(queries_QD)]
    how, reached = None, 0.0
    for nprobe in (1, 2, 4, 8, 16, 32, 64):
        how = faiss.IndexRefineSearchParameters(k_factor=8, base_index_params=faiss.SearchParametersIVF(nprobe=nprobe))
        found = index.search(queries_QD, K, params=how)[1]
        reached = float(np.mean([len(np.intersect1d(f, t)) / K for f, t in zip(found, truth_QK, strict=True)]))
        if reached >= RECALL:
            break
    return lambda: index.search(queries_QD, K, params=how), reached


def _flat(vectors_ND: Vectors, queries_QD: Vectors) -> tuple[Callable[[], object], float]:
    """The same, measuring every row by matrix products, which FAISS does for fewer rows only where it is told to."""
    index = faiss.IndexFlatL2(vectors_ND.shape[1])
    index.add(vectors_ND)

    def search() -> None:
        before = faiss.cvar.distance_compute_blas_threshold
        faiss.cvar.distance_compute_blas_threshold = 1
        try:
            index.search(queries_QD, K)
        finally:
            faiss.cvar.distance_compute_blas_threshold = before

    return search, 1.0


def _in_process(search: Callable[[], object], queries: int, seconds: float) -> Measured:
    """On the cores of the server."""
    before, cpus = os.sched_getaffinity(0), SERVER_CPUS.split(",")
    os.sched_setaffinity(0, set(map(int, cpus)))
    faiss.omp_set_num_threads(len(cpus))
    try:
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            search()
            count += queries
        taken = time.perf_counter() - begun
    finally:
        os.sched_setaffinity(0, before)
        faiss.omp_set_num_threads(CORES)
    return Measured(rate=count / taken, p50_ms=0, p99_ms=0)


def _from_c(report: Report, ours: str, query_D: Vectors, rows: int, seconds: float, turns: int) -> None:
    request = _request(query_D)
    answer_bytes = 1400  # about what ten neighbours take

    def asked(address: str) -> Callable[[], Measured]:
        return lambda: Measured(
            rate=h2load.rate(address, METHOD, request, in_flight=64, seconds=seconds, cpus=CLIENT_CPUS),
            p50_ms=0,
            p99_ms=0,
        )

    with running.echoing(answer_bytes, cpus=SERVER_CPUS) as empty:
        mine, echoed = _in_turn([asked(ours), asked(empty)], turns)
    what = "Search, 64 in flight, C client"
    report.row(what, "lookalike", rows, _rate(mine), "/s")
    report.row(what, "empty aio + uvloop server", rows, _rate(echoed), "/s")
    report.at_least(f"{what}: x an empty server", _ratio(mine, echoed), 0.6)


def _two_workers(
    report: Report, bundle: Path, galleries: Path, query_D: Vectors, rows: int, seconds: float, turns: int
) -> None:
    """A second process, where both may use all cores, as they would; the load generator takes its share of them."""
    request = _request(query_D)
    rates: dict[int, list[Measured]] = {1: [], 2: []}
    copied = _copied(galleries, "for-workers")
    with ExitStack() as stack, ThreadPoolExecutor(len(rates)) as pool:
        starting = {
            workers: pool.submit(
                stack.enter_context,
                running.serving(bundle, where, "--workers", str(workers), cpus=_ALL_CPUS),
            )
            for workers, where in zip(rates, (galleries, copied), strict=True)
        }
        addresses = {workers: started.result() for workers, started in starting.items()}
        for _ in range(turns):
            for workers, address in addresses.items():
                rate = h2load.rate(address, METHOD, request, in_flight=64, seconds=seconds, cpus=_ALL_CPUS)
                rates[workers].append(Measured(rate=rate, p50_ms=0, p99_ms=0))
    what = "Search, 64 in flight, C client, all cores"
    for workers, measured in rates.items():
        report.row(what, f"lookalike, --workers {workers}", rows, _rate(measured), "/s")
    report.at_least(f"{what}: two workers x one", _ratio(rates[2], rates[1]), 1.2)


def _copied(galleries: Path, name: str) -> Path:
    """The same galleries for a second server: one process writes to a folder."""
    return shutil.copytree(galleries, galleries.with_name(name), ignore=shutil.ignore_patterns(".lock"))


def _request(query_D: Vectors) -> bytes:
    query = common_pb2.ImageInput(embedding=query_D.astype("<f4").tobytes())
    return search_pb2.SearchRequest(gallery=f"galleries/{GALLERY}", query=query, k=K).SerializeToString()


def _unary(load: Load, seconds: float) -> Callable[[], Measured]:
    return lambda: load.measure(in_flight=IN_FLIGHT, seconds=seconds)


def _batch(load: Load, batch: int, seconds: float, *, in_flight: int = 1) -> Callable[[], Measured]:
    return lambda: load.measure(in_flight=in_flight, seconds=seconds, batch=batch)


def _in_turn(steps: Sequence[Callable[[], Measured]], turns: int) -> list[list[Measured]]:
    rounds = [[step() for step in steps] for _ in range(turns)]
    return [list(of_step) for of_step in zip(*rounds, strict=True)]


def _rate(taken: Sequence[Measured]) -> float:
    return statistics.median(one.rate for one in taken)


def _ratio(mine: Sequence[Measured], other: Sequence[Measured]) -> float:
    """The median over turns: both of a turn met the same disturbances."""
    return statistics.median(a.rate / b.rate for a, b in zip(mine, other, strict=True))


def _latency(taken: Sequence[Measured]) -> str:
    p50, p99 = (statistics.median(getattr(one, name) for one in taken) for name in ("p50_ms", "p99_ms"))
    return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms"


def run(report: Report, *, quick: bool, peers: Sequence[str], folder: Path | None) -> None:
    """All sections, each in a folder of its own."""
    rows, queries, seconds, turns = (10_000, 256, 0.6, 1) if quick else (100_000, 512, 2.0, 3)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        Path(made).chmod(0o755)
        search_rows(
            report,
            rows=rows,
            queries=queries,
            seconds=seconds,
            turns=turns,
            peers=peers,
            folder=Path(made),
            workers=not quick,  # three processes more take as long to start as the rest to be measured
        )
    if not quick:
        with tempfile.TemporaryDirectory(dir=folder) as made:
            start_rows(report, rows=1_000_000, folder=Path(made))
