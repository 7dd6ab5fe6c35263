"""images → unit vectors: batched, on any device, the same vector whatever the batch.

Shapes: B images, C channels, H height, W width, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from embedding.bundle import Bundle
from embedding.decision import Vectors
from embedding.errors import InvalidInput
from embedding.images import MAX_PIXELS, Pixels, decode
from embedding.networks import ROWS_OF_A_TILE

_TOKEN_NETWORKS = {"vit_b_16", "convnext_tiny"}
"""Networks whose inner matrix products have rows that depend on the batch size."""


def pick_device(name: str = "auto") -> torch.device:
    """The device named, or for "auto" the first of CUDA, Apple's MPS and the CPU. Raises InvalidInput."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(
            f"device {name!r} is not available here; accepted: auto, cpu, cuda, mps", field="device"
        ) from error
    return device


class Encoder:
    """Embeds images with one bundle's network.

    On the CPU an image's embedding is the same bit for bit whatever else is in its batch; elsewhere it is the same
    within 1e-5. Methods may be called from several threads at once.
    """

    def __init__(
        self, bundle: Bundle, *, device: str = "auto", batch_size: int = 64, max_pixels: int = MAX_PIXELS
    ) -> None:
        if batch_size < 1:
            raise InvalidInput(f"batch_size must be at least 1; got {batch_size}", field="batch_size")
        self.bundle = bundle
        self.device = pick_device(device)
        self._batch_size = batch_size
        self._max_pixels = max_pixels
        self._network = bundle.network().to(self.device).to(memory_format=torch.channels_last)
        self._mean_C11 = self._per_channel(bundle.preprocessing.mean)
        self._std_C11 = self._per_channel(bundle.preprocessing.std)
        self._tile = ROWS_OF_A_TILE if bundle.architecture.network in _TOKEN_NETWORKS else 2

    @property
    def embedding_dim(self) -> int:
        return self.bundle.embedding_dim

    def prepare(self, data: bytes) -> Pixels:
        """Decode one image to the pixels [C, H, W] that the network sees. Raises InvalidImage or ImageTooLarge."""
        return self.bundle.preprocessing.pixels(decode(data, max_pixels=self._max_pixels))

    def encode_pixels(self, pixels_BCHW: Pixels) -> Vectors:
        """Unit float32 embeddings [B, D] of prepared pixels."""
        shape = (self.bundle.architecture.channels,) + 2 * (self.bundle.architecture.image_size,)
        if pixels_BCHW.dtype != np.uint8 or pixels_BCHW.shape[1:] != shape:
            raise InvalidInput(
                f"pixels must be uint8 [B, {', '.join(map(str, shape))}], as `prepare` gives them; "
                f"got {pixels_BCHW.dtype} {list(pixels_BCHW.shape)}"
            )
        emb_BD = np.empty((len(pixels_BCHW), self.embedding_dim), dtype=np.float32)
        with torch.inference_mode():
            for start in range(0, len(pixels_BCHW), self._batch_size):
                batch_BCHW = torch.from_numpy(pixels_BCHW[start : start + self._batch_size])
                emb_BD[start : start + self._batch_size] = self._forward(batch_BCHW).cpu().numpy()
        return emb_BD

    def encode(self, images: Sequence[bytes]) -> Vectors:
        """Unit float32 embeddings [B, D] of encoded images. Raises InvalidImage or ImageTooLarge."""
        shape = (self.bundle.architecture.channels,) + 2 * (self.bundle.architecture.image_size,)
        pixels_BCHW = np.stack([self.prepare(data) for data in images]) if images else np.empty((0, *shape), np.uint8)
        return self.encode_pixels(pixels_BCHW)

    def warm_up(self) -> None:
        """Run one batch, so that the first caller does not pay for kernel selection and allocation."""
        architecture = self.bundle.architecture
        self.encode_pixels(
            np.zeros((2, architecture.channels, architecture.image_size, architecture.image_size), np.uint8)
        )

    def _forward(self, pixels_BCHW: Tensor) -> Tensor:
        size = len(pixels_BCHW)
        if size % self._tile and (self._tile > 2 or size == 1):
            # A batch of one takes other convolution kernels, which differ in the last bits.
            pixels_BCHW = torch.cat([pixels_BCHW, pixels_BCHW[:1].expand(-size % self._tile, -1, -1, -1)])
        if self.device.type == "cuda":
            pixels_BCHW = pixels_BCHW.pin_memory()
        images_BCHW = pixels_BCHW.to(self.device, non_blocking=True).float().div_(255)
        images_BCHW = images_BCHW.sub_(self._mean_C11).div_(self._std_C11).contiguous(memory_format=torch.channels_last)
        emb_BD: Tensor = self._network(images_BCHW)
        return emb_BD[:size]

    def _per_channel(self, values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, device=self.device).reshape(-1, 1, 1)
