"""Which images train, which teach the margin, which judge the result.

An order by hash of seed and name stands in for chance, so that a split depends on names alone: not on the order of
files, nor on the version of a random generator. N images of a set.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from embedding.errors import InvalidDataset
from training.config import Protocol, Side, SplitConfig
from training.datasets import ImageSet

SIDES: tuple[Side, ...] = get_args(Side)

PAIRING_IDENTITIES = 2
"""Identities of at least two images that each side needs: fewer give no matching or no non-matching pair."""

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Indices into an ImageSet, rising; together each index once."""

    train_N: Indices
    calibration_N: Indices
    test_N: Indices
    protocol: Protocol


def split(images: ImageSet, config: SplitConfig) -> Split:
    """Divide a set by the protocol; images whose side the data states keep it.

    Raises InvalidDataset when the stated sides put an identity on two sides of an identity-disjoint split, when one
    image lies there on two sides under two identities, when a closed set holds identities out that do not train, or
    when a side is left with fewer than two identities of two images.
    """
    side_of = (
        _identity_disjoint(images, config) if config.protocol == "identity-disjoint" else _closed_set(images, config)
    )
    _check(images, side_of, config)
    (_refuse_copies if config.protocol == "identity-disjoint" else _refuse_unknown)(images, side_of)
    train_N, calibration_N, test_N = (
        np.array([at for at, side in enumerate(side_of) if side == wanted], dtype=np.int64) for wanted in SIDES
    )
    return Split(train_N=train_N, calibration_N=calibration_N, test_N=test_N, protocol=config.protocol)


def _identity_disjoint(images: ImageSet, config: SplitConfig) -> list[Side]:
    """The side of each image; images of one group (an identity or a super-class) share it."""
    group_of = _groups(images, config)
    identity_sizes = np.bincount(images.labels_N, minlength=len(images.identities))
    stated: dict[str, Side] = {}
    with_pairs: dict[str, bool] = defaultdict(bool)
    for label, side in zip(images.labels_N, images.sides, strict=True):
        group = group_of[label]
        with_pairs[group] |= bool(identity_sizes[label] > 1)
        if side is not None and stated.setdefault(group, side) != side:
            raise InvalidDataset(
                f"the data puts {group} on two sides, {stated[group]} and {side}; give all its images one side, or ask "
                'for split.protocol = "closed-set"',
                field="split.protocol",
            )
    # Groups without a matching pair are dealt separately: they must not use up a side's few places.
    free = [group for group in with_pairs if group not in stated]
    least = PAIRING_IDENTITIES if config.by == "identity" else 1
    dealt = _deal([group for group in free if with_pairs[group]], config, least=least)
    dealt |= _deal([group for group in free if not with_pairs[group]], config, least=0)
    side_of_group = {**stated, **dealt}
    return [side_of_group[group_of[label]] for label in images.labels_N]


def _groups(images: ImageSet, config: SplitConfig) -> Sequence[str]:
    if config.by == "identity":
        return images.identities
    if (super_classes := images.super_classes) is None:
        flat = next(identity for identity in images.identities if "/" not in identity)
        raise InvalidDataset(
            f'split.by = "super" needs identities of the form SUPER/IDENTITY; got {flat!r}; use by = "identity"',
            field="split.by",
        )
    return super_classes


def _closed_set(images: ImageSet, config: SplitConfig) -> list[Side]:
    """The side of each image; an identity with too few images to be on all sides trains only."""
    free: dict[int, list[int]] = defaultdict(list)
    for at, (label, side) in enumerate(zip(images.labels_N, images.sides, strict=True)):
        if side is None:
            free[int(label)].append(at)
    side_of = dict(enumerate(images.sides))
    for members in free.values():
        names = {images.names[at]: at for at in members}
        enough = len(members) >= 2 * sum(share > 0 for share in _shares(config).values())
        dealt = _deal(names, config, least=2) if enough else dict.fromkeys(names, SIDES[0])
        side_of |= {names[name]: side for name, side in dealt.items()}
    return [side for side in side_of.values() if side is not None]


