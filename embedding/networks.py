"""Networks by name: a backbone, a projection head, and L2 normalisation.

Shapes: B images, C channels, H height, W width, F backbone features, D embedding width.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from embedding.errors import InvalidRecipe, NotFound
from embedding.torchvision_models import torchvision_models

NetworkName = Literal[
    "small_cnn",
    "residual_cnn",
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "convnext_tiny",
    "vit_b_16",
]

_OWN_NETWORKS = frozenset({"small_cnn", "residual_cnn"})
"""Networks of this file: they take one channel as it is, and have no pretrained weights."""


class Architecture(BaseModel):
    """What `build` needs to make a network; part of a bundle's fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    network: NetworkName
    image_size: Annotated[int, Field(ge=8, le=1024)]
    """Side of the square input, in pixels."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for RGB; torchvision's backbones see a grey image three times."""
    embedding_dim: Annotated[int, Field(ge=2, le=4096)] = 128
    """Width D of the embedding."""
    width: Annotated[int, Field(ge=4, le=512)] = 32
    """Channels of the first stage of `small_cnn` and `residual_cnn`; other networks have their own."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of features dropped before the projection, in training only."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.network == "vit_b_16" and self.image_size % 16:
            raise ValueError(
                f"vit_b_16 cuts 16-pixel patches: image_size must be a multiple of 16; got {self.image_size}"
            )
        if self.network not in {*_OWN_NETWORKS, "vit_b_16"} and self.image_size < 32:
            raise ValueError(f"{self.network} reduces 32-fold: image_size must be at least 32; got {self.image_size}")
        return self


class EmbeddingNetwork(nn.Module):
    """Normalised images [B, C, H, W] to unit embeddings [B, D]."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.backbone, features = _BACKBONES[architecture.network](architecture)
        self.dropout = nn.Dropout(architecture.dropout)
        self.projection = nn.Linear(features, architecture.embedding_dim)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """What the backbone gives [B, F], before the projection."""
        if self.architecture.network not in _OWN_NETWORKS and self.architecture.channels == 1:
            images_BCHW = images_BCHW.expand(-1, 3, -1, -1)
        features_BF: Tensor = self.backbone(images_BCHW)
        return features_BF

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return F.normalize(self.unnormalised(images_BCHW), dim=1)

    def unnormalised(self, images_BCHW: Tensor) -> Tensor:
        """The embeddings [B, D] before they are divided by their length."""
        features_BF = self.features(images_BCHW)
        emb_BD = self.projection(self.dropout(features_BF)) if self.training else self._project_each(features_BF)
        return emb_BD.float()

    def _project_each(self, features_BF: Tensor) -> Tensor:
        # The order in which a matrix product sums depends on its rows and the threads, so that an image's embedding
        # would depend on its batch in the last bits. A product for each image is the same among any others.
        if features_BF.device.type != "cpu":
            emb_BD: Tensor = self.projection(features_BF)
            return emb_BD
        size = len(features_BF)
        bias_B1D = self.projection.bias.expand(size, 1, -1)
        weight_BFD = self.projection.weight.t().expand(size, -1, -1)
        return torch.baddbmm(bias_B1D, features_BF[:, None, :], weight_BFD)[:, 0]


def build(architecture: Architecture, *, weights: str | Path = "random") -> EmbeddingNetwork:
    """A network with random weights, torchvision's pretrained ones ("pretrained"), or those of a local file.

    A local file is a state dict (`.safetensors`, or anything `torch.load` reads with `weights_only=True`) of the
    backbone, with or without its classifier, or of a whole `EmbeddingNetwork`.
    Raises NotFound for a missing file and InvalidRecipe for weights that do not fit.
    """
    if weights == "pretrained":
        if architecture.network in _OWN_NETWORKS:
            raise InvalidRecipe(
                f"{architecture.network} has no pretrained weights; accepted: random, or the path of a state-dict file",
                field="network.weights",
            )
        network = EmbeddingNetwork(architecture)
        _load_backbone(network, _torchvision_weights(architecture.network), "torchvision's pretrained weights")
        return network
    network = EmbeddingNetwork(architecture)
    if weights != "random":
        _load_backbone(network, read_state_dict(Path(weights)), str(weights))
    return network


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a local state-dict file; a `state_dict` or `model` wrapper and `module.` prefixes are removed."""
    if not path.is_file():
        raise NotFound(
            f"no weights file {path}; give the path of a state dict, 'random' or 'pretrained'", field="network.weights"
        )
    try:
        loaded: object = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise InvalidRecipe(
            f"{path} is not a plain state dict ({type(error).__name__}); save one with "
            "torch.save(model.state_dict(), path)",
            field="network.weights",
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping):
        raise InvalidRecipe(f"{path} holds a {type(loaded).__name__}, not a state dict", field="network.weights")
    return {str(key).removeprefix("module."): value for key, value in loaded.items() if isinstance(value, Tensor)}


def _load_backbone(network: EmbeddingNetwork, state: dict[str, Tensor], source: str) -> None:
    if "features.1.conv.0.weight" in state:
        state = {_torchvision_mobilenet_v2_key(key): value for key, value in state.items()}
    target: nn.Module = network if any(key.startswith("backbone.") for key in state) else network.backbone
    wanted = target.state_dict()
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        raise InvalidRecipe(
            f"{source} lacks {len(missing)} of the {len(wanted)} tensors of {network.architecture.network}, "
            f"for example {missing[0]}; give weights of the same network",
            field="network.weights",
        )
    for key, tensor in wanted.items():
        if key in state and state[key].shape != tensor.shape:
            raise InvalidRecipe(
                f"{source} has {key} of shape {list(state[key].shape)}; {network.architecture.network} needs "
                f"{list(tensor.shape)}: {_remedy(key, state[key])}",
                field="network.weights",
            )
        if key in state and not state[key].isfinite().all():
            raise InvalidRecipe(
                f"{source} has NaN or infinity in {key}; give weights of a training that did not diverge",
                field="network.weights",
            )
    target.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False)


def _remedy(key: str, given: Tensor) -> str:
    if key.startswith("projection.") and given.ndim:
        return f"set network.embedding_dim to {len(given)}"
    return "set network.width and preprocessing to those it was trained with, or give other weights"


def _torchvision_mobilenet_v2_key(key: str) -> str:
    """The first published MobileNetV2 state dicts number a block's layers in one row; torchvision nests them."""
    matched = re.fullmatch(r"features\.(\d+)\.conv\.(\d+)\.(\w+)", key)
    if matched is None:
        return key
    block, layer, parameter = matched.groups()
    nested = {"0": "0.0", "1": "0.1", "3": "1", "4": "2"} if block == "1" else _NESTED_MOBILENET_V2_LAYERS
    return f"features.{block}.conv.{nested.get(layer, layer)}.{parameter}"


