"""What a backbone gives before the projection, of a whole set of images.

Shapes: n images of a chunk, N images, F backbone features.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from embedding.encoder import pick_device
from embedding.images import Preprocessing, View
from embedding.networks import EmbeddingNetwork
from embedding.views import view_of
from training.datasets import ImageSet
from training.turns import TurnedImages

CHUNK_IMAGES = 64
"""Images whose feature maps are in memory at once."""


@torch.inference_mode()
def backbone_features(
    network: EmbeddingNetwork,
    images: ImageSet | TurnedImages,
    preprocessing: Preprocessing,
    *,
    device: str = "auto",
    view: View = "as-is",
) -> NDArray[np.float32]:
    """Features [N, F] of all images in a view. The network is moved to the device and put in evaluation mode.

    Raises InvalidImage or ImageTooLarge, naming the image that cannot be read.
    """
    where = pick_device(device)
    network = network.to(where).eval()
    mean_C11 = torch.tensor(preprocessing.mean, device=where).reshape(-1, 1, 1)
    std_C11 = torch.tensor(preprocessing.std, device=where).reshape(-1, 1, 1)
    chunks = []
    for start in range(0, len(images), CHUNK_IMAGES):
        pixels_nCHW = images.pixels(range(start, min(start + CHUNK_IMAGES, len(images))), preprocessing)
        seen_nCHW = torch.from_numpy(np.ascontiguousarray(view_of(pixels_nCHW, view))).to(where).float().div_(255)
        chunks.append(network.features(seen_nCHW.sub_(mean_C11).div_(std_C11)).float().cpu().numpy())
    return np.concatenate(chunks)
