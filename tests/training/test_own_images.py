"""A margin learned anew from labelled images of one's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from embedding import seen
from embedding.bundle import Bundle, write_bundle
from embedding.encoder import Encoder
from embedding.errors import InvalidDataset
from embedding.seen import Seen
from tests.service.harness import make_bundle
from tests.training.shapes import draw_shapes
from training.calibration import calibrate
from training.datasets import load_path
from training.own_images import OwnImages, calibrate_on_images


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    draw_shapes(root, identities=8, images=4, seed=5)
    return root


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "first", seed=0)


def learned(bundle: Bundle, images: Path, **settings: bool | int) -> OwnImages:
    return calibrate_on_images(bundle, images, device="cpu", console=Console(quiet=True), **settings)  # type: ignore[arg-type]


def test_everything_is_that_of_the_images_given(bundle: Bundle, shapes: Path) -> None:
    found = learned(bundle, shapes)
    files = sorted(shapes.glob("*/*.png"))
    emb_ND = Encoder(bundle, device="cpu").encode([file.read_bytes() for file in files])
    expected = calibrate(emb_ND, np.arange(32) // 4, protocol="identity-disjoint")
    assert found.calibration.version == bundle.calibration.version + 1
    assert found.calibration == expected.model_copy(update={"version": found.calibration.version})
    assert found.calibration.learned_margin != bundle.calibration.learned_margin
    assert (found.images, found.calibration.identities, found.calibration.matching_pairs) == (32, 8, 8 * 6)
    assert found.reference.images == 32
    assert learned(bundle, shapes, closed_set=True).calibration.protocol == "closed-set"


def test_a_manifest_serves_as_well_as_a_folder(bundle: Bundle, shapes: Path) -> None:
    rows = [f"{file.relative_to(shapes)},{file.parent.name}" for file in sorted(shapes.glob("*/*.png"))]
    manifest = shapes / "list.csv"
    manifest.write_text("\n".join(["path,identity", *rows]))
    assert learned(bundle, manifest).calibration == learned(bundle, shapes).calibration


def test_what_is_no_set_of_labelled_images_is_refused(bundle: Bundle, shapes: Path, tmp_path: Path) -> None:
    feedback = tmp_path / "feedback.jsonl"
    feedback.write_text("{}\n")
    with pytest.raises(InvalidDataset, match=r"no set of labelled images; a file of feedback goes to --feedback"):
        learned(bundle, feedback)
    with pytest.raises(InvalidDataset, match=r"no such file or folder: .*none; give a folder with a folder of images"):
        learned(bundle, tmp_path / "none")
    draw_shapes(tmp_path / "few", identities=4, images=2)
    draw_shapes(tmp_path / "few" / "single", identities=3, images=1)
    with pytest.raises(InvalidDataset, match=r"has 4 identities of two images or more, and 5 are the least"):
        learned(bundle, tmp_path / "few")


def test_an_unreadable_image_is_left_out_up_to_the_limit(bundle: Bundle, tmp_path: Path) -> None:
    draw_shapes(tmp_path, identities=6, images=3)
    (tmp_path / "colour-00" / "0.png").write_bytes(b"no image")
    with pytest.raises(InvalidDataset, match="1 of 18 images cannot be used"):
        learned(bundle, tmp_path)
    assert (
        learned(bundle, tmp_path, max_bad_images=1).images,
        learned(bundle, tmp_path, max_bad_images=1).skipped,
    ) == (17, 1)


def knowing(bundle: Bundle, images: Path, at: Path, *, identities: tuple[str, ...]) -> Bundle:
    """The same model, trained on the images of a folder and on identities of these names."""
    found = load_path(images, preprocessing=bundle.preprocessing)
    return write_bundle(
        at,
        name="toy",
        network=bundle.network(),
        preprocessing=bundle.preprocessing,
        calibration=bundle.calibration,
        lineage=bundle.lineage,
        seen=Seen.of(found.pixel_digests, identities),
    )


@pytest.mark.parametrize("closed_set", [False, True])
def test_images_that_the_model_was_trained_on_are_refused(
    bundle: Bundle, shapes: Path, tmp_path: Path, closed_set: bool
) -> None:
    draw_shapes(tmp_path / "other", identities=8, images=4, seed=6)
    trained = knowing(bundle, tmp_path / "other", tmp_path / "trained", identities=("somebody",))
    assert learned(trained, shapes, closed_set=closed_set).notes() == []
    shutil.copytree(shapes, tmp_path / "mixed")
    Image.open(tmp_path / "other/colour-03/1.png").save(tmp_path / "mixed/colour-00/again.bmp")
    with pytest.raises(InvalidDataset, match=r"trained on 1 of these images: colour-00/again\.bmp .*leave them out"):
        learned(trained, tmp_path / "mixed", closed_set=closed_set)


def test_where_not_all_images_trained_on_are_known_there_may_be_more(
    bundle: Bundle, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen, "MAX_DIGESTS", 5)
    trained = knowing(bundle, shapes, tmp_path / "trained", identities=("somebody",))
    with pytest.raises(InvalidDataset, match="trained on at least 5 of these images"):
        learned(trained, shapes)


def test_names_of_identities_trained_on_are_told_and_a_bundle_that_cannot_tell_says_so(
    bundle: Bundle, shapes: Path, tmp_path: Path
) -> None:
    draw_shapes(tmp_path / "other", identities=2, images=2, seed=6)
    trained = knowing(bundle, tmp_path / "other", tmp_path / "trained", identities=("colour-01", "colour-09"))
    found = learned(trained, shapes)
    assert found.overlap is not None
    assert found.overlap.identities == ("colour-01",)
    assert "trained on identities of 1 of these names: colour-01;" in found.notes()[0]
    assert learned(trained, shapes, closed_set=True).notes() == []
    assert learned(bundle, shapes).notes()[0].startswith("not checked: the bundle is of an earlier version")
