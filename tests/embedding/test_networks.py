"""Networks by name, and the three roads their weights come in by."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file

from embedding.errors import InvalidRecipe, NotFound
from embedding.networks import Architecture, NetworkName, build


def arch(network: str, image_size: int = 32, channels: int = 3) -> Architecture:
    return Architecture.model_validate({"network": network, "image_size": image_size, "channels": channels, "width": 8})


@pytest.mark.parametrize("network", get_args(NetworkName))
@pytest.mark.parametrize("channels", [1, 3])
def test_every_network_gives_unit_vectors(network: str, channels: int) -> None:
    net = build(arch(network, 32, channels)).eval()
    with torch.inference_mode():
        emb = net(torch.randn(2, channels, 32, 32))
    assert emb.shape == (2, 128)
    torch.testing.assert_close(emb.norm(dim=1), torch.ones(2))
    assert emb.dtype == torch.float32


@pytest.mark.parametrize("network", ["small_cnn", "residual_cnn"])
@pytest.mark.parametrize("size", [8, 28, 64, 105, 112])
def test_our_networks_take_every_size(network: str, size: int) -> None:
    assert build(arch(network, size, 1))(torch.randn(2, 1, size, size)).shape == (2, 128)


@pytest.mark.parametrize(("network", "size", "dim"), [("small_cnn", 16, 16), ("residual_cnn", 64, 512)])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_embedding_is_the_same_among_any_others(network: str, size: int, dim: int, threads: int) -> None:
    """Matrix products of two threads split the sums of wide projections, by the number of rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        architecture = Architecture(network=network, image_size=size, channels=1, embedding_dim=dim, width=24)  # type: ignore[arg-type]
        net = build(architecture).eval().to(memory_format=torch.channels_last)
        images_BCHW = torch.randn(70, 1, size, size).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            whole_BD = net(images_BCHW)
            for count in (2, 5, 8, 16, 33, 64):
                assert torch.equal(net(images_BCHW[:count]), whole_BD[:count]), count
                assert torch.equal(net(images_BCHW[-count:]), whole_BD[-count:]), count
    finally:
        torch.set_num_threads(before)


def test_every_parameter_learns() -> None:
    net = build(arch("small_cnn"))
    net(torch.randn(4, 3, 32, 32))[:, 0].sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for name, p in net.named_parameters() if "norm" not in name
    )


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_local_backbone_is_loaded(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(1)
    donor = build(arch("mobilenet_v2"))
    state = {f"module.{key}": value for key, value in donor.backbone.state_dict().items()}
    state["module.classifier.1.weight"] = torch.zeros(10, 1280)  # the head of another task is left out
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    net = build(arch("mobilenet_v2"), weights=path)
    for key, value in donor.backbone.state_dict().items():
        assert torch.equal(net.backbone.state_dict()[key], value)


def test_mobilenet_v2_weights_of_the_first_published_layout_are_loaded(tmp_path: Path) -> None:
    flat_names = {"0.0": "0", "0.1": "1", "1.0": "3", "1.1": "4", "2": "6", "3": "7"}
    first_block = {"0.0": "0", "0.1": "1", "1": "3", "2": "4"}
    donor = build(arch("mobilenet_v2")).backbone.state_dict()
    flat = {}
    for key, value in donor.items():
        block, middle, tail = key.partition(".conv.")
        layer, _, parameter = tail.rpartition(".")
        names = first_block if block == "features.1" else flat_names
        flat[f"{block}.conv.{names[layer]}.{parameter}" if middle else key] = value
    torch.save(flat, tmp_path / "w.pt")
    loaded = build(arch("mobilenet_v2"), weights=tmp_path / "w.pt").backbone.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in donor.items())


