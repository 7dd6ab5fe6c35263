"""images → unit vectors: batched, on any device, the same vector whatever the batch.

Shapes: B images, C channels, H height, W width, D embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import copy
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embedding.bundle import Bundle
from embedding.decision import Vectors
from embedding.errors import InvalidInput
from embedding.images import MAX_PIXELS, Pixels, Preprocessing, decode
from embedding.networks import EmbeddingNetwork
from embedding.onnx_road import Disagrees, OnnxNetwork, is_available
from embedding.runtime import Precision, Runtime
from embedding.views import joined, split_views, views_of

DEFAULT_BATCH_SIZE = 64

_log = logging.getLogger(__name__)

_TOKEN_NETWORKS = {"vit_b_16", "convnext_tiny"}
"""Networks whose inner matrix products have rows that depend on the batch size."""

_TILE = 16
"""Their batches are filled up to a multiple of this: with eight images some processors take other kernels."""


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


class PixelEncoder:
    """Embeds prepared pixels with one network, which it moves to the device and keeps.

    On the CPU an image's embedding is the same bit for bit whatever else is in its batch; elsewhere it is the same
    within 1e-5. May be called from several threads at once.
    """

    def __init__(
        self,
        network: EmbeddingNetwork,
        preprocessing: Preprocessing,
        *,
        device: str = "auto",
        batch_size: int = DEFAULT_BATCH_SIZE,
        runtime: Runtime = "torch",
        threads: int | None = None,
        precision: Precision = "float32",
    ) -> None:
        """`threads` are those of ONNX Runtime; None takes as many as PyTorch does. Raises InvalidInput."""
        if batch_size < 1:
            raise InvalidInput(f"batch_size must be at least 1; got {batch_size}", field="batch_size")
        self.preprocessing = preprocessing
        self.device = pick_device(device)
        self.embedding_dim = preprocessing.embedding_dim(network.architecture.embedding_dim)
        self._batch_size = batch_size
        self.on_embedded: Callable[[Vectors, Vectors], None] | None = None
        """Is told of embeddings [B, D] and the norms [B] that they had before, in the thread that embeds."""
        network = network.eval().to(self.device)
        self._precision = torch.bfloat16 if precision == "bfloat16" and self.device.type == "cuda" else torch.float32
        self._mean_C11 = torch.tensor(preprocessing.mean, device=self.device).reshape(-1, 1, 1)
        self._std_C11 = torch.tensor(preprocessing.std, device=self.device).reshape(-1, 1, 1)
        self._tile = _TILE if network.architecture.network in _TOKEN_NETWORKS else 2
        self._unnormalised: Callable[[Tensor], Tensor]
        self._memory_format = torch.contiguous_format
        onnx = _on_onnx(network, self.device, runtime, threads or torch.get_num_threads())
        self._runtime: Runtime = "torch" if onnx is None else "onnx"
        if onnx is not None:
            self._unnormalised, self._tile = onnx.unnormalised, 1
        else:
            self._memory_format = torch.channels_last
            self._unnormalised = network.to(memory_format=self._memory_format).unnormalised

    @property
    def runtime(self) -> Runtime:
        """What runs the network: "torch" or "onnx"."""
        return self._runtime

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of the pixels it takes."""
        return self.preprocessing.channels, self.preprocessing.image_size, self.preprocessing.image_size

    def encode_pixels(self, pixels_BCHW: Pixels) -> Vectors:
        """Unit float32 embeddings [B, D] of uint8 pixels [B, C, H, W]; `on_embedded` is told."""
        emb_BD, norm_B = self.encode_with_norms(pixels_BCHW)
        if self.on_embedded is not None and len(emb_BD):
            self.on_embedded(emb_BD, norm_B)
        return emb_BD

    def encode_with_norms(self, pixels_BCHW: Pixels) -> tuple[Vectors, Vectors]:
        """The same, and the norms [B] that embeddings had before they were normalised, of several views their mean.

        `on_embedded` is not told: for images that nobody has just sent.
        """
        if pixels_BCHW.dtype != np.uint8 or pixels_BCHW.shape[1:] != self.pixel_shape:
            raise InvalidInput(
                f"pixels must be uint8 [B, {', '.join(map(str, self.pixel_shape))}], as `Preprocessing.pixels` gives "
                f"them; got {pixels_BCHW.dtype} {list(pixels_BCHW.shape)}"
            )
        emb_BD = np.empty((len(pixels_BCHW), self.embedding_dim), dtype=np.float32)
        norm_B = np.empty(len(pixels_BCHW), dtype=np.float32)
        size = max(1, self._batch_size // len(self.preprocessing.views))
        with torch.inference_mode():
            for start in range(0, len(pixels_BCHW), size):
                emb_bD, norm_b = self._all_views(pixels_BCHW[start : start + size])
                emb_BD[start : start + size] = emb_bD.cpu().numpy()
                norm_B[start : start + size] = norm_b.cpu().numpy()
        return emb_BD, norm_B

    def warm_up(self) -> None:
        """Run one batch, so that the first caller does not pay for kernel selection and allocation."""
        self.encode_with_norms(np.zeros((2, *self.pixel_shape), np.uint8))

    def _all_views(self, pixels_BCHW: Pixels) -> tuple[Tensor, Tensor]:
        views = self.preprocessing.views
        if views == ("as-is",):
            return self._forward(torch.from_numpy(pixels_BCHW))
        emb_ND, norm_N = self._forward(torch.from_numpy(views_of(pixels_BCHW, views)))
        emb_BD = joined(split_views(emb_ND, len(views)), self.preprocessing.join_views)
        return emb_BD, norm_N.reshape(len(views), -1).mean(0)

    def _forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        size = len(pixels_BCHW)
        if size % self._tile and (self._tile > 2 or size == 1):
            # A batch of one takes other convolution kernels, which differ in the last bits.
            pixels_BCHW = torch.cat([pixels_BCHW, pixels_BCHW[:1].expand(-size % self._tile, -1, -1, -1)])
        if self.device.type == "cuda":
            pixels_BCHW = pixels_BCHW.pin_memory()
        images_BCHW = pixels_BCHW.to(self.device, non_blocking=True).float().div_(255)
        images_BCHW = images_BCHW.sub_(self._mean_C11).div_(self._std_C11)
        images_BCHW = images_BCHW.contiguous(memory_format=self._memory_format)
        with torch.autocast("cuda", self._precision, enabled=self._precision != torch.float32):
            raw_BD = self._unnormalised(images_BCHW)
        return F.normalize(raw_BD, dim=1)[:size], torch.linalg.vector_norm(raw_BD, dim=1)[:size]


def _on_onnx(network: EmbeddingNetwork, device: torch.device, runtime: Runtime, threads: int) -> OnnxNetwork | None:
    """The network on ONNX Runtime; None where PyTorch is to run it."""
    if runtime == "torch":
        return None
    name = network.architecture.network
    fits = device.type == "cpu" and name not in _TOKEN_NETWORKS
    if runtime == "auto" and not (fits and is_available()):
        return None
    if not fits:
        raise InvalidInput(
            f'runtime "onnx" takes convolutional networks on the CPU; got {name} on {device.type}: choose "auto"',
            field="runtime",
        )
    try:
        return OnnxNetwork(network, threads=threads)
    except Disagrees as error:
        if runtime == "onnx":
            raise InvalidInput(f'{error}; choose "auto" or "torch"', field="runtime") from error
        _log.warning("%s; PyTorch runs it instead", error)
        return None


class Encoder(PixelEncoder):
    """Embeds image files with one bundle's network."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "auto",
        batch_size: int = DEFAULT_BATCH_SIZE,
        max_pixels: int = MAX_PIXELS,
        runtime: Runtime = "auto",
        threads: int | None = None,
        precision: Precision = "float32",
    ) -> None:
        """See `PixelEncoder`. Raises InvalidInput."""
        super().__init__(
            bundle.network(),
            bundle.preprocessing,
            device=device,
            batch_size=batch_size,
            runtime=runtime,
            threads=threads,
            precision=precision,
        )
        self.bundle = bundle
        self._max_pixels = max_pixels

    def with_calibration_of(self, bundle: Bundle) -> Self:
        """The same network, in memory once, under another calibration of its weights."""
        if bundle.fingerprint != self.bundle.fingerprint:
            raise InvalidInput(f"{bundle.name} has other weights than {self.bundle.name}; load it")
        other = copy(self)
        other.bundle = bundle
        other.on_embedded = None
        return other

    def prepare(self, data: bytes, *, max_pixels: int | None = None) -> Pixels:
        """Decode one image to the pixels [C, H, W] that the network sees, with a lower cap than the encoder's own where
        that is given. Raises InvalidImage or ImageTooLarge.
        """
        cap = self._max_pixels if max_pixels is None else min(max_pixels, self._max_pixels)
        return self.preprocessing.pixels(decode(data, max_pixels=cap))

    def encode(self, images: Sequence[bytes]) -> Vectors:
        """Unit float32 embeddings [B, D] of image files. Raises InvalidImage or ImageTooLarge."""
        prepared = [self.prepare(data) for data in images]
        return self.encode_pixels(np.stack(prepared) if prepared else np.empty((0, *self.pixel_shape), np.uint8))
