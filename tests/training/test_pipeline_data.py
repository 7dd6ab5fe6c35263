"""What a training says of its data: what it refuses, skips and warns of."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from embedding.errors import InvalidDataset, LookalikeError
from tests.training.shapes import RECIPE, draw_shapes
from training import material
from training.config import parse_recipe
from training.pipeline import train


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda root: (root / "shapes").mkdir(), "image"),
        (lambda root: draw_shapes(root / "shapes", identities=3), "identities"),
        (lambda root: draw_shapes(root / "shapes", images=1), "one image"),
        (lambda root: (draw_shapes(root / "shapes"), (root / "shapes/colour-00/bad.png").write_bytes(b"x")), "bad.png"),
    ],
    ids=["empty folder", "too few identities", "one image each", "bad image"],
)
def test_data_that_cannot_be_trained_on_is_named_and_nothing_is_written(tmp_path: Path, write, message: str) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path)
    with pytest.raises(LookalikeError, match=message) as raised:
        train(parse_recipe(RECIPE), out=tmp_path / "b", data_root=tmp_path, device="cpu", console=Console(quiet=True))
    assert isinstance(raised.value, InvalidDataset)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "b").exists()


def test_a_running_training_is_watched_on_whole_identities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(material, "WATCHED_IMAGES", 4)
    draw_shapes(tmp_path / "shapes", images=2)  # of the calibration side's three identities, every other image
    text = RECIPE.replace("checkpoint_every = 20", "checkpoint_every = 0, evaluate_every = 20")
    recipe = parse_recipe(text.split("[[evaluation.search]]")[0])
    said = io.StringIO()
    train(recipe, out=tmp_path / "b", data_root=tmp_path, device="cpu", console=Console(file=said, width=200))
    assert "recall@1" in said.getvalue()


def test_a_closed_set_whose_held_out_identities_do_not_train_is_refused(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "shapes")
    rows = [
        (file.relative_to(tmp_path).as_posix(), file.parent.name, ("train", "calibration", "test")[at % 3])
        for at, folder in enumerate(sorted((tmp_path / "shapes").iterdir()))
        for file in sorted(folder.iterdir())
    ]
    (tmp_path / "m.csv").write_text("path,identity,split\n" + "".join(f"{','.join(row)}\n" for row in rows))
    text = RECIPE.replace("identity-disjoint", "closed-set").replace(
        '"folder", path = "shapes"', '"manifest", path = "m.csv"'
    )
    recipe = parse_recipe(text.split("[[evaluation.search]]")[0])
    with pytest.raises(InvalidDataset, match="of the calibration side, and none of its identity trains"):
        train(recipe, out=tmp_path / "b", data_root=tmp_path, device="cpu", console=Console(quiet=True))


def test_copies_across_the_sides_of_a_closed_set_are_told(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "shapes", images=3)
    for file in sorted(tmp_path.glob("shapes/*/*.png")):
        for copy in range(3):
            shutil.copy(file, file.with_name(f"{file.stem}-{copy}.png"))
    text = RECIPE.replace("identity-disjoint", "closed-set").replace("steps = 40", "steps = 5")
    said = io.StringIO()
    bundle = train(
        parse_recipe(text.split("[[evaluation.search]]")[0]),
        out=tmp_path / "b",
        data_root=tmp_path,
        device="cpu",
        console=Console(file=said, width=300),
    )
    told = "of the images held out have the pixels of training images, so that figures of them flatter"
    assert told in said.getvalue()
    assert told in (bundle.path / "README.md").read_text()


def test_skipped_images_are_listed(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "shapes")
    (tmp_path / "shapes/colour-00/bad.png").write_bytes(b"x")
    recipe = parse_recipe(RECIPE.replace('path = "shapes"', 'path = "shapes", max_bad_images = 1'))
    said = io.StringIO()
    bundle = train(recipe, out=tmp_path / "b", data_root=tmp_path, device="cpu", console=Console(file=said))
    assert "skipped colour-00/bad.png" in said.getvalue()
    assert "colour-00/bad.png" in str(bundle.lineage.data["skipped"])
