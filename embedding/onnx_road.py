"""A network on ONNX Runtime: the fastest way through a convolutional network on the CPU (docs/performance.md).

It is made in memory, of the network's own weights, whenever an encoder is loaded, so that a bundle stays plain weights;
it is used only where it agrees with PyTorch. It needs the extra `onnx`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embedding.errors import InvalidInput
from embedding.extras import installing
from embedding.networks import EmbeddingNetwork
from embedding.onnx_graph import graph_of

AGREEMENT = 1e-5
"""Most that a value of an embedding may differ from PyTorch's."""


# Or it writes to ~/.cache/Microsoft and looks for mobile.events.data.microsoft.com as soon as it is imported; for that
# its own `disable_telemetry_events` comes too late.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


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
                f"ONNX Runtime is not installed: {installing('onnx')}, or choose another runtime", field="runtime"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads that spin between batches take the processor from decoding and from the event loop.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            graph = graph_of(network)
            self._values = graph.values(network)  # kept: the session reads them where they are
            given = [onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy()) for value in self._values.values()]
            options.add_external_initializers(list(self._values), given)
            self._session: Any = onnxruntime.InferenceSession(graph.model, options, providers=["CPUExecutionProvider"])
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


def _noise(network: EmbeddingNetwork, count: int) -> Tensor:
    size = network.architecture.image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, network.architecture.channels, size, size, generator=generator)
