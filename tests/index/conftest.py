"""A small model, its judge, and vectors that are hard to tell apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from embedding.decision import Judge, OperatingPoint, Vectors
from index import Catalog, Gallery, Item, ModelRef
from tests.index.calibrations import calibration

WIDTH = 6


@pytest.fixture(scope="session")
def model() -> ModelRef:
    return ModelRef(name="shapes-0123456789ab", fingerprint="0123456789ab" + "0" * 52, embedding_dim=WIDTH)


@pytest.fixture(scope="session")
def other_model() -> ModelRef:
    return ModelRef(name="shapes-ba9876543210", fingerprint="ba9876543210" + "0" * 52, embedding_dim=WIDTH)


@pytest.fixture(scope="session")
def judge_at(model: ModelRef) -> Callable[[float], Judge]:
    def at(threshold: float) -> Judge:
        return Judge(calibration(), OperatingPoint(threshold=threshold), model=model.name)

    return at


@pytest.fixture(scope="session")
def judge(judge_at: Callable[[float], Judge]) -> Judge:
    return judge_at(0.5)


@pytest.fixture(scope="session")
def pool() -> Vectors:
    """Unit vectors [48, D]: clusters, exact copies, neighbours one rounding apart, and opposites."""
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(8, WIDTH))
    near = centres[:, None] + 0.2 * rng.normal(size=(8, 2, WIDTH))
    vectors = np.concatenate([centres, near.reshape(-1, WIDTH)])
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    nudged = vectors[:8].copy()
    nudged[:, 0] = np.nextafter(nudged[:, 0], np.float32(2))
    return np.concatenate([vectors, vectors[:8], nudged, -vectors[:8]])


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog(tmp_path / "galleries") as catalog:
        yield catalog


@pytest.fixture
def gallery(catalog: Catalog, model: ModelRef) -> Gallery:
    return catalog.create("shapes", model)


@pytest.fixture
def filled(gallery: Gallery, pool: Vectors) -> Gallery:
    """One item for each vector of the pool, `item-00` and on, half of them sealed."""
    items = [Item(name=f"item-{i:02}", embedding=vector) for i, vector in enumerate(pool)]
    gallery.upsert(items[: len(items) // 2])
    gallery.seal()
    gallery.upsert(items[len(items) // 2 :])
    return gallery


@pytest.fixture
def array(tmp_path: Path, pool: Vectors) -> Path:
    path = tmp_path / "queries.npy"
    np.save(path, pool[::-1])
    return path
