"""P×K batches: what an epoch holds, and that a batch depends on the seed and the step alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from embedding.errors import InvalidDataset
from training.sampling import IdentityBatches


def labels_of(sizes: list[int]) -> NDArray[np.int64]:
    return np.random.default_rng(5).permutation(np.repeat(np.arange(len(sizes)), sizes))


def sampler(sizes: list[int], per_batch: int, each: int, *, seed: int = 0) -> IdentityBatches:
    return IdentityBatches(labels_of(sizes), identities_per_batch=per_batch, images_per_identity=each, seed=seed)


SIZES = st.lists(st.integers(1, 9), min_size=2, max_size=12)


@given(sizes=SIZES, data=st.data(), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=60, deadline=None)
def test_every_batch_has_p_identities_with_k_images_each(sizes: list[int], data: st.DataObject, seed: int) -> None:
    per_batch, each = data.draw(st.integers(1, len(sizes))), data.draw(st.integers(1, 12))
    labels_N = labels_of(sizes)
    batches = sampler(sizes, per_batch, each, seed=seed)
    for batch_B in map(batches.batch, range(2 * batches.batches_per_epoch)):
        assert list(Counter(labels_N[batch_B].tolist()).values()) == [each] * per_batch
        times = Counter(batch_B.tolist())
        for image, count in times.items():
            size = sizes[labels_N[image]]
            assert each // size <= count <= -(-each // size)


@given(sizes=SIZES, data=st.data())
@settings(max_examples=60, deadline=None)
def test_an_epoch_sees_every_identity_and_repeats_only_in_its_last_batch(sizes: list[int], data: st.DataObject) -> None:
    per_batch = data.draw(st.integers(1, len(sizes)))
    labels_N = labels_of(sizes)
    batches = sampler(sizes, per_batch, 2)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * batches.batches_per_epoch, (epoch + 1) * batches.batches_per_epoch)
        seen = [labels_N[batches.batch(step)][::2].tolist() for step in steps]
        assert {identity for batch in seen for identity in batch} == set(range(len(sizes)))
        early = [identity for batch in seen[:-1] for identity in batch]
        assert len(early) == len(set(early))
        epochs.append(seen)
    if len(sizes) > 6:
        assert epochs[0] != epochs[1]


def test_a_batch_depends_on_its_step_and_not_on_those_asked_for_before() -> None:
    forwards, backwards = sampler([4] * 10, 4, 3), sampler([4] * 10, 4, 3)
    ahead = [forwards.batch(step) for step in range(8)]
    back = [backwards.batch(step) for step in reversed(range(8))]
    np.testing.assert_array_equal(ahead, back[::-1])
    assert len({batch_B.tobytes() for batch_B in ahead}) == 8


def test_an_identity_shows_other_images_at_each_visit() -> None:
    batches, labels_N = sampler([9] * 4, 4, 3), labels_of([9] * 4)
    visits = {frozenset(batch_B[labels_N[batch_B] == 0].tolist()) for batch_B in map(batches.batch, range(20))}
    assert len(visits) > 10
    assert frozenset.union(*visits) == frozenset(np.flatnonzero(labels_N == 0).tolist())


def test_seeds_differ() -> None:
    assert not np.array_equal(sampler([9] * 9, 4, 4, seed=1).batch(0), sampler([9] * 9, 4, 4, seed=2).batch(0))


@pytest.mark.parametrize("sizes", [[], [3, 3]])
def test_too_few_identities_are_refused_by_number(sizes: list[int]) -> None:
    with pytest.raises(InvalidDataset, match=rf"has {len(sizes)} identities, fewer than a batch of 3"):
        sampler(sizes, 3, 2)


def test_sizes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        sampler([3, 3], 2, 0)


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6), data=st.data(), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_batches_by_super_class_take_each_from_as_few_as_they_can(
    sizes: list[int], data: st.DataObject, seed: int
) -> None:
    """`sizes` counts the identities of each super-class; identity and super-class are numbered alike."""
    group_of = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    per_batch = data.draw(st.integers(1, len(group_of)))
    labels_N = labels_of([2] * len(group_of))
    batches = IdentityBatches(
        labels_N, identities_per_batch=per_batch, images_per_identity=2, seed=seed, groups_N=group_of[labels_N]
    )
    epochs = []
    for epoch in range(2):
        steps = range(epoch * batches.batches_per_epoch, (epoch + 1) * batches.batches_per_epoch)
        seen = [labels_N[batches.batch(step)][::2] for step in steps]
        # The last batch reaches back into those before it, where P does not divide the number of identities.
        dealt = np.concatenate(seen if len(group_of) % per_batch == 0 or len(seen) == 1 else seen[:-1])
        assert set(np.concatenate(seen).tolist()) == set(range(len(group_of)))
        # Each super-class stands together: it is entered once.
        groups = group_of[dealt]
        assert len(groups) == 0 or 1 + np.count_nonzero(np.diff(groups)) == len(set(groups.tolist()))
        epochs.append(np.concatenate(seen).tolist())
    if len(group_of) > 12:
        assert epochs[0] != epochs[1]


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6), each=st.integers(1, 12), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_images_come_from_every_part_in_turn(sizes: list[int], each: int, seed: int) -> None:
    labels_N = labels_of(sizes)
    parts_N = np.random.default_rng(seed).integers(0, 3, len(labels_N))
    batches = IdentityBatches(
        labels_N, identities_per_batch=len(sizes), images_per_identity=each, seed=seed, parts_N=parts_N
    )
    batch_B = batches.batch(0)
    for identity, size in enumerate(sizes):
        drawn = batch_B[labels_N[batch_B] == identity]
        assert len(drawn) == each
        if each > size:
            continue  # every image comes at least once
        assert len(set(drawn.tolist())) == each
        available = np.bincount(parts_N[labels_N == identity], minlength=3)
        used = np.bincount(parts_N[drawn], minlength=3)
        for part in range(3):  # a part stands behind another by more than one only when it has no more images
            assert used[part] == available[part] or used[part] >= used.max() - 1


def test_which_part_comes_first_is_drawn_too() -> None:
    labels_N, parts_N = np.zeros(10, np.int64).repeat(2), np.tile([0, 1], 10)
    labels_N[10:] = 1
    batches = IdentityBatches(labels_N, identities_per_batch=2, images_per_identity=1, seed=0, parts_N=parts_N)
    shares = np.mean([parts_N[batches.batch(step)].mean() for step in range(200)])
    assert 0.4 < shares < 0.6
