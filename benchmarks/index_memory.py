"""Resident memory of a process that has opened an index and searched it, beyond what its libraries take."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import faiss
import numpy as np

from embedding.decision import Vectors

_PRELUDE = """
import sys, re
from pathlib import Path
import faiss, numpy as np
from index import Catalog, Recall
def resident():
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
queries = np.load(sys.argv[2])
before = resident()
"""

_OURS = """
with Catalog(Path(sys.argv[1])) as catalog:
    search = catalog.get("bench")._live.snapshot.search(Recall(0.99), 10)
    for query in queries:
        list(search.nearest(query[None], 10))
    print(resident() - before)
"""

_RAW = """
index = faiss.read_index(sys.argv[1])
faiss.omp_set_num_threads(1)
for query in queries:
    index.search(query[None], 10)
print(resident() - before)
"""


def resident_of_ours(galleries: Path, queries_QD: Vectors) -> int:
    """Bytes of a process that searched the gallery `bench` of this folder."""
    return _measured(_OURS, str(galleries), queries_QD)


def resident_of_raw(vectors_ND: Vectors, queries_QD: Vectors) -> int:
    """Bytes of a process that searched FAISS's IVF-PQ with refinement, read into memory as FAISS does by itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "raw.faiss"
        width = vectors_ND.shape[1]
        index = faiss.index_factory(width, f"IVF256,PQ{width // 2}x4fs,RFlat")  # few lists: its size is the rows'
        index.train(vectors_ND[:20_000])
        index.add(vectors_ND)
        faiss.write_index(index, str(path))
        return _measured(_RAW, str(path), queries_QD)


def _measured(script: str, target: str, queries_QD: Vectors) -> int:
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, queries_QD)
        file.flush()
        ran = subprocess.run(
            [sys.executable, "-c", _PRELUDE + script, target, file.name], check=True, capture_output=True, text=True
        )
    return int(ran.stdout.split()[-1])