_NESTED_MOBILENET_V2_LAYERS = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"}


def _torchvision_weights(name: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torchvision_models().get_model_weights(name).DEFAULT.get_state_dict(check_hash=True)
    return state


class _ResidualStage(nn.Module):
    """Two 3×3 convolutions with a skip, then 2×2 max-pooling."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(fan_out)
        self.second = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(fan_out)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        first_BCHW = F.relu(self.first_norm(self.first(x_BCHW)))
        second_BCHW = F.relu(first_BCHW + self.second_norm(self.second(first_BCHW)))
        return F.max_pool2d(second_BCHW, 2)


def _small_cnn(architecture: Architecture) -> tuple[nn.Module, int]:
    """Residual stages that halve the image until at most 4 pixels are left a side.

    The last map is flattened, not pooled: where a stroke lies tells characters and faces apart.
    """
    stages: list[nn.Module] = []
    size, fan_in, fan_out = architecture.image_size, int(architecture.channels), architecture.width
    while size > 4:
        stages.append(_ResidualStage(fan_in, fan_out))
        size, fan_in, fan_out = size // 2, fan_out, min(2 * fan_out, 8 * architecture.width)
    return nn.Sequential(*stages, nn.Flatten()), fan_in * size * size


class _ResidualBlock(nn.Module):
    """Two 3×3 convolutions with a skip that is averaged down and projected where the shape changes.

    He et al. 2015, fig. 2, with the skip of He et al. 2018 (ResNet-D), fig. 2c. Its last normalisation starts at zero,
    so that the block starts as its skip (Goyal et al. 2017, section 5.1).
    """

    def __init__(self, fan_in: int, fan_out: int, *, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(fan_out)
        self.second = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(fan_out)
        nn.init.zeros_(self.second_norm.weight)
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or fan_in != fan_out:
            shrink = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
            self.skip = nn.Sequential(shrink, nn.Conv2d(fan_in, fan_out, 1, bias=False), nn.BatchNorm2d(fan_out))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        first_BCHW = F.relu(self.first_norm(self.first(x_BCHW)))
        return F.relu(self.skip(x_BCHW) + self.second_norm(self.second(first_BCHW)))


def _residual_cnn(architecture: Architecture) -> tuple[nn.Module, int]:
    """Two residual blocks a stage; each stage halves the image until at most 4 pixels are left a side.

    From 48 pixels a side on the first convolution halves it too. Channels double from `width` to four times that.
    The last map is flattened, as in `small_cnn`.
    """
    stride = 2 if architecture.image_size >= 48 else 1
    size, channels = -(-architecture.image_size // stride), architecture.width
    layers: list[nn.Module] = [
        nn.Conv2d(architecture.channels, channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    ]
    layers += [_ResidualBlock(channels, channels, stride=1) for _ in range(2)]
    while size > 4:
        wider = min(2 * channels, 4 * architecture.width)
        layers += [_ResidualBlock(channels, wider, stride=2), _ResidualBlock(wider, wider, stride=1)]
        size, channels = -(-size // 2), wider
    return nn.Sequential(*layers, nn.Flatten()), channels * size * size


def _torchvision(name: str) -> Callable[[Architecture], tuple[nn.Module, int]]:
    def make(architecture: Architecture) -> tuple[nn.Module, int]:
        options: dict[str, Any] = {"image_size": architecture.image_size} if name == "vit_b_16" else {}
        model: Any = torchvision_models().get_model(name, weights=None, **options)
        if name.startswith("resnet"):
            features, model.fc = model.fc.in_features, nn.Identity()
        elif name == "vit_b_16":
            features, model.heads = model.hidden_dim, nn.Identity()
        elif name == "convnext_tiny":
            features, model.classifier[2] = model.classifier[2].in_features, nn.Identity()
        else:
            linear = next(layer for layer in model.classifier if isinstance(layer, nn.Linear))
            features, model.classifier = linear.in_features, nn.Identity()
        return model, features

    return make


_BACKBONES: dict[str, Callable[[Architecture], tuple[nn.Module, int]]] = {
    "small_cnn": _small_cnn,
    "residual_cnn": _residual_cnn,
    **{name: _torchvision(name) for name in get_args(NetworkName) if name not in _OWN_NETWORKS},
}
