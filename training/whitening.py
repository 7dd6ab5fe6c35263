"""A projection in closed form: directions in which images of one identity vary are made short.

Shapes: N images, F backbone features, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from embedding.errors import InvalidDataset
from embedding.images import Preprocessing, View
from embedding.networks import EmbeddingNetwork
from training.datasets import ImageSet
from training.features import backbone_features
from training.turns import TurnedImages

Floats = NDArray[np.float64]


def whitening(
    features_NF: NDArray[np.generic], labels_N: NDArray[np.generic], *, width: int, shrinkage: float
) -> tuple[Floats, Floats]:
    """Weight [D, F] and bias [D] of the learned whitening of Mikolajczyk, Matas 2007, section 3, with D = `width`.

    With S the covariance of features about the mean of their identity, shrunk to S + `shrinkage`·tr(S)/F·I, features
    are centred and multiplied by S^(-1/2), after which identities vary equally in every direction, and turned onto the
    D principal axes of the result. Where F < D the last D − F values are 0.
    Raises InvalidDataset when no identity has two images.
    """
    x_NF = np.asarray(features_NF, dtype=np.float64)
    _, identity_N = np.unique(np.asarray(labels_N), return_inverse=True)
    sizes_I = np.bincount(identity_N)
    if sizes_I.max(initial=0) < 2:
        raise InvalidDataset(
            "whitening learns from images of one identity, and no training identity has two", field="training.whitening"
        )
    features = x_NF.shape[1]
    means_IF = np.zeros((len(sizes_I), features))
    np.add.at(means_IF, identity_N, x_NF)
    within_NF = x_NF - (means_IF / sizes_I[:, None])[identity_N]
    covariance_FF = within_NF.T @ within_NF / len(x_NF)
    if np.abs(within_NF).max() <= 8 * np.finfo(np.float64).eps * np.abs(x_NF).max():  # but for the mean's rounding
        raise InvalidDataset(
            "the images of each identity have the same features, so that nothing tells what to whiten; leave "
            "training.whitening out, and see whether the images are copies or the network has collapsed",
            field="training.whitening",
        )
    covariance_FF[np.diag_indices(features)] += shrinkage * np.trace(covariance_FF) / features
    variances_F, axes_FF = np.linalg.eigh(covariance_FF)
    if variances_F[0] <= variances_F[-1] * features * np.finfo(np.float64).eps:
        raise InvalidDataset(
            "images of one identity do not differ in every feature, so that their covariance has no inverse; give "
            f"training.whitening a value above {shrinkage:g}, such as 1.0",
            field="training.whitening",
        )
    whiten_FF = axes_FF / np.sqrt(variances_F)
    mean_F = x_NF.mean(0)
    whitened_NF = (x_NF - mean_F) @ whiten_FF
    _, principal_FF = np.linalg.eigh(whitened_NF.T @ whitened_NF)
    weight_DF = np.zeros((width, features))
    kept = min(width, features)
    weight_DF[:kept] = (whiten_FF @ principal_FF[:, ::-1][:, :kept]).T
    return weight_DF, -weight_DF @ mean_F


def whiten(
    network: EmbeddingNetwork,
    images: ImageSet | TurnedImages,
    preprocessing: Preprocessing,
    *,
    shrinkage: float,
    views: Sequence[View] = ("as-is",),
    device: str = "auto",
) -> None:
    """Replace the network's projection by `whitening` of the features of training images, in each of the views."""
    features_NF = np.concatenate(
        [backbone_features(network, images, preprocessing, device=device, view=view) for view in views]
    )
    weight_DF, bias_D = whitening(
        features_NF,
        np.tile(images.labels_N, len(views)),
        width=network.projection.out_features,
        shrinkage=shrinkage,
    )
    with torch.no_grad():
        network.projection.weight.copy_(torch.from_numpy(weight_DF))
        network.projection.bias.copy_(torch.from_numpy(bias_D))
