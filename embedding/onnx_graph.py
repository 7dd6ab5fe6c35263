"""The ONNX graph of an architecture, made once, and the weights of a network as that graph takes them.

PyTorch's exporter holds the interpreter for up to hundreds of milliseconds, within which a server answers nobody. It
depends on the architecture alone here: networks of the same are given to a graph that is there already, and none of
their weights passes through the exporter.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from embedding.networks import Architecture, EmbeddingNetwork

_OPSET = 17  # known to every ONNX Runtime of the last three years

_KEPT = 32
"""Graphs that are remembered, of 10 to 100 kB each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Folded:
    """A convolution and the batch normalisation behind it, which becomes part of its weights. Names of tensors."""

    weight: str
    bias: str | None
    scale: str
    shift: str
    mean: str
    variance: str
    epsilon: float

    @property
    def names(self) -> tuple[str, ...]:
        given = (self.weight, self.bias, self.scale, self.shift, self.mean, self.variance)
        return tuple(name for name in given if name is not None)

    @property
    def new_bias(self) -> str:
        return f"{self.weight}:bias"

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weight and bias of the convolution that does the work of both, bit for bit as PyTorch's exporter folds."""
        scale_C = tensors[self.scale] / (tensors[self.variance] + self.epsilon).sqrt()
        shift_C = tensors[self.shift] - tensors[self.mean] * scale_C
        if self.bias is not None:
            shift_C = tensors[self.bias] * scale_C + shift_C
        weight = tensors[self.weight]
        return {self.weight: weight * scale_C.reshape(-1, *[1] * (weight.ndim - 1)), self.new_bias: shift_C}


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """A model that lacks its initialisers, whose names and values `values` gives."""

    model: bytes
    _plain: tuple[str, ...]
    _folded: tuple[_Folded, ...]

    def values(self, network: EmbeddingNetwork) -> dict[str, Tensor]:
        """The initialisers, by name; `network` is one of the architecture that the graph was made for."""
        tensors = _named(network)
        values = {name: tensors[name] for name in self._plain}
        with torch.no_grad():
            for folded in self._folded:
                values |= folded.of(tensors)
        return {name: value.detach().contiguous() for name, value in values.items()}


_graphs: dict[Architecture, Graph] = {}


def graph_of(network: EmbeddingNetwork) -> Graph:
    """The graph of the network's architecture: made where there is none yet."""
    graph = _graphs.get(network.architecture)
    if graph is None:
        graph = _made(network)
        if len(_graphs) >= _KEPT:
            _graphs.clear()
        _graphs[network.architecture] = graph
    return graph


class _Whole(nn.Module):
    """The network without what only PyTorch's matrix products need (see `EmbeddingNetwork`)."""

    def __init__(self, network: EmbeddingNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_BCHW: Tensor) -> Tensor:
        emb_BD: Tensor = self.network.projection(self.network.features(images_BCHW))
        return emb_BD


def _named(network: EmbeddingNetwork) -> dict[str, Tensor]:
    """As the exporter names them, which sees the network as a part of `_Whole`."""
    return {f"network.{name}": value for name, value in network.state_dict().items()}


def _made(network: EmbeddingNetwork) -> Graph:
    from onnx import TensorProto, load_from_string

    model: Any = load_from_string(_exported(network))
    folded = _fold(model)
    graph = model.graph
    shapes = {each.name: [size.dim_value for size in each.type.tensor_type.shape.dim] for each in graph.input}
    inside = {name for each in folded for name in each.names}
    plain = tuple(name for name in shapes if name not in inside and name != "images")
    shapes |= {each.new_bias: shapes[each.scale] for each in folded}
    for name in (*plain, *(each.weight for each in folded), *(each.new_bias for each in folded)):
        value = graph.initializer.add(
            name=name, data_type=TensorProto.FLOAT, dims=shapes[name], data_location=TensorProto.EXTERNAL
        )
        value.external_data.add(key="location", value="given when a session is made")
    images = next(each for each in graph.input if each.name == "images")
    del graph.input[:]
    graph.input.append(images)
    return Graph(model=model.SerializeToString(), _plain=plain, _folded=folded)


def _exported(network: EmbeddingNetwork) -> bytes:
    """A model that takes its weights as inputs."""
    traced = deepcopy(network).eval()
    with torch.no_grad():
        for at, value in enumerate(traced.state_dict().values()):
            value.fill_(1 + at)  # the exporter makes one of two weights that are equal
    size = network.architecture.image_size
    images_BCHW = torch.zeros(2, network.architecture.channels, size, size)
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        # The older exporter takes 0.1 s where the one that is to follow it takes 3 to 8 s and a package more.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            _Whole(traced).eval(),
            (images_BCHW,),
            buffer,  # type: ignore[arg-type]  # the older exporter writes to a file object as well
            dynamo=False,
            export_params=False,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,  # as it is: evaluating; this alone leaves the weights alone
            input_names=["images"],
            output_names=["embeddings"],
            dynamic_axes={"images": {0: "B"}, "embeddings": {0: "B"}},
            opset_version=_OPSET,
        )
    return buffer.getvalue()


def _fold(model: Any) -> tuple[_Folded, ...]:
    """Take each batch normalisation that follows a convolution out of the model."""
    graph = model.graph
    readers: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    makers = {name: node for node in graph.node for name in node.output}
    folded: list[_Folded] = []
    for node in list(graph.node):
        source = makers.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if source is None or source.op_type != "Conv" or readers[node.input[0]] > 1:
            continue
        _, scale, shift, mean, variance = node.input
        folded.append(
            _Folded(
                weight=source.input[1],
                bias=source.input[2] if len(source.input) > 2 else None,
                scale=scale,
                shift=shift,
                mean=mean,
                variance=variance,
                epsilon=next((each.f for each in node.attribute if each.name == "epsilon"), 1e-5),
            )
        )
        source.output[0] = node.output[0]
        del source.input[2:]
        source.input.append(folded[-1].new_bias)
        graph.node.remove(node)
    return tuple(folded)
