"""ONNX Runtime beside PyTorch: the same embeddings, whatever the batch."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from embedding import encoder as module
from embedding import onnx_graph
from embedding.bundle import Bundle
from embedding.encoder import Encoder
from embedding.errors import InvalidInput
from embedding.networks import Architecture, EmbeddingNetwork, build
from embedding.onnx_road import AGREEMENT, Disagrees, OnnxNetwork

onnxruntime = pytest.importorskip("onnxruntime")

MakeBundle = Callable[..., Bundle]

CONVOLUTIONAL = [("small_cnn", 20, 1), ("residual_cnn", 48, 1), ("mobilenet_v2", 40, 3), ("resnet18", 40, 3)]


def pixels_of(encoder: Encoder, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *encoder.pixel_shape), dtype=np.uint8)


def with_statistics(network: EmbeddingNetwork) -> EmbeddingNetwork:
    """Batch statistics as after a training, so that folding them into convolutions matters."""
    generator = torch.Generator().manual_seed(1)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr]
            layer.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr, operator]
            layer.weight.data.uniform_(0.5, 1.5, generator=generator)
    return network


@pytest.mark.parametrize(("network", "size", "channels"), CONVOLUTIONAL)
def test_embeddings_are_those_of_the_weights_and_do_not_depend_on_the_batch(
    tmp_path: Path,
    make_bundle: MakeBundle,
    monkeypatch: pytest.MonkeyPatch,
    network: str,
    size: int,
    channels: int,
) -> None:
    bundle = make_bundle(tmp_path / "b", network=network, image_size=size, channels=channels)
    plain = Bundle.network
    monkeypatch.setattr(Bundle, "network", lambda self: with_statistics(plain(self)))
    encoder = Encoder(bundle, device="cpu", runtime="onnx", threads=1)
    two = Encoder(bundle, device="cpu", runtime="onnx", threads=2)
    assert encoder.runtime == "onnx"
    pixels = pixels_of(encoder, 19)
    whole = encoder.encode_pixels(pixels)
    peer = Encoder(bundle, device="cpu", runtime="torch")
    assert peer.runtime == "torch"
    np.testing.assert_allclose(whole, peer.encode_pixels(pixels), rtol=0, atol=AGREEMENT)
    for length in (1, 2, 3, 4, 5, 7, 8, 16):
        for start in (0, 19 - length):
            part = encoder.encode_pixels(pixels[start : start + length])
            assert part.tobytes() == whole[start : start + length].tobytes(), (start, length)
    assert two.encode_pixels(pixels).tobytes() == whole.tobytes()
    assert two.encode_pixels(pixels[:1]).tobytes() == whole[:1].tobytes()


@pytest.mark.parametrize(("network", "size", "channels"), CONVOLUTIONAL)
def test_a_graph_made_once_gives_what_the_exporter_makes_of_each_networks_weights(
    network: str, size: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = Architecture(network=network, image_size=size, channels=channels, embedding_dim=16)  # type: ignore[arg-type]
    monkeypatch.setattr(onnx_graph, "_graphs", {})
    untrained = OnnxNetwork(build(architecture).eval(), threads=1)  # many of its weights are equal to one another
    export = torch.onnx.export
    with monkeypatch.context() as patched:
        patched.setattr(torch.onnx, "export", None)
        other = with_statistics(build(architecture)).eval()
        second = OnnxNetwork(other, threads=1)
    images_BCHW = torch.randn(5, channels, size, size, generator=torch.Generator().manual_seed(2))
    buffer = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        export(
            onnx_graph._Whole(other),
            (images_BCHW,),
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            input_names=["images"],
            output_names=["embeddings"],
            opset_version=17,
        )
    (emb_BD,) = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"]).run(
        None, {"images": images_BCHW.numpy()}
    )
    del other
    assert second.unnormalised(images_BCHW).numpy().tobytes() == emb_BD.tobytes()
    assert not np.allclose(untrained.unnormalised(images_BCHW), emb_BD)


def test_the_runtime_is_chosen_by_the_network(
    tmp_path: Path, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path / "b")
    assert Encoder(bundle, device="cpu").runtime == "onnx"
    monkeypatch.setattr(module, "_TOKEN_NETWORKS", {"small_cnn"})
    assert Encoder(bundle, device="cpu").runtime == "torch"
    with pytest.raises(InvalidInput, match='small_cnn on cpu: choose "auto"'):
        Encoder(bundle, device="cpu", runtime="onnx")


def test_without_the_extra_pytorch_answers(
    tmp_path: Path, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_available", lambda: False)
    assert Encoder(make_bundle(tmp_path / "b"), device="cpu").runtime == "torch"


def test_a_runtime_that_disagrees_is_not_used(
    tmp_path: Path, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = make_bundle(tmp_path / "b")
    right = OnnxNetwork.unnormalised

    def wrong(self: OnnxNetwork, images_BCHW: torch.Tensor) -> torch.Tensor:
        raw_BD = right(self, images_BCHW)
        raw_BD[:, 0] += 1e-3 * raw_BD.norm(dim=1)
        return raw_BD

    monkeypatch.setattr(OnnxNetwork, "unnormalised", wrong)
    with pytest.raises(Disagrees, match=r"differ from PyTorch's by"):
        OnnxNetwork(bundle.network().eval(), threads=1)
    assert Encoder(bundle, device="cpu").runtime == "torch"
    assert "PyTorch runs it instead" in caplog.text
    with pytest.raises(InvalidInput, match="differ"):
        Encoder(bundle, device="cpu", runtime="onnx")


TRIED = """
from embedding.networks import Architecture, build
from embedding.onnx_road import OnnxNetwork
architecture = Architecture(network="small_cnn", image_size=16, channels=1, embedding_dim=4, width=4)
OnnxNetwork(build(architecture).eval(), threads=1)
"""


def test_nothing_is_left_in_the_home_folder_or_sent_from_it(tmp_path: Path) -> None:
    """ONNX Runtime keeps what it means to send to Microsoft in ~/.cache/Microsoft, from its import on."""
    unset = {"ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    subprocess.run([sys.executable, "-c", TRIED], env=environment | {"HOME": str(tmp_path)}, check=True)
    assert not list(tmp_path.rglob("*icrosoft*"))
