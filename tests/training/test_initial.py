"""What weights could do before training, against nearest neighbours by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embedding.images import Preprocessing
from embedding.networks import Architecture, build
from training.datasets import load
from training.datasets_config import DigitsData
from training.initial import initial_recall
from training.searches import SearchConfig, find


def test_recall_is_that_of_nearest_neighbours_among_the_backbones_features() -> None:
    preprocessing = Preprocessing(image_size=8, channels=1)
    images = load([DigitsData(source="digits")], data_root=None, preprocessing=preprocessing).subset(np.arange(240))
    torch.manual_seed(0)
    network = build(Architecture(network="small_cnn", image_size=8, channels=1, width=4))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    queries, gallery = images.names[0][:-1] + "*", images.names[-1][:-1] + "*"
    search = find(SearchConfig(name="some", query=queries, gallery=gallery), images.names, images.labels_N)
    assert search.gallery_rows is not None
    recall = initial_recall(network, images, [search], preprocessing, device="cpu")

    seen = torch.from_numpy(images.pixels(range(240), preprocessing)).float() / 255 * 2 - 1
    with torch.inference_mode():
        features = network.eval().backbone(seen).double().numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    cosines = features @ features.T
    within = cosines.copy()
    np.fill_diagonal(within, -2)
    hits = images.labels_N[within.argmax(1)] == images.labels_N
    assert recall["recall@1 of the initial features"] == pytest.approx(hits.mean())
    rows, among = search.query_rows, search.gallery_rows
    has_match = np.isin(images.labels_N[rows], images.labels_N[among])
    nearest = among[cosines[np.ix_(rows, among)].argmax(1)]
    hits = (images.labels_N[nearest] == images.labels_N[rows])[has_match]
    assert recall["some: recall@1 of the initial features"] == pytest.approx(hits.mean())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
