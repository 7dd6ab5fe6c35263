"""The fuzzer's targets on a fixed set of inputs; `make fuzz` goes on from there."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from embedding.images import FORMATS
from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS

QUICK = {"image": 1500, "vector": 2000, "request": 1500, "filter": 600, "bundle": 40, "segment": 250}
ACCEPTED = {"image": 0.1, "vector": 0.05, "request": 0.05, "filter": 0.03, "bundle": 0.01, "segment": 0.01}
"""The least share of inputs that must get past all checks: were all refused at once, nothing would be found."""


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_breaks_it(name: str) -> None:
    target = TARGETS[name]
    assert all(map(target.run, target.seeds()))
    outcomes = [target.run(data) for data in mutated(target.seeds(), QUICK[name], seed=1)]
    assert sum(outcomes) / len(outcomes) > ACCEPTED[name]


def test_images_of_every_kind_that_is_decoded_in_a_way_of_its_own_are_among_the_seeds() -> None:
    kinds = set()
    for data in TARGETS["image"].seeds():
        with Image.open(io.BytesIO(data)) as image:
            kinds |= {image.format, (image.format, image.mode)}
            if image.format == "TIFF" and 322 in image.tag_v2:  # type: ignore[attr-defined]
                kinds.add(("tiled", image.mode))
    assert kinds >= {*FORMATS, ("JPEG", "CMYK"), ("TIFF", "CMYK"), ("tiled", "L"), ("tiled", "CMYK")}


FOUND = [
    ("vector", bytes(60) + b"\xff\xff\x7f\x7f"),  # its square is no float32: numpy warned
    ("bundle", b"\0" + b"0" * 64 + b"  weights\0.safetensors\n"),  # SHA256SUMS with a name that no file can have
]
"""What the fuzzer found, and was mended."""


@pytest.mark.parametrize(("name", "data"), FOUND)
def test_what_was_found_stays_mended(name: str, data: bytes) -> None:
    TARGETS[name].run(data)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_no_input_breaks_it_for_longer(name: str) -> None:
    target = TARGETS[name]
    for data in mutated(target.seeds(), 40 * QUICK[name], seed=2):
        target.run(data)
