"""From a recipe to a bundle, and from a bundle to a report, on small pictures of coloured shapes."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.linear_model import LogisticRegression

from embedding import seen
from embedding.bundle import Bundle
from embedding.decision import distance
from embedding.encoder import Encoder
from embedding.errors import (
    AlreadyExists,
    DamagedData,
    InvalidDataset,
    InvalidInput,
    InvalidRecipe,
    NotFound,
    StorageFailed,
)
from tests.training.shapes import RECIPE, draw_shapes
from training.bundle_evaluation import evaluate, one_shot_errors
from training.classifier import LinearClassifier
from training.config import Recipe, parse_recipe
from training.datasets import load
from training.evaluation import evaluate as evaluate_embeddings
from training.one_shot_folders import read_runs
from training.pipeline import train
from training.second_stage import FILE as CLASSIFIER
from training.second_stage import SecondStage, read_second_stage
from training.splits import split


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    draw_shapes(root / "shapes")
    return root


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return train(
        parse_recipe(RECIPE),
        out=tmp_path_factory.mktemp("out") / "shapes",
        data_root=data,
        device="cpu",
        console=Console(quiet=True),
    )


def test_the_bundle_tells_matches_apart_on_unseen_identities(trained: Bundle) -> None:
    auc = trained.lineage.metrics["ROC AUC"]
    assert isinstance(auc, float)
    assert auc > 0.9
    assert 0 < trained.calibration.learned_margin < 2
    assert trained.calibration.protocol == "identity-disjoint"


def test_the_bundle_remembers_its_held_out_distances_and_norms(trained: Bundle) -> None:
    reference = trained.reference
    assert reference is not None
    assert reference.images > 2
    typical = np.dot(reference.matching, np.arange(len(reference.matching)))
    assert typical < np.dot(reference.impostor, np.arange(len(reference.impostor)))
    assert reference.norm_edges[0] > 0


def test_the_lineage_and_the_card_say_where_it_comes_from(trained: Bundle) -> None:
    sides = trained.lineage.data["sides"]
    assert sides == {
        "train": {"identities": 6, "images": 36},
        "calibration": {"identities": 3, "images": 18},
        "test": {"identities": 3, "images": 18},
    }
    assert Recipe.model_validate(trained.lineage.recipe, strict=False) == parse_recipe(RECIPE)
    card = (trained.path / "README.md").read_text()
    assert "6 identities, 36 images" in card
    assert parse_recipe(card.split("```toml")[1].split("```")[0]) == parse_recipe(RECIPE)


def test_the_recipes_search_is_measured_on_the_test_side_and_repeated_by_evaluate(trained: Bundle, data: Path) -> None:
    at_training, card = trained.lineage.metrics["later to first: recall@1"], (trained.path / "README.md").read_text()
    assert isinstance(at_training, float)
    row = next(line for line in card.split("## Searches of one part")[1].splitlines() if "recall@1 |" in line)
    assert row == f"| recall@1 | {at_training:.4f} |"
    assert "| queries | 15 |\n| gallery | 3 |" in card
    report = evaluate(trained, data / "shapes", device="cpu", console=Console(quiet=True))
    files = sorted((data / "shapes").glob("*/*.png"))
    emb = Encoder(trained, device="cpu").encode([file.read_bytes() for file in files])
    gallery = [row for row, file in enumerate(files) if file.name == "0.png"]
    nearest = {
        row: min(gallery, key=lambda item: distance(emb[row], emb[item]))
        for row, file in enumerate(files)
        if file.name != "0.png"
    }
    hits = [files[row].parent == files[item].parent for row, item in nearest.items()]
    assert report.metrics()["later to first: recall@1"] == pytest.approx(np.mean(hits))


def test_evaluate_searches_a_gallery_of_further_images(trained: Bundle, data: Path, tmp_path: Path) -> None:
    queries, gallery = tmp_path / "queries", tmp_path / "gallery"
    shutil.copytree(data / "shapes", queries)
    for identity in range(12):
        picture = Path(f"colour-{identity:02}", "0.png")
        (gallery / picture).parent.mkdir(parents=True)
        (queries / picture).rename(gallery / picture)
    report = evaluate(trained, queries, gallery=gallery, device="cpu", console=Console(quiet=True))
    search = report.searches["images in gallery"]
    assert (search.retrieval.queries, search.retrieval.gallery) == (60, 12)
    assert search.verification.matching_pairs == 60


def test_what_evaluate_cannot_measure_is_named(trained: Bundle, data: Path, tmp_path: Path) -> None:
    def refused(images: Path, gallery: Path | None = None) -> str:
        with pytest.raises(InvalidDataset) as caught:
            evaluate(trained, images, gallery=gallery, device="cpu", console=Console(quiet=True))
        return str(caught.value)

    shapes, note = data / "shapes", tmp_path / "note.txt"
    note.write_text("no images")
    accepted = "give a folder with a folder of images for each identity, a zip of one, or a manifest"
    for gone in (refused(tmp_path / "gone"), refused(shapes, tmp_path / "gone")):
        assert gone.startswith(f"no such file or folder: {tmp_path / 'gone'}; {accepted}")
        assert "--data" not in gone  # which `evaluate` does not take
    assert f"{note} is no set of labelled images; {accepted}" in refused(note)
    assert "72 of 72 images lie in the gallery too, byte for byte" in refused(shapes, shapes)


def test_a_closed_set_is_probed_from_its_training_side_and_says_so(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "shapes", identities=6, images=9)
    draw_shapes(tmp_path / "shapes/a-few", identities=1, images=3)  # too few for three sides: they train only
    text = RECIPE.replace("identity-disjoint", "closed-set").replace("steps = 40", "steps = 5")
    recipe = parse_recipe(text.split("[[evaluation.search]]")[0] + "classifier = {epochs = 40, learning_rate = 0.05}")
    bundle = train(recipe, out=tmp_path / "b", data_root=tmp_path, device="cpu", console=Console(quiet=True))
    images = load(recipe.data, data_root=tmp_path, preprocessing=recipe.preprocessing)
    sides = split(images, recipe.split)
    assert 0 in images.labels_N[sides.train_N]
    assert 0 not in images.labels_N[sides.test_N]
    encoder = Encoder(bundle, device="cpu")
    known, asked = (
        (encoder.encode_pixels(images.pixels(rows, recipe.preprocessing)), images.labels_N[rows])
        for rows in (sides.train_N[images.labels_N[sides.train_N] > 0], sides.test_N)
    )
    metrics = bundle.lineage.metrics
    nearest = [np.argsort([distance(row, other) for other in known[0]])[:5] for row in asked[0]]
    votes = [known[1][rows].tolist() for rows in nearest]
    winners = [max(each, key=lambda one: (each.count(one), -each.index(one))) for each in votes]
    assert metrics["5-nearest-neighbour accuracy"] == pytest.approx((np.array(winners) == asked[1]).mean())
    probe = LogisticRegression(max_iter=2000).fit(known[0] * np.sqrt(8), known[1])
    assert metrics["linear probe accuracy"] == pytest.approx(probe.score(asked[0] * np.sqrt(8), asked[1]))
    report = evaluate(bundle, tmp_path / "shapes", device="cpu", console=Console(quiet=True))
    assert "closed set" in dict(report.rows())["promised for"]

    second = read_second_stage(bundle.path)
    assert second.identities == tuple(images.identities)
    weight_ID, bias_I = (second.classifier.tensors()[name].numpy() for name in ("weight_ID", "bias_I"))
    named = (asked[0] @ weight_ID.T + bias_I).argmax(1)
    assert metrics["second-stage accuracy"] == pytest.approx((named == asked[1]).mean())
    assert metrics["second-stage accuracy"] > 0.6  # chance is 0.17
    card = (bundle.path / "README.md").read_text()
    assert f"| second-stage accuracy | {metrics['second-stage accuracy']:.4f} |" in card
    assert "| second stage | a linear classifier on the frozen embeddings" in card
    (bundle.path / CLASSIFIER).write_bytes(b"\0" + (bundle.path / CLASSIFIER).read_bytes()[1:])
    with pytest.raises(DamagedData, match=r"classifier\.safetensors was truncated or edited"):
        Bundle.load(bundle.path)
    with pytest.raises(DamagedData, match="restore the bundle or train again"):
        read_second_stage(bundle.path)
    (bundle.path / CLASSIFIER).unlink()
    with pytest.raises(DamagedData, match=r"lacks classifier\.safetensors"):
        Bundle.load(bundle.path)
    with pytest.raises(NotFound, match=r"train with a \[classifier\] section"):
        read_second_stage(bundle.path)


def test_what_a_classifier_does_not_know_counts_as_wrong() -> None:
    classifier = LinearClassifier(torch.eye(2), torch.zeros(2)).requires_grad_(False)
    second = SecondStage(classifier=classifier, identities=("a", "b"))
    emb_ND = np.eye(2, dtype=np.float32)[[0, 1, 1, 0]]
    assert second.accuracy(emb_ND, ["a", "b", "a", "unknown"]) == 0.5
    assert second.accuracy(emb_ND, ["unknown"] * 4) == 0


def test_unlabelled_training_that_stops_early_is_told_on_the_card(data: Path, tmp_path: Path) -> None:
    text = RECIPE.replace("images_per_identity = 4", "images_per_identity = 2").replace(
        "steps = 40, checkpoint_every = 20",
        'steps = 6, mode = "self-supervised", evaluate_every = 2, early_stopping = {patience = 2}',
    )
    recipe, said = parse_recipe(text + "[augmentation]\nrotation = 20\n"), io.StringIO()
    bundle = train(recipe, out=tmp_path / "b", data_root=data, device="cpu", console=Console(file=said))
    card = (bundle.path / "README.md").read_text()
    assert "| mode | self-supervised: training used no labels; calibration and test did |" in card
    assert "whose recall@1 on the calibration side" in card
    summary = bundle.lineage.environment["training"]
    assert f"| training | {summary} |" in card
    assert f"trained: {summary}" in said.getvalue()
    assert re.search(r"6 steps in \d+ s \(\d+ s of processor time on \d+ cores\), .*the network busy \d+%", summary)


def test_warnings_stand_on_the_card_and_curves_that_the_disk_refuses_end_no_run(data: Path, tmp_path: Path) -> None:
    text = RECIPE.replace("steps = 40, checkpoint_every = 20", "steps = 6, tensorboard = true")
    (tmp_path / "b.tensorboard").write_text("no folder")
    said = io.StringIO()
    bundle = train(parse_recipe(text), out=tmp_path / "b", data_root=data, device="cpu", console=Console(file=said))
    warning = f"no more curves: the disk refused {tmp_path / 'b.tensorboard'} (File exists)"
    assert f"| warnings in training | {warning} |" in (bundle.path / "README.md").read_text()
    after_steps = said.getvalue().replace("\n", " ").partition("trained: ")[2]
    assert f"warning: {warning}" in after_steps


def test_a_split_by_super_class_has_bounds_that_resample_super_classes(tmp_path: Path) -> None:
    for super_class in range(8):
        draw_shapes(tmp_path / f"shapes/{super_class}", identities=3, images=3, seed=super_class)
    text = RECIPE.replace("test = 0.25}", 'test = 0.25, by = "super"}').replace("steps = 40", "steps = 5")
    bundles = []
    for name, by in (("super", "super"), ("identity", "identity")):
        recipe = parse_recipe(text.replace('by = "super"', f'by = "{by}"'))
        bundles.append(
            train(recipe, out=tmp_path / name, data_root=tmp_path, device="cpu", console=Console(quiet=True))
        )
    by_super, by_identity = (bundle.calibration for bundle in bundles)
    assert by_super.identities == by_identity.identities == 6
    # Two super-classes of three identities are far weaker evidence than six identities.
    at = [known.rates_at(known.threshold_for_far(0.1)) for known in (by_super, by_identity)]
    assert at[0].far_upper95 > 0.9 > at[1].far_upper95


def test_a_search_that_finds_nothing_is_refused_before_training_and_told_by_evaluate(
    trained: Bundle, data: Path, tmp_path: Path
) -> None:
    recipe = parse_recipe(RECIPE.replace('gallery = "*/0.png"', 'gallery = "*/0.jpg"'))
    with pytest.raises(InvalidDataset, match=r"none of 18 images has a name like '\*/0.jpg', the first is colour-"):
        train(recipe, out=tmp_path / "b", data_root=data, device="cpu", console=Console(quiet=True))
    draw_shapes(tmp_path / "other")
    for first in tmp_path.glob("other/*/0.png"):
        first.unlink()
    said = io.StringIO()
    report = evaluate(trained, tmp_path / "other", device="cpu", console=Console(file=said))
    assert "not measured: the search 'later to first': none of 60 images" in said.getvalue()
    assert not report.searches


def test_checkpoints_are_gone_once_the_bundle_stands(trained: Bundle) -> None:
    assert [path.name for path in trained.path.parent.iterdir()] == ["shapes"]


def test_the_same_recipe_gives_the_same_model(trained: Bundle, data: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)  # the caller's random numbers play no part
    again = train(parse_recipe(RECIPE), out=tmp_path / "b", data_root=data, device="cpu", console=Console(quiet=True))
    assert again.fingerprint == trained.fingerprint
    assert again.calibration == trained.calibration


@pytest.mark.parametrize(
    ("asked", "has_bf16", "used"), [("bf16", True, "bf16"), ("bf16", False, "fp32"), ("auto", False, "fp32")]
)
def test_a_precision_that_the_processor_lacks_is_told(
    asked: str, has_bf16: bool, used: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.precision.has_bf16", lambda device: has_bf16)
    told = io.StringIO()
    recipe = parse_recipe(RECIPE.replace("steps = 40", f'steps = 10, precision = "{asked}"'))
    bundle = train(recipe, out=tmp_path / "out", data_root=data, console=Console(file=told))
    assert bundle is not None
    assert bundle.lineage.environment["precision"] == used
    is_told = "training in fp32: this cpu has no bf16 instructions" in told.getvalue()
    assert is_told == (asked == "bf16" and used == "fp32")


def begin(recipe: Recipe, out: Path, **options: Any) -> None:
    """Train on images that are nowhere: what is refused must be so before any work."""
    train(recipe, out=out, data_root=Path("/nowhere"), console=Console(quiet=True), **options)


def test_an_existing_bundle_is_refused_before_any_work(trained: Bundle) -> None:
    with pytest.raises(AlreadyExists):
        begin(parse_recipe(RECIPE), trained.path)


def test_what_is_no_bundle_is_not_overwritten(data: Path) -> None:
    with pytest.raises(AlreadyExists, match="no bundle"):
        begin(parse_recipe(RECIPE), data / "shapes", overwrite=True)
    assert len(list((data / "shapes").glob("*/*.png"))) == 72


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageFailed, match="choose another place"):
        begin(parse_recipe(RECIPE), tmp_path / "file/b")


def test_resuming_without_checkpoints_is_refused_in_words(tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE.replace("checkpoint_every = 20", "checkpoint_every = 0"))
    with pytest.raises(InvalidRecipe, match="checkpoint_every = 0"):
        begin(recipe, tmp_path / "b", resume=True)


def test_a_checkpoint_that_is_not_there_is_missed_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no checkpoint"):
        begin(parse_recipe(RECIPE), tmp_path / "b", resume=True)


def test_a_device_that_is_not_there_is_missed_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="device 'tpu' is not available"):
        begin(parse_recipe(RECIPE), tmp_path / "b", device="tpu")


def test_a_recipe_has_a_name_that_a_bundle_can_have() -> None:
    for name in ("shapes-", "shapes_", "x" * 64):
        with pytest.raises(InvalidRecipe, match="name"):
            parse_recipe(RECIPE.replace('name = "shapes"', f'name = "{name}"', 1))


def test_evaluate_measures_with_the_served_distances(trained: Bundle, data: Path) -> None:
    report = evaluate(trained, data / "shapes", device="cpu", console=Console(quiet=True))
    files = sorted((data / "shapes").glob("*/*.png"))
    emb = Encoder(trained, device="cpu").encode([file.read_bytes() for file in files])
    pairs = [(i, j) for i in range(len(files)) for j in range(i)]
    dist = np.array([distance(emb[i], emb[j]) for i, j in pairs])
    is_match = np.array([files[i].parent == files[j].parent for i, j in pairs])
    (promise,) = (promise for promise in report.promises if promise.target_far == 0.1)
    assert promise.realised_far == pytest.approx((dist[~is_match] <= np.float32(promise.threshold)).mean())
    assert promise.realised_frr == pytest.approx((dist[is_match] > np.float32(promise.threshold)).mean())
    assert dict(report.rows())["images"] == "72"
    assert report.json()["identities"] == 12
    sides = trained.lineage.data["sides"]
    assert report.json()["images trained on"] == sides["train"]["images"]  # type: ignore[index, call-overload]
    assert report.json()["identities of a name trained on"] == sides["train"]["identities"]  # type: ignore[index, call-overload]
    assert report.json()["metrics"] == report.metrics()


def test_identities_of_super_classes_are_measured_by_one_shot(trained: Bundle, tmp_path: Path) -> None:
    draw_shapes(tmp_path / "colours", identities=20, images=3)
    report = evaluate(trained, tmp_path, device="cpu", console=Console(quiet=True))
    accuracy = report.metrics()["20-way one-shot accuracy, images by lot"]
    assert accuracy is not None
    assert 0.2 < accuracy <= 1  # chance is 0.05


def test_one_shot_runs_of_images_trained_on_are_told(
    trained: Bundle, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = []
    for way in range(12):
        for number, (kind, name) in enumerate((("test", f"item{way:02}"), ("training", f"class{way:02}"))):
            file = tmp_path / f"run01/{kind}/{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(data / f"shapes/colour-{way:02}/{number}.png", file)
        labels.append(f"run01/test/item{way:02}.png run01/training/class{way:02}.png\n")
    (tmp_path / "run01/class_labels.txt").write_text("".join(labels))
    said = io.StringIO()
    console, runs = Console(file=said, width=200), read_runs(tmp_path)
    one_shot_errors(trained, runs, device="cpu", console=console)
    assert "the model was trained on 12 of these 24 images" in said.getvalue()  # six of the twelve colours train
    assert trained.seen is not None
    monkeypatch.setattr(seen, "MAX_DIGESTS", trained.seen.images - 1)
    one_shot_errors(trained, runs, device="cpu", console=console)
    assert "the model was trained on at least 12 of these 24 images" in said.getvalue()


def test_one_shot_by_lot_does_not_take_drawers(trained: Bundle, tmp_path: Path) -> None:
    """Files named as Omniglot's whose second number is no drawer's: no two characters have one in common."""
    draw_shapes(tmp_path / "shapes/family", identities=22, images=3)
    for at, file in enumerate(sorted(tmp_path.glob("shapes/family/*/*.png"))):
        file.rename(file.with_name(f"2021_{at:02}.png"))
    report = evaluate(trained, tmp_path / "shapes", device="cpu", console=Console(quiet=True))
    assert set(report.one_shot) == {"images by lot"}


def test_with_whitening_a_running_training_is_measured_as_it_would_ship(data: Path, tmp_path: Path) -> None:
    text = RECIPE.replace("supervised-contrastive", "margin-based").replace(
        "steps = 40, checkpoint_every = 20", "steps = 6, evaluate_every = 6, whitening = 1.0"
    )
    recipe, told = parse_recipe(text), io.StringIO()
    bundle = train(recipe, out=tmp_path / "b", data_root=data, device="cpu", console=Console(file=told, width=200))
    assert bundle is not None
    images = load(recipe.data, data_root=data, preprocessing=recipe.preprocessing)
    side = images.subset(split(images, recipe.split).calibration_N)
    emb = Encoder(bundle, device="cpu").encode([side.read(at) for at in range(len(side))])
    shipped = evaluate_embeddings(emb, side.labels_N).metrics()
    assert f"step 6: recall@1 {shipped['recall@1']:.4f}  EER {shipped['EER']:.4f}\n" in told.getvalue()
    assert not [name for name in bundle.lineage.metrics if "boundary" in name]  # of the projection that was replaced
