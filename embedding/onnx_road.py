"""A network on ONNX Runtime: the fastest way through a convolutional network on the CPU (docs/performance.md).

The graph is made in memory from the network's own weights whenever an encoder is loaded, so that a bundle stays plain
weights, and is used only where it agrees with PyTorch. It needs the extra `onnx`.
"""

from __future__ import annotations

import io
import warnings
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedding.errors import InvalidInput
from embedding.networks import EmbeddingNetwork

AGREEMENT = 1e-5
"""Most that a value of an embedding may differ from PyTorch's."""

_OPSET = 17  # known to every ONNX Runtime of the last three years


class Disagrees(Exception):
    """ONNX Runtime cannot run this network, or gives other embeddings than PyTorch."""


def is_available() -> bool:
    """Whether the extra is installed."""
    return all(find_spec(name) is not None for name in ("onnx", "onnxruntime"))


class OnnxNetwork:
    """Normalised images [B, C, H, W] to embeddings [B, D], each the same bit for bit whatever its batch.

    May be called from several threads at once, which share `threads` of its own.
    """

    def __init__(self, network: EmbeddingNetwork, *, threads: int) -> None:
        """`network` is in evaluation mode and on the CPU. Raises Disagrees, InvalidInput where the extra is missing."""
        try:
            import onnx  # noqa: F401  # PyTorch's exporter needs it
            import onnxruntime
        except ImportError as error:
            raise InvalidInput(
                "ONNX Runtime is not installed; install lookalike[onnx], or choose another runtime", field="runtime"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads that spin between batches take the processor from decoding and from the event loop.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session: Any = onnxruntime.InferenceSession(
                _graph(network), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # of the exporter or of the runtime: any type, none of them the user's fault
            raise Disagrees(f"{network.architecture.network} does not run on ONNX Runtime: {error}") from error
        self._check(network)

    def unnormalised(self, images_BCHW: Tensor) -> Tensor:
        """The embeddings [B, D] before they are divided by their length."""
        (emb_BD,) = self._session.run(None, {"images": images_BCHW.numpy()})
        return torch.from_numpy(emb_BD)

    def _check(self, network: EmbeddingNetwork) -> None:
        images_BCHW = _noise(network, 3)
        with torch.inference_mode():
            emb_BD = F.normalize(self.unnormalised(images_BCHW), dim=1)
            difference = (emb_BD - network(images_BCHW)).abs().max().item()
        if not difference <= AGREEMENT:  # NaN too
            raise Disagrees(f"embeddings of ONNX Runtime differ from PyTorch's by {difference:.1e}")


class _Whole(nn.Module):
    """The network without what only PyTorch's matrix products need (see `EmbeddingNetwork`)."""

    def __init__(self, network: EmbeddingNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_BCHW: Tensor) -> Tensor:
        emb_BD: Tensor = self.network.projection(self.network.features(images_BCHW))
        return emb_BD


def _graph(network: EmbeddingNetwork) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        # The older exporter takes 0.1 s where the one that is to follow it takes 3 to 8 s and a package more.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            _Whole(network).eval(),
            (_noise(network, 2),),
            buffer,  # type: ignore[arg-type]  # the older exporter writes to a file object as well
            dynamo=False,
            input_names=["images"],
            output_names=["embeddings"],
            dynamic_axes={"images": {0: "B"}, "embeddings": {0: "B"}},
            opset_version=_OPSET,
        )
    return buffer.getvalue()


def _noise(network: EmbeddingNetwork, count: int) -> Tensor:
    size = network.architecture.image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, network.architecture.channels, size, size, generator=generator)
