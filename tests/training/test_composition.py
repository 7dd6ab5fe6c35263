"""Composed identities: who is joined with whom, where they are cut, and that a training sees them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.tiny import draw_images, load_images, recipe, trainer
from training.composition import LARGEST_OFFSET, Composition
from training.datasets import ImageSet

P, K = 5, 3


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    root = tmp_path_factory.mktemp("composed")
    draw_images(root)
    return load_images(root)


def drawn(identities: int, *, share: float, seed: int) -> Composition:
    return Composition.drawn(identities, share=share, rng=np.random.default_rng(seed))


@settings(deadline=None)
@given(identities=st.integers(3, 40), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_no_two_identities_of_a_batch_are_made_of_the_same_two(identities: int, share: float, seed: int) -> None:
    partners = drawn(identities, share=share, seed=seed).partner_P.tolist()
    made_of = [frozenset({place, partner}) for place, partner in enumerate(partners)]
    assert len(set(made_of)) == identities
    assert set(partners) <= set(range(identities))


def test_the_share_is_that_of_composed_identities() -> None:
    def composed(share: float) -> float:
        return float(np.mean([drawn(64, share=share, seed=n).partner_P != np.arange(64) for n in range(50)]))

    assert (composed(0), composed(1)) == (0, 1)
    assert 0.27 < composed(0.3) < 0.33


def test_a_picture_is_its_own_on_one_side_of_the_cut_and_its_partners_on_the_other() -> None:
    rng = np.random.default_rng(0)
    pixels_BCHW = rng.integers(0, 256, (P * K, 2, 8, 8), dtype=np.uint8)
    composition = drawn(P, share=0.7, seed=5)
    rows_r = np.arange(4, 13)  # a process's share begins and ends in the midst of an identity
    partners_r = composition.partners(rows_r, K)
    joined_rCHW = composition.joined(pixels_BCHW[rows_r], pixels_BCHW[partners_r], rows_r, K)
    taken = 0
    for joined_CHW, row in zip(joined_rCHW, rows_r, strict=True):
        identity, number = divmod(int(row), K)
        across_x, across_y = composition.normal_P2[identity]
        for y in range(8):
            for x in range(8):
                is_beyond = (
                    across_x * ((x + 0.5) / 8 - 0.5) + across_y * ((y + 0.5) / 8 - 0.5)
                    > (composition.offset_P[identity])
                )
                of_identity = int(composition.partner_P[identity]) if is_beyond else identity
                assert (joined_CHW[:, y, x] == pixels_BCHW[of_identity * K + number, :, y, x]).all()
                taken += of_identity != identity
    assert taken > 50


def test_cuts_lie_every_way_and_near_the_middle() -> None:
    composition = drawn(4000, share=1, seed=0)
    np.testing.assert_allclose(np.linalg.norm(composition.normal_P2, axis=1), 1)
    angle_P = np.arctan2(composition.normal_P2[:, 1], composition.normal_P2[:, 0])
    assert np.histogram(angle_P, bins=8, range=(-np.pi, np.pi))[0].min() > 400
    assert 0.95 * LARGEST_OFFSET < np.abs(composition.offset_P).max() <= LARGEST_OFFSET


def test_a_training_sees_them_under_the_labels_of_whole_ones(images: ImageSet) -> None:
    plain = trainer(recipe(), images)
    half = trainer(recipe(sampling={"composed_identities": 0.5}), images)
    changed = []
    for step in range(12):
        pixels_BCHW, labels_B = plain.load_batch(step)
        composed_BCHW, composed_labels_B = half.load_batch(step)
        assert (labels_B == composed_labels_B).all()
        assert (half.load_batch(step)[0] == composed_BCHW).all()  # of the step alone: a resumed run sees the same
        is_changed_B = (composed_BCHW != pixels_BCHW).flatten(1).any(1)
        by_identity = is_changed_B.view(-1, 3)
        assert (by_identity.all(1) == by_identity.any(1)).all()
        changed.append(by_identity[:, 0].float().mean().item())
    assert 0.25 < np.mean(changed) < 0.75
    assert len(set(changed)) > 1
