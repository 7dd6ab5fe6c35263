"""The moving average of weights against its formula."""

from __future__ import annotations

import pytest
import torch

from embedding.networks import Architecture, build
from training.averaging import averaged


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_average_follows_the_weights(decay: float) -> None:
    network = build(Architecture(network="small_cnn", image_size=8, channels=1, width=4, embedding_dim=2))
    average = averaged(network, decay)
    expected = 0.0
    for update in range(6):
        with torch.no_grad():
            network.projection.bias.fill_(update)
        average.update_parameters(network)
        share = min(decay, (1 + update) / (10 + update))
        expected = update if update == 0 else share * expected + (1 - share) * update
        assert average.module.projection.bias.tolist() == pytest.approx([expected] * 2)