def _shares(config: SplitConfig) -> dict[Side, float]:
    return {"train": config.train, "calibration": config.calibration, "test": config.test}


def _deal(names: Iterable[str], config: SplitConfig, *, least: int) -> dict[str, Side]:
    """A side for each name, in the order of their hashes; `least` for every side with a share, where they suffice."""
    ordered = sorted(names, key=lambda name: hashlib.sha256(f"{config.seed}\0{name}".encode()).digest())
    sizes = _sizes(len(ordered), _shares(config), least=least)
    sides = [side for side, size in sizes.items() for _ in range(size)]
    return dict(zip(ordered, sides, strict=True))


def _sizes(total: int, shares: Mapping[Side, float], *, least: int) -> dict[Side, int]:
    """Whole numbers that add up to `total`, by largest remainder, then raised to `least` at the largest's expense."""
    exact = {side: share * total for side, share in shares.items()}
    sizes = {side: int(size + 1e-9) for side, size in exact.items()}  # 0.15 · 20 is 2.9999…
    by_remainder = sorted(exact, key=lambda side: sizes[side] - exact[side])
    for side in by_remainder[: total - sum(sizes.values())]:
        sizes[side] += 1
    for side in (side for side, share in shares.items() if share > 0):
        while sizes[side] < least and sizes[largest := max(sizes, key=lambda other: sizes[other])] > least:
            sizes[side] += 1
            sizes[largest] -= 1
    return sizes


def _check(images: ImageSet, side_of: Sequence[Side], config: SplitConfig) -> None:
    counts = Counter(zip(side_of, images.labels_N.tolist(), strict=True))
    pairing = Counter(side for (side, _), count in counts.items() if count > 1)
    if short := [side for side in SIDES if pairing[side] < PAIRING_IDENTITIES]:
        found = ", ".join(f"{side} {pairing[side]}" for side in SIDES)
        raise InvalidDataset(
            f"the {config.protocol} split leaves {' and '.join(short)} with too few identities of two images "
            f"({found}); each side needs {PAIRING_IDENTITIES}, so {PAIRING_IDENTITIES * len(SIDES)} in all: "
            "add identities, or change the shares of [split]",
            field="split",
        )


def _refuse_unknown(images: ImageSet, side_of: Sequence[Side]) -> None:
    train, *held_out = SIDES
    known = {label for label, side in zip(images.labels_N.tolist(), side_of, strict=True) if side == train}
    for at, side in enumerate(side_of):
        if side in held_out and int(images.labels_N[at]) not in known:
            raise InvalidDataset(
                f"{images.described(at)} is of the {side} side, and none of its identity trains: a closed set has all "
                'identities in training; give some of its images there, or ask for "identity-disjoint"',
                field="split.protocol",
            )


def copies_of_training(images: ImageSet, sides: Split) -> int:
    """How many of the images held out have the pixels of a training image, and so were seen: a closed set divides the
    images of an identity, copies among them."""
    digests_N = images.pixel_digests
    held_out_N = np.concatenate([sides.calibration_N, sides.test_N])
    return int(np.isin(digests_N[held_out_N], digests_N[sides.train_N]).sum())


def _refuse_copies(images: ImageSet, side_of: Sequence[Side]) -> None:
    """One image under two identities, seen in training and held out: these are not the unseen identities they seem."""
    across = [group for group in images.copies if len({side_of[at] for at in group}) > 1]
    if across:
        one, side = across[0][0], side_of[across[0][0]]
        other = next(at for at in across[0] if side_of[at] != side)
        named = " and ".join(f"{images.described(at)} of the {side_of[at]} side" for at in (one, other))
        more = f", and {len(across) - 1} more images likewise" if len(across) > 1 else ""
        raise InvalidDataset(
            f"{named} are the same file, byte for byte{more}: the identity-disjoint split would judge by what it "
            "has learned from; keep each image under one identity, or make one identity of those that share images",
            field="data",
        )