def test_a_whole_network_is_loaded_with_its_projection(tmp_path: Path) -> None:
    donor = build(arch("small_cnn"))
    torch.save(donor.state_dict(), tmp_path / "w.pt")
    net = build(arch("small_cnn"), weights=tmp_path / "w.pt")
    assert torch.equal(net.projection.weight, donor.projection.weight)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(build(arch("resnet18")).backbone.state_dict(), tmp_path / "w.pt")
    with pytest.raises(InvalidRecipe, match=r"lacks .* tensors of mobilenet_v2"):
        build(arch("mobilenet_v2"), weights=tmp_path / "w.pt")


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    torch.save(build(arch("small_cnn", 32)).backbone.state_dict(), tmp_path / "w.pt")
    with pytest.raises(InvalidRecipe, match="of shape"):
        build(Architecture(network="small_cnn", image_size=32, width=16), weights=tmp_path / "w.pt")


def test_weights_of_another_width_of_embedding_say_which_key_to_set(tmp_path: Path) -> None:
    torch.save(
        build(Architecture(network="small_cnn", image_size=32, embedding_dim=16)).state_dict(), tmp_path / "w.pt"
    )
    with pytest.raises(InvalidRecipe, match=r"set network\.embedding_dim to 16"):
        build(Architecture(network="small_cnn", image_size=32, embedding_dim=8), weights=tmp_path / "w.pt")


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    state = build(arch("small_cnn")).state_dict()
    state["projection.weight"][0, 0] = math.nan
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(InvalidRecipe, match=r"NaN or infinity in projection\.weight"):
        build(arch("small_cnn"), weights=tmp_path / "w.pt")


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code ran while weights were read",)


@pytest.mark.parametrize("content", ["pickle", "text", "list"])
def test_a_file_that_is_no_state_dict_is_refused_and_never_run(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w.pt"
    if content == "text":
        path.write_text("not weights")
    else:
        torch.save(Payload() if content == "pickle" else [1, 2], path)
    with pytest.raises(InvalidRecipe, match="state dict"):
        build(arch("small_cnn"), weights=path)
    assert capsys.readouterr().out == ""


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no weights file"):
        build(arch("small_cnn"), weights=tmp_path / "absent.pt")


def test_small_cnn_has_no_pretrained_weights() -> None:
    with pytest.raises(InvalidRecipe, match="random"):
        build(arch("small_cnn"), weights="pretrained")


@pytest.mark.parametrize(("network", "size"), [("vit_b_16", 40), ("resnet18", 28)])
def test_a_size_the_network_cannot_take_is_refused(network: str, size: int) -> None:
    with pytest.raises(ValueError, match="image_size must be"):
        arch(network, size)


def test_torchvision_comes_without_the_compiler_which_is_there_for_who_asks() -> None:
    script = """
import sys
import torch
from embedding.networks import Architecture, build
from embedding.torchvision_models import torchvision_models

network = build(Architecture(network="resnet18", image_size=32))
assert "torchvision.models" in sys.modules
assert not [name for name in sys.modules if name.startswith(("torch._dynamo", "sympy"))]
assert torchvision_models() is sys.modules["torchvision.models"]

from torchvision.ops import roi_align
asked = sys.modules["torchvision.ops.roi_align"].is_compile_supported("cpu")
from torch._dynamo.utils import is_compile_supported
assert asked is is_compile_supported("cpu"), asked
assert torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(1)) == 2
assert roi_align(torch.ones(1, 3, 8, 8), torch.tensor([[0, 0.0, 0.0, 4.0, 4.0]]), 2).shape == (1, 3, 2, 2)
"""
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", script], check=True)


@pytest.mark.slow
def test_torchvision_is_taken_as_it_is_where_the_compiler_is_there() -> None:
    script = """
import sys
import torch._dynamo
before = sys.modules["torch._dynamo"]
from embedding.torchvision_models import torchvision_models
assert torchvision_models().get_model("resnet18")
assert sys.modules["torch._dynamo"] is before is torch._dynamo
"""
    subprocess.run([sys.executable, "-c", script], check=True)
