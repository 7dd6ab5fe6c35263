"""Splits: whole, disjoint where promised, and fixed by names and seed alone."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding.errors import InvalidDataset
from embedding.images import Preprocessing
from training.config import Side, SplitConfig
from training.datasets import ImageSet
from training.images import ArrayImages
from training.pixels import PixelStore
from training.splits import Split, split

HALF_AND_HALF = SplitConfig(train=0.5, calibration=0.25, test=0.25)


def image_set(identity_of_image: list[str], sides: list[Side | None] | None = None) -> ImageSet:
    identities, labels_N = np.unique(identity_of_image, return_inverse=True)
    seen: Counter[str] = Counter()
    names = []
    for identity in identity_of_image:
        names.append(f"{identity}/{seen[identity]}")
        seen[identity] += 1
    pixels_NHW = np.zeros((len(names), 8, 8), dtype=np.uint8)
    return ImageSet(
        names=names,
        identities=[str(identity) for identity in identities],
        labels_N=labels_N.astype(np.int64),
        sides=sides or [None] * len(names),
        parts_N=np.zeros(len(names), dtype=np.int64),
        store=PixelStore(ArrayImages(pixels_NHW), names, Preprocessing(image_size=8, channels=1), cache_bytes=0),
        rows_N=np.arange(len(names)),
    )


def of_sizes(sizes: list[int], *, prefix: str = "id") -> ImageSet:
    return image_set([f"{prefix}{at}" for at, size in enumerate(sizes) for _ in range(size)])


def side_of_name(images: ImageSet, parts: Split) -> dict[str, str]:
    sides = {"train": parts.train_N, "calibration": parts.calibration_N, "test": parts.test_N}
    return {images.names[at]: side for side, indices in sides.items() for at in indices}


def side_of_identity(images: ImageSet, parts: Split) -> dict[str, str]:
    return {name.rsplit("/", 1)[0]: side for name, side in side_of_name(images, parts).items()}


def pairing_identities(images: ImageSet, indices: np.ndarray) -> int:
    return sum(count > 1 for count in Counter(images.labels_N[indices].tolist()).values())


SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=40).filter(lambda sizes: sum(size > 1 for size in sizes) >= 6)
SHARES = st.tuples(st.integers(1, 10), st.integers(1, 10), st.integers(1, 10)).map(
    lambda weights: {
        name: weight / sum(weights) for name, weight in zip(("train", "calibration", "test"), weights, strict=True)
    }
)


class TestIdentityDisjoint:
    """The default: what was learned is judged on identities never seen."""

    @given(sizes=SIZES, shares=SHARES, seed=st.integers(0, 99))
    def test_each_image_is_used_once_and_no_identity_is_on_two_sides(
        self, sizes: list[int], shares: dict[str, Any], seed: int
    ) -> None:
        images = of_sizes(sizes)
        parts = split(images, SplitConfig(**shares, seed=seed))
        sides = (parts.train_N, parts.calibration_N, parts.test_N)
        assert sorted(np.concatenate(sides).tolist()) == list(range(len(images)))
        labels = [set(images.labels_N[indices].tolist()) for indices in sides]
        assert sum(len(side) for side in labels) == len(images.identities)
        assert all(pairing_identities(images, indices) >= 2 for indices in sides)
        assert all((np.diff(indices) > 0).all() for indices in sides)
        assert parts.protocol == "identity-disjoint"

    @given(identities=st.integers(40, 400), shares=SHARES, seed=st.integers(0, 99))
    def test_shares_are_kept_to_the_nearest_identity(self, identities: int, shares: dict[str, Any], seed: int) -> None:
        images = of_sizes([2] * identities)
        parts = split(images, SplitConfig(**shares, seed=seed))
        for side, indices in (("train", parts.train_N), ("calibration", parts.calibration_N), ("test", parts.test_N)):
            assert abs(len(indices) / 2 - max(shares[side] * identities, 2)) <= 1 + 1e-6

    @given(sizes=SIZES, seed=st.integers(0, 99), order=st.randoms(use_true_random=False))
    def test_the_order_of_files_does_not_matter(self, sizes: list[int], seed: int, order: random.Random) -> None:
        images = of_sizes(sizes)
        at = list(range(len(images)))
        order.shuffle(at)
        shuffled = images.subset(at)
        config = HALF_AND_HALF.model_copy(update={"seed": seed})
        assert side_of_name(images, split(images, config)) == side_of_name(shuffled, split(shuffled, config))

    @given(sizes=SIZES, more=st.integers(1, 5), seed=st.integers(0, 99))
    def test_more_images_of_known_identities_change_no_side(self, sizes: list[int], more: int, seed: int) -> None:
        config = HALF_AND_HALF.model_copy(update={"seed": seed})
        before = of_sizes(sizes)
        after = of_sizes([size + more if size > 1 else size for size in sizes])
        assert side_of_identity(before, split(before, config)) == side_of_identity(after, split(after, config))

    def test_one_more_identity_moves_few_others(self) -> None:
        before, after = of_sizes([2] * 200), of_sizes([2] * 201)
        config = SplitConfig()
        old, new = (side_of_identity(images, split(images, config)) for images in (before, after))
        assert sum(old[identity] != new[identity] for identity in old) <= 2

    def test_another_seed_gives_another_split(self) -> None:
        images = of_sizes([2] * 30)
        assert len({tuple(split(images, SplitConfig(seed=seed)).test_N) for seed in range(5)}) == 5

    def test_a_split_is_the_same_on_every_machine(self) -> None:
        # printf '0\0person-3' | sha256sum, sorted: 5, 2, 4, 3, 0, 1; two to a side.
        images = of_sizes([2] * 6, prefix="person-")
        sides = side_of_identity(images, split(images, SplitConfig(train=0.4, calibration=0.3, test=0.3)))
        assert sides == {
            "person-5": "train",
            "person-2": "train",
            "person-4": "calibration",
            "person-3": "calibration",
            "person-0": "test",
            "person-1": "test",
        }

    def test_too_few_identities_are_counted(self) -> None:
        with pytest.raises(InvalidDataset) as caught:
            split(of_sizes([3, 3, 3, 3, 3, 1, 1, 1]), SplitConfig())
        assert "each side needs 2, so 6 in all" in str(caught.value)
        assert caught.value.field == "split"

    def test_a_side_without_share_and_without_data_is_named(self) -> None:
        with pytest.raises(InvalidDataset, match=r"leaves test with too few .*test 0\)"):
            split(of_sizes([2] * 20), SplitConfig(train=0.8, calibration=0.2, test=0.0))


class TestSuperClasses:
    """Identities that resemble each other stay together when asked for."""

    @given(
        sizes=st.lists(st.integers(2, 6), min_size=3, max_size=12),
        seed=st.integers(0, 99),
        images_each=st.integers(2, 3),
    )
    def test_no_super_class_is_on_two_sides(self, sizes: list[int], seed: int, images_each: int) -> None:
        images = image_set(
            [
                f"alphabet{a}/character{c}"
                for a, size in enumerate(sizes)
                for c in range(size)
                for _ in range(images_each)
            ]
        )
        parts = split(images, HALF_AND_HALF.model_copy(update={"seed": seed, "by": "super"}))
        alphabets = [
            {images.names[at].split("/")[0] for at in indices}
            for indices in (parts.train_N, parts.calibration_N, parts.test_N)
        ]
        assert sum(len(side) for side in alphabets) == len(sizes)

    def test_identities_without_a_super_class_are_named(self) -> None:
        images = image_set(["greek/alpha"] * 2 + ["seven"] * 2)
        with pytest.raises(InvalidDataset, match=r"needs identities of the form SUPER/IDENTITY; got 'seven'"):
            split(images, SplitConfig(by="super"))


class TestClosedSet:
    """When asked for, each identity is on all sides."""

    @given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=10), seed=st.integers(0, 99))
    def test_each_image_is_used_once_and_each_large_identity_is_everywhere(self, sizes: list[int], seed: int) -> None:
        images = of_sizes([*sizes, 6, 6])
        config = SplitConfig(protocol="closed-set", seed=seed)
        parts = split(images, config)
        sides = (parts.train_N, parts.calibration_N, parts.test_N)
        assert sorted(np.concatenate(sides).tolist()) == list(range(len(images)))
        for label, size in enumerate(np.bincount(images.labels_N)):
            counts = [int((images.labels_N[indices] == label).sum()) for indices in sides]
            assert counts == [size, 0, 0] if size < 6 else min(counts) >= 2
        assert parts.protocol == "closed-set"

    def test_stated_sides_are_kept(self) -> None:
        sides: list[Side | None] = [None] * 15
        sides[10:] = ["test"] * 5
        images = image_set((["a"] * 5 + ["b"] * 5) + ["a", "a", "a", "b", "b"], sides)
        parts = split(images, SplitConfig(protocol="closed-set", train=0.6, calibration=0.4, test=0.0))
        assert parts.test_N.tolist() == [10, 11, 12, 13, 14]
        assert (len(parts.train_N), len(parts.calibration_N)) == (6, 4)


class TestStatedSides:
    """Sides that the data states win over shares."""

    def test_shares_divide_the_rest(self) -> None:
        images = of_sizes([2] * 12)
        stated: list[Side | None] = [None] * 24
        stated[20:] = ["test"] * 4
        parts = split(replace(images, sides=stated), SplitConfig(train=0.8, calibration=0.2, test=0.0))
        assert {images.names[at] for at in parts.test_N} == {images.names[at] for at in range(20, 24)}
        assert (len(parts.train_N), len(parts.calibration_N)) == (16, 4)

    def test_other_images_of_a_stated_identity_follow_it(self) -> None:
        images = of_sizes([2] * 12)
        stated: list[Side | None] = [None] * 24
        stated[0] = stated[2] = "test"
        parts = split(replace(images, sides=stated), SplitConfig(train=0.8, calibration=0.2, test=0.0))
        assert parts.test_N.tolist() == [0, 1, 2, 3]

    def test_an_identity_on_two_sides_is_named(self) -> None:
        images = of_sizes([2] * 12)
        stated: list[Side | None] = ["train", "test", *[None] * 22]
        with pytest.raises(InvalidDataset, match=r"puts id0 on two sides, train and test; .*closed-set"):
            split(replace(images, sides=stated), SplitConfig())
