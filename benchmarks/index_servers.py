"""Our server beside others over loopback, on the same rows at the same recall, one call at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import faiss

from benchmarks.data import Data
from benchmarks.report import Report
from benchmarks.servers import remote, running
from benchmarks.service_search import GALLERY, fill

K, RECALL, QUERIES = 10, 0.99, 256


def beside_servers(
    report: Report, data: Data, rows: int, folder: Path, *, seconds: float, peers: Sequence[str]
) -> None:
    """One query after another, and 32 at a time. A peer that cannot be started is left out."""
    vectors_ND, queries_QD = data.rows(rows), data.rows(QUERIES, seed=1, of=rows)
    flat = faiss.IndexFlatL2(data.width)
    flat.add(vectors_ND)
    truth_QK = flat.search(queries_QD, K)[1]
    del flat
    files = remote.Data.written(folder, vectors_ND, queries_QD, truth_QK)
    bundle, galleries = folder / "bundle", folder / "galleries"
    fill(bundle, galleries, vectors_ND)
    alone, many = "one query a call, 1 in flight", "32 queries a call, 1 in flight"
    with (
        running.serving(bundle, galleries, cpus=remote.SERVER_CPUS) as address,
        remote.loading("ours", address, GALLERY, data=files) as ours,
    ):
        recall = ours.tune(RECALL)
        for peer in peers:
            try:
                with remote.loading(*remote.PEERS[peer], data=files) as theirs:
                    filled, reached = theirs.fill(), theirs.tune(RECALL)
                    note = f"filled in {filled:.0f} s"
                    for what, batch in ((alone, 1), (many, 32)):
                        mine = ours.measure(in_flight=1, seconds=seconds, batch=batch).rate
                        other = theirs.measure(in_flight=1, seconds=seconds, batch=batch).rate
                        again = ours.measure(in_flight=1, seconds=seconds, batch=batch).rate
                        rate = (mine + again) / 2
                        report.row(what, "lookalike over loopback", rows, rate, "queries/s", recall=recall)
                        report.row(what, peer, rows, other, "queries/s", recall=reached, note=note)
                        report.at_least(f"{what}, over loopback: x {peer}", rate / other, 1.0)
            except (RuntimeError, OSError) as error:
                print(f"{peer} is left out: {error}", flush=True)
