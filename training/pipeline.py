"""The whole path of one training run: images → split → network → learned margin → evaluation → bundle and card."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray
from pydantic import JsonValue
from rich.console import Console

from embedding.bundle import Bundle, Lineage, learned_metrics, write_bundle
from embedding.decision import Vectors
from embedding.destination import check_destination
from embedding.encoder import Encoder, PixelEncoder
from embedding.errors import InvalidDataset, InvalidRecipe
from embedding.networks import EmbeddingNetwork, build
from embedding.runtime import tune_malloc
from embedding.seen import Seen, digest
from training.calibration import calibrate
from training.checkpoint import checkpoint_in, held
from training.config import Recipe
from training.datasets import ImageSet, load, load_path
from training.distributed import Ranks, is_first, joined
from training.embedded import embed, say_skipped
from training.evaluation import evaluate as evaluate_embeddings
from training.initial import initial_recall
from training.measurement import Measurement, measure
from training.one_shot import run_errors
from training.one_shot_folders import RunFolders
from training.overlap import notes, overlap_of
from training.pairs import HeldOut, held_out, sampled
from training.pixels import PixelStore
from training.progress import TrainingDisplay
from training.reference import reference_of
from training.report import model_card
from training.result import TrainingResult, usable_cores
from training.searches import EvaluationConfig, Search, SearchConfig, find
from training.second_stage import FILE as CLASSIFIER
from training.second_stage import fit_second_stage
from training.splits import SIDES, Split, copies_of_training, split
from training.trainer import Trainer
from training.turns import TurnedImages
from training.whitening import whiten

WATCHED_IMAGES = 2_000
"""Calibration images, at most, on which a running training is evaluated, of as many identities as can be."""


def train(
    recipe: Recipe,
    *,
    out: Path,
    data_root: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Bundle | None:
    """Train as the recipe says, learn the margin on held-out identities, and write the bundle with its model card.

    Under `torchrun`, all processes train together; the first one alone does the rest, and the others get None.
    Checkpoints go to a folder beside `out` and are removed once the bundle stands.
    Before any work, raises AlreadyExists unless `overwrite` takes the place of a bundle, StorageFailed where `out`
    cannot be written, Busy while another training writes there, InvalidInput for a device that is not there, and
    InvalidRecipe or NotFound when there is no checkpoint to resume from; then whatever the recipe, its data or the disk
    give cause for: see `embedding.errors`.
    """
    check_destination(out, overwrite=overwrite)
    checkpoints = out.with_name(f"{out.name}.checkpoint")
    if resume:
        if not recipe.training.checkpoint_every:
            raise InvalidRecipe(
                "the recipe writes no checkpoints (training.checkpoint_every = 0), so there is none to resume from; "
                "train without --resume",
                field="training.checkpoint_every",
            )
        checkpoint_in(checkpoints)
    console = (console or Console(stderr=True)) if is_first() else Console(quiet=True)
    with held(checkpoints) if is_first() else nullcontext():
        return _train(recipe, out, checkpoints, data_root, device, console, resume=resume, overwrite=overwrite)


def _train(
    recipe: Recipe,
    out: Path,
    checkpoints: Path,
    data_root: Path | None,
    device: str,
    console: Console,
    *,
    resume: bool,
    overwrite: bool,
) -> Bundle | None:
    tune_malloc()
    with joined(device) as ranks:
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are left as they were
            torch.manual_seed(recipe.seed)
            network = build(recipe.architecture, weights=recipe.network.initial_weights(data_root))
        images = load(recipe.data, data_root=data_root, preprocessing=recipe.preprocessing)
        say_skipped(console, images.skipped)
        sides = split(images, recipe.split)
        console.print(_describe(images, sides), highlight=False, soft_wrap=True)
        copied = _copied(images, sides)
        for told in copied.values():
            console.print(f"warning: {told}", highlight=False, soft_wrap=True)
        train_set, test_set = images.subset(sides.train_N), images.subset(sides.test_N)
        searches = [find(search, test_set.names, test_set.labels_N) for search in recipe.evaluation.search]

        watched_n = sampled(images.labels_N[sides.calibration_N], WATCHED_IMAGES, np.random.default_rng(recipe.seed))
        watched = images.subset(sides.calibration_N[watched_n])
        trainer = Trainer(
            recipe,
            network,
            train_set,
            device=device,
            out_dir=checkpoints if recipe.training.checkpoint_every else None,
            events_dir=out.with_name(f"{out.name}.tensorboard") if recipe.training.tensorboard else None,
            progress=TrainingDisplay(console),
            evaluate=lambda current: _watch(current, watched, recipe, device),
            ranks=ranks,
        )
        if (precision := trainer.step.precision) != recipe.training.precision != "auto":
            lacks = f"this {trainer.device.type} has no {recipe.training.precision} instructions"
            console.print(f"training in {precision}: {lacks}", highlight=False, soft_wrap=True)
        initial = (
            {}
            if recipe.network.weights == "random" or not ranks.is_first
            else initial_recall(network, test_set, searches, recipe.preprocessing, device=device)
        )
        result = trainer.fit(resume=resume)
    if not ranks.is_first:
        return None
    console.print(f"trained: {result.summary()}", highlight=False, soft_wrap=True)
    for warning in result.warnings:  # again, where it is not lost among the lines of the steps
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)

    if recipe.training.whitening is not None:
        whiten(
            network,
            TurnedImages(train_set, recipe.sampling.turned_identities),
            recipe.preprocessing,
            shrinkage=recipe.training.whitening,
            views=("as-is", "mirror") if recipe.augmentation.horizontal_flip else ("as-is",),
            device=device,
        )
    encoder = PixelEncoder(network, recipe.preprocessing, device=device)
    calibration_set = images.subset(sides.calibration_N)
    norms: list[Vectors] = []
    encoder.on_embedded = lambda _, norm_N: norms.append(norm_N)
    calibration_emb_ND = embed(encoder, calibration_set, console)
    encoder.on_embedded = None
    calibration = calibrate(
        calibration_emb_ND,
        calibration_set.labels_N,
        protocol=sides.protocol,
        groups_N=calibration_set.super_class_labels if recipe.split.by == "super" else None,
        seed=recipe.seed,
    )
    test_emb_ND = embed(encoder, test_set, console)
    measurement = measure(
        test_emb_ND,
        test_set.labels_N,
        calibration,
        images=test_set,
        searches=searches,
        trained_on=_known_identities(encoder, images, sides, console) if sides.protocol == "closed-set" else None,
    )
    measurement = replace(measurement, further={**measurement.further, **initial})
    files: dict[str, bytes] = {}
    if recipe.classifier is not None:
        train_emb_ND = embed(encoder, train_set, console)
        second = fit_second_stage(
            train_emb_ND, train_set.labels_N, train_set.identities, recipe.classifier, seed=recipe.seed
        )
        named = [test_set.identities[label] for label in test_set.labels_N]
        further = {**measurement.further, "second-stage accuracy": second.accuracy(test_emb_ND, named)}
        measurement = replace(measurement, further=further)
        files[CLASSIFIER] = second.to_bytes()
    lineage = Lineage(
        created=datetime.now(UTC),
        recipe=recipe.model_dump(mode="json"),
        data=_data_summary(images, sides),
        metrics={**measurement.metrics(), **learned_metrics(result.learned)},
        environment=_environment(trainer, result, ranks),
    )
    card = model_card(
        name=recipe.name,
        recipe_text=tomli_w.dumps(recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True)),
        facts=_facts(recipe, images, sides, lineage, result, copied),
        measurement=measurement,
        learned=result.learned,
        image_of=lambda index: test_set.pixels([index], recipe.preprocessing)[0],
        identity_names=dict(enumerate(test_set.identities)),
        **({"intended_use": recipe.description} if recipe.description else {}),
    )
    bundle = write_bundle(
        out,
        name=recipe.name,
        network=network,
        preprocessing=recipe.preprocessing,
        calibration=calibration,
        lineage=lineage,
        reference=reference_of(calibration_emb_ND, calibration_set.labels_N, np.concatenate(norms), seed=recipe.seed),
        seen=Seen.of(train_set.pixel_digests, train_set.identities),
        extra_files={**card, **files},
        overwrite=overwrite,
    )
    shutil.rmtree(checkpoints, ignore_errors=True)
    return bundle


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


_IN_GALLERY = SearchConfig(name="images in gallery", query="images/*", gallery="gallery/*")


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


def _known_identities(encoder: PixelEncoder, images: ImageSet, sides: Split, console: Console) -> HeldOut:
    """Training images of the identities on the test side, with the labels that these have there."""
    test_labels = np.unique(images.labels_N[sides.test_N])
    known_N = sides.train_N[np.isin(images.labels_N[sides.train_N], test_labels)]
    emb_ND = embed(encoder, images.subset(known_N), console)
    return held_out(emb_ND, np.searchsorted(test_labels, images.labels_N[known_N]))


def _watch(network: EmbeddingNetwork, images: ImageSet, recipe: Recipe, device: str) -> Mapping[str, float]:
    """Figures of a running training, on calibration images."""
    encoder = PixelEncoder(network, recipe.preprocessing, device=device)
    emb_ND = embed(encoder, images, Console(quiet=True))
    metrics = evaluate_embeddings(emb_ND, images.labels_N).metrics()
    return {name: value for name, value in metrics.items() if name in {"recall@1", "EER"} and value is not None}


def _describe(images: ImageSet, sides: Split) -> str:
    counts = ", ".join(f"{side} {identities} ({size} images)" for side, identities, size in _side_counts(images, sides))
    return f"identities, {sides.protocol}: {counts}"


def _copied(images: ImageSet, sides: Split) -> dict[str, str]:
    """A fact for the card, where there is one."""
    copies = copies_of_training(images, sides)
    told = f"{copies:,} of the images held out have the pixels of training images, so that figures of them flatter"
    return {"copies": told} if copies else {}


def _side_counts(images: ImageSet, sides: Split) -> list[tuple[str, int, int]]:
    indices = (sides.train_N, sides.calibration_N, sides.test_N)
    return [(side, len(np.unique(images.labels_N[at])), len(at)) for side, at in zip(SIDES, indices, strict=True)]


def _data_summary(images: ImageSet, sides: Split) -> dict[str, JsonValue]:
    return {
        "protocol": sides.protocol,
        "sides": {
            side: {"identities": identities, "images": size} for side, identities, size in _side_counts(images, sides)
        },
        "skipped": {image.name: image.reason for image in images.skipped},
    }


def _facts(
    recipe: Recipe,
    images: ImageSet,
    sides: Split,
    lineage: Lineage,
    result: TrainingResult,
    copied: Mapping[str, str],
) -> dict[str, str]:
    sources = ", ".join(f"{part.source} {getattr(part, 'path', '')}".strip() for part in recipe.data)
    return {
        "source": sources,
        "split": sides.protocol,
        **{side: f"{identities} identities, {size} images" for side, identities, size in _side_counts(images, sides)},
        "skipped images": str(len(images.skipped)),
        **copied,
        **_modes(recipe, result),
        "created": f"{lineage.created:%Y-%m-%d %H:%M} UTC",
        **lineage.environment,
    }


def _modes(recipe: Recipe, result: TrainingResult) -> dict[str, str]:
    """How it was trained, as far as that is not the plain way."""
    facts = {}
    if recipe.training.mode == "self-supervised":
        facts["mode"] = "self-supervised: training used no labels; calibration and test did"
    if recipe.classifier is not None:
        facts["second stage"] = (
            f"a linear classifier on the frozen embeddings of the training side, {recipe.classifier.epochs} epochs; "
            f"{CLASSIFIER}"
        )
    stopping = recipe.training.early_stopping
    if stopping is not None and result.kept_step is not None:
        best = result.evaluations[result.kept_step][stopping.metric]
        facts["early stopping"] = (
            f"weights of step {result.kept_step} of {result.steps}, whose {stopping.metric} on the calibration side, "
            f"{best:.4f}, was the best: the calibration side has chosen among these weights"
        )
    if result.warnings:
        facts["warnings in training"] = "; ".join(result.warnings)
    return facts


def _environment(trainer: Trainer, result: TrainingResult, ranks: Ranks) -> dict[str, str]:
    device = trainer.device
    return {
        "lookalike": version("lookalike"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}, {usable_cores()} cores",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": trainer.step.precision,
        **({"processes": str(ranks.size)} if ranks.size > 1 else {}),
        "training": result.summary(),
    }
