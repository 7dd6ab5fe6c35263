"""The neighbours of any number of images or embeddings, found on a Ray cluster.

It needs Ray and the client: `pip install 'ray[data]' -c constraints.txt .` in a checkout of lookalike.

Each worker asks the server that LOOKALIKE_TARGET and its companions name (docs/clients.md); the rows are those of
`lookalike batch-search --shards`, but for the place of the query and `truncated`.

    python neighbors.py FOLDER_OR_PARQUET --gallery GALLERY --out FOLDER [-k 10] [--workers 4]
"""

import argparse
import os

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from lookalike import Client, Verdict

BATCH = 256
"""Queries a call; at most 1,024, and at most 200,000 neighbours of all."""

VERDICTS = np.array([verdict.value for verdict in Verdict])

SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("rank", pa.int32()),
        ("item", pa.string()),
        ("identity", pa.string()),
        ("verdict", pa.string()),
        ("is_match", pa.bool_()),
        ("distance", pa.float32()),
        ("threshold", pa.float32()),
        ("match_probability", pa.float64()),
        ("far", pa.float64()),
        ("far_upper95", pa.float64()),
        ("frr", pa.float64()),
        ("model", pa.string()),
        ("calibration", pa.int32()),
        ("gallery_generation", pa.int64()),
        ("error", pa.string()),
        ("error_reason", pa.string()),
    ]
)


class Neighbors:
    """Searches the queries of a batch; made once in each worker, whose connection it keeps."""

    def __init__(self, gallery: str, k: int) -> None:
        self.client = Client.from_env()
        self.gallery, self.k = gallery, k

    def __call__(self, batch: pa.Table) -> pa.Table:
        names = np.array(batch["path" if "path" in batch.column_names else "item"].to_pylist())
        if "bytes" in batch.column_names:
            queries = batch["bytes"].to_pylist()
        else:
            queries = np.array(batch["embedding"].to_pylist(), np.float32)
        found = self.client.search_columns(self.gallery, queries, k=self.k)
        size = len(found.ids)
        answered = {
            "query": names[found.queries],
            "rank": np.concatenate([np.arange(1, count + 1) for count in found.counts]),
            "item": found.ids,
            "identity": found.identities,
            "verdict": VERDICTS[found.verdicts],
            "is_match": found.matches,
            "distance": found.distances,
            "match_probability": found.match_probabilities,
            **{name: [getattr(found, name)] * size for name in ("threshold", "far", "far_upper95", "frr")},
            **{name: [getattr(found, name)] * size for name in ("model", "calibration")},
            "gallery_generation": [found.generation] * size,
            "error": pa.nulls(size),
            "error_reason": pa.nulls(size),
        }
        failed = [
            {"query": names[at], "error": str(error), "error_reason": error.reason}
            for at, error in found.errors.items()
        ]
        return pa.concat_tables([pa.table(answered, SCHEMA), pa.Table.from_pylist(failed, SCHEMA)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queries", help="a folder of images, or Parquet files with columns item and embedding")
    parser.add_argument("--gallery", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--workers", type=int, default=4)
    asked = parser.parse_args()
    whom = {name: value for name, value in os.environ.items() if name.startswith("LOOKALIKE_")}
    ray.init(runtime_env={"env_vars": whom}, log_to_driver=False)
    if asked.queries.endswith(".parquet"):
        queries = ray.data.read_parquet(asked.queries, columns=["item", "embedding"])
    else:
        queries = ray.data.read_binary_files(asked.queries, include_paths=True)
    answers = queries.map_batches(
        Neighbors,
        fn_constructor_args=(asked.gallery, asked.k),
        batch_size=BATCH,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=asked.workers),
        udf_modifying_row_count=True,
        num_cpus=0,  # a worker waits for the server; one that took a core would keep it from reading
    )
    answers.write_parquet(asked.out)
    print(f"wrote the neighbours of {queries.count():,} queries to {asked.out}")


if __name__ == "__main__":
    main()
