"""A bundle measured on labelled images, and on one-shot runs kept as folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from embedding.bundle import Bundle
from embedding.encoder import Encoder
from embedding.errors import InvalidDataset
from embedding.seen import digest
from training.datasets import ImageSet, load_path
from training.embedded import embed, say_skipped
from training.measurement import Measurement, measure
from training.one_shot import run_errors
from training.one_shot_folders import RunFolders
from training.overlap import notes, overlap_of
from training.pixels import PixelStore
from training.searches import EvaluationConfig, Search, SearchConfig, find

_IN_GALLERY = SearchConfig(name="images in gallery", query="images/*", gallery="gallery/*")


def evaluate(
    bundle: Bundle,
    images: Path,
    *,
    gallery: Path | None = None,
    device: str = "auto",
    max_bad_images: int | float = 0,
    console: Console | None = None,
) -> Measurement:
    """Measure a bundle on a folder, zip or manifest of labelled images, best of identities that it never saw.

    With a `gallery` of further images, the first are also searched among these. Of the searches of the bundle's recipe
    those are repeated that find their images here.
    """
    console = console or Console(stderr=True)
    found = load_path(images, gallery=gallery, preprocessing=bundle.preprocessing, max_bad_images=max_bad_images)
    say_skipped(console, found.skipped)
    searches = _searches_of(bundle, found, console)
    if gallery is not None:
        _refuse_copies_between(found)
        searches.append(find(_IN_GALLERY, found.names, found.labels_N))
    emb_ND = embed(Encoder(bundle, device=device), found, console)
    measured = measure(emb_ND, found.labels_N, bundle.calibration, images=found, searches=searches)
    overlap = overlap_of(bundle, found)
    for note in notes(overlap, closed_set=bundle.calibration.protocol == "closed-set"):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    return replace(measured, overlap=overlap)


def one_shot_errors(
    bundle: Bundle, folders: RunFolders, *, device: str = "auto", console: Console | None = None
) -> NDArray[np.float64]:
    """Share of queries named wrongly in each of R one-shot runs; whether the model was trained on their images is told.

    Raises InvalidImage or ImageTooLarge, naming the image that cannot be read.
    """
    store = PixelStore(folders.images, folders.names, bundle.preprocessing, cache_bytes=0)
    encoder = Encoder(bundle, device=device)
    rows_of_runs = [np.concatenate([run.queries_W, run.supports_W]) for run in folders.runs]  # in the order of names
    blocks, known = [], 0
    for rows in rows_of_runs:
        pixels_nCHW = store.pixels(rows, bundle.preprocessing)
        blocks.append(encoder.encode_pixels(pixels_nCHW))
        if bundle.seen is not None:
            digests_n = np.array([digest(pixels_CHW.tobytes()) for pixels_CHW in pixels_nCHW], np.uint64)
            known += int(bundle.seen.has_images(digests_n).sum())
    if known and bundle.seen is not None:
        total = sum(map(len, rows_of_runs))
        at_least = "at least " if bundle.seen.is_sampled else ""
        (console or Console(stderr=True)).print(
            f"the model was trained on {at_least}{known:,} of these {total:,} images, so that the error flatters",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    emb_ND = np.concatenate(blocks)
    return run_errors(emb_ND, folders.runs)


def _searches_of(bundle: Bundle, images: ImageSet, console: Console) -> list[Search]:
    asked = EvaluationConfig.model_validate(bundle.lineage.recipe.get("evaluation", {}), strict=False)
    searches = []
    for search in asked.search:
        try:
            searches.append(find(search, images.names, images.labels_N))
        except InvalidDataset as error:
            console.print(f"not measured: {error}", markup=False, highlight=False, soft_wrap=True)
    return searches


def _refuse_copies_between(found: ImageSet) -> None:
    """Images to search with that lie in the gallery too, byte for byte: these would find themselves."""
    digests = [found.store.digests[row] for row in found.rows_N]
    queries, items = (np.flatnonzero(found.parts_N == part).tolist() for part in (0, 1))
    in_gallery = {digests[at] for at in items}
    if both := [at for at in queries if digests[at] in in_gallery]:
        raise InvalidDataset(
            f"{len(both)} of {len(queries)} images lie in the gallery too, byte for byte, and would find "
            f"themselves, the first being {found.names[both[0]]}; leave them out of one of both, or give no --gallery, "
            "and each image is searched among all others"
        )
