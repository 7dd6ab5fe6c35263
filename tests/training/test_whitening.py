"""Whitening: distances become Mahalanobis distances of the within-identity covariance, along the main axes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from embedding.errors import InvalidDataset
from embedding.images import Preprocessing
from embedding.networks import Architecture, build
from training.datasets import load
from training.datasets_config import DigitsData
from training.evaluation import evaluate
from training.turns import TurnedImages
from training.whitening import whiten, whitening

Floats = NDArray[np.float64]


def crowd(identities: int, each: int, features: int, *, seed: int = 0) -> tuple[Floats, NDArray[np.int64]]:
    """Identities that differ a little in every direction, and their images a lot in one."""
    rng = np.random.default_rng(seed)
    labels_N = np.repeat(np.arange(identities), each)
    nuisance_F = rng.normal(size=features)
    identity_NF = rng.normal(size=(identities, features))[labels_N]
    noise_NF = 0.3 * rng.normal(size=(len(labels_N), features))
    return 5 + identity_NF + noise_NF + 4 * rng.normal(size=(len(labels_N), 1)) * nuisance_F, labels_N


def within_covariance(x_ND: Floats, labels_N: NDArray[np.int64]) -> Floats:
    """By a loop over identities."""
    total = np.zeros((x_ND.shape[1], x_ND.shape[1]))
    for label in set(labels_N.tolist()):
        away = x_ND[labels_N == label] - x_ND[labels_N == label].mean(0)
        total += away.T @ away
    return total / len(x_ND)


@given(seed=st.integers(0, 1000), shrinkage=st.sampled_from([1e-6, 0.1, 1.0, 10.0]))
@settings(max_examples=20, deadline=None)
def test_at_full_width_distances_are_mahalanobis_distances(seed: int, shrinkage: float) -> None:
    x_NF, labels_N = crowd(12, 5, 6, seed=seed)
    weight_DF, bias_D = whitening(x_NF, labels_N, width=6, shrinkage=shrinkage)
    covariance = within_covariance(x_NF, labels_N)
    covariance += shrinkage * np.trace(covariance) / 6 * np.eye(6)
    a_F, b_F = x_NF[0], x_NF[-1]
    expected = np.sqrt((a_F - b_F) @ np.linalg.solve(covariance, a_F - b_F))
    assert np.linalg.norm(weight_DF @ (a_F - b_F)) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose((x_NF @ weight_DF.T + bias_D).mean(0), 0, atol=1e-8)


def test_without_shrinkage_identities_vary_equally_in_every_direction_and_axes_are_sorted() -> None:
    x_NF, labels_N = crowd(30, 8, 5)
    weight_DF, bias_D = whitening(x_NF, labels_N, width=5, shrinkage=0.0)
    z_ND = x_NF @ weight_DF.T + bias_D
    np.testing.assert_allclose(within_covariance(z_ND, labels_N), np.eye(5), atol=1e-8)
    covariance_DD = z_ND.T @ z_ND
    np.testing.assert_allclose(covariance_DD - np.diag(np.diag(covariance_DD)), 0, atol=1e-6)
    assert (np.diff(np.diag(covariance_DD)) <= 0).all()


def test_a_narrow_projection_is_the_start_of_a_wide_one_and_a_wider_ends_in_zeros() -> None:
    x_NF, labels_N = crowd(20, 4, 6)
    full_DF, _ = whitening(x_NF, labels_N, width=6, shrinkage=0.5)
    narrow_DF, _ = whitening(x_NF, labels_N, width=2, shrinkage=0.5)
    wide_DF, bias_D = whitening(x_NF, labels_N, width=9, shrinkage=0.5)
    np.testing.assert_array_equal(narrow_DF, full_DF[:2])
    np.testing.assert_array_equal(wide_DF[:6], full_DF)
    assert not wide_DF[6:].any()
    assert not bias_D[6:].any()


def test_identities_never_seen_are_told_apart_better() -> None:
    x_NF, labels_N = crowd(80, 6, 12)
    seen_N = labels_N < 40
    weight_DF, bias_D = whitening(x_NF[seen_N], labels_N[seen_N], width=12, shrinkage=0.1)
    before, after = x_NF[~seen_N] - x_NF[seen_N].mean(0), x_NF[~seen_N] @ weight_DF.T + bias_D
    errors = []
    for z_ND in (before, after):
        emb_ND = (z_ND / np.linalg.norm(z_ND, axis=1, keepdims=True)).astype(np.float32)
        errors.append(evaluate(emb_ND, labels_N[~seen_N]).metrics()["EER"])
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[1] < errors[0] / 4


def test_a_whitened_network_projects_the_features_of_its_images_and_their_mirrors() -> None:
    preprocessing = Preprocessing(image_size=8, channels=1)
    digits = load([DigitsData(source="digits")], data_root=None, preprocessing=preprocessing)
    images = digits.subset(np.arange(0, 300))
    torch.manual_seed(0)
    network = build(Architecture(network="small_cnn", image_size=8, channels=1, embedding_dim=16, width=4)).eval()
    pixels_NCHW = images.pixels(range(len(images)), preprocessing)
    seen_NCHW = torch.from_numpy(np.concatenate([pixels_NCHW, pixels_NCHW[..., ::-1]])).float() / 255 * 2 - 1
    with torch.inference_mode():
        features_NF = network.backbone(seen_NCHW).numpy()
    whiten(network, images, preprocessing, shrinkage=1.0, views=("as-is", "mirror"), device="cpu")
    weight_DF, bias_D = whitening(features_NF, np.tile(images.labels_N, 2), width=16, shrinkage=1.0)
    expected = features_NF.astype(np.float64) @ weight_DF.T + bias_D
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    with torch.inference_mode():
        np.testing.assert_allclose(network(seen_NCHW).numpy(), expected, atol=1e-4)


def test_turned_identities_are_whitened_as_identities_of_their_own() -> None:
    preprocessing = Preprocessing(image_size=8, channels=1)
    images = load([DigitsData(source="digits")], data_root=None, preprocessing=preprocessing).subset(np.arange(200))
    torch.manual_seed(0)
    network = build(Architecture(network="small_cnn", image_size=8, channels=1, embedding_dim=16, width=4)).eval()
    pixels_NCHW = images.pixels(range(len(images)), preprocessing)
    turned_NCHW = np.rot90(pixels_NCHW, 2, axes=(2, 3))
    seen_NCHW = torch.from_numpy(np.concatenate([pixels_NCHW, turned_NCHW])).float() / 255 * 2 - 1
    with torch.inference_mode():
        features_NF = network.backbone(seen_NCHW).numpy()
    whiten(network, TurnedImages(images, ["rotate-180"]), preprocessing, shrinkage=1.0, device="cpu")
    labels_N = np.concatenate([images.labels_N, images.labels_N + 10])
    weight_DF, bias_D = whitening(features_NF, labels_N, width=16, shrinkage=1.0)
    expected = features_NF.astype(np.float64) @ weight_DF.T + bias_D
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    with torch.inference_mode():
        np.testing.assert_allclose(network(seen_NCHW).numpy(), expected, atol=1e-4)


def test_what_cannot_be_whitened_is_refused() -> None:
    x_NF = np.random.default_rng(0).normal(size=(6, 4))
    with pytest.raises(InvalidDataset, match="no training identity has two"):
        whitening(x_NF, np.arange(6), width=4, shrinkage=1.0)
    x_NF[:, 2] = 0  # a dead feature
    with pytest.raises(InvalidDataset, match="above 0, such as"):
        whitening(x_NF, np.repeat([0, 1], 3), width=4, shrinkage=0.0)
    with pytest.raises(InvalidDataset, match="collapsed"):
        whitening(np.repeat(x_NF[:2], 3, axis=0), np.repeat([0, 1], 3), width=4, shrinkage=1.0)
