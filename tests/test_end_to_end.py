"""The whole path in real processes: train, serve, fill a gallery, ask, be killed, and answer the same again."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import pytest

from lookalike import CallFailed, Client, Decision, Item, ItemName, Neighbor, NewItem
from tests.processes import COMMAND, environment, serving

ROOT = Path(__file__).parents[1]
STEPS = 20


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on digits by the command line, for fewer steps than the recipe has."""
    folder = tmp_path_factory.mktemp("trained")
    text = (ROOT / "recipes" / "digits.toml").read_text()
    lines = [f"steps = {STEPS}" if line.startswith("steps = ") else line for line in text.splitlines()]
    recipe = folder / "digits.toml"
    recipe.write_text("\n".join(lines))
    command = [*COMMAND, "train", str(recipe), "--out", str(folder / "bundle"), "--device", "cpu"]
    subprocess.run(command, check=True, capture_output=True, env=environment())
    return folder / "bundle"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Sixty handwritten digits as PNG files, named by their digit."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("images")
    data = load_digits()
    paths = [folder / f"{digit}-{number:02}.png" for number, digit in enumerate(data.target[:60])]
    for path, image in zip(paths, data.images, strict=False):
        Image.fromarray((image * 15).astype("uint8")).save(path)
    return paths


def test_a_model_and_its_card_are_written(bundle: Path) -> None:
    card = (bundle / "README.md").read_text()
    assert "learned margin" in card.lower()
    assert list((bundle / "card").glob("*.png"))


def test_a_killed_server_comes_back_with_every_item_and_every_bit(
    bundle: Path, images: list[Path], tmp_path: Path
) -> None:
    def answers(client: Client) -> tuple[list[Item], Decision, list[Neighbor], list[object]]:
        items = [client.get_item(item.name) for item in client.list_items("digits")]
        return (
            items,
            client.verify(images[0], ItemName("digits", images[7].name)),
            client.search("digits", images[1], k=60),
            list(client.search_batch("digits", images[:20], k=5)),
        )

    def exact(items: list[Item]) -> list[tuple[str, str, bytes]]:
        return [
            (item.name.id, item.etag, b"" if item.embedding is None else item.embedding.tobytes()) for item in items
        ]

    galleries = tmp_path / "galleries"
    with serving(bundle, galleries, log=tmp_path / "first.log") as (server, address), Client(address) as client:
        client.create_gallery("digits")
        stored = client.update_items(
            "digits", [NewItem(id=path.name, image=path, identity=path.name[0]) for path in images[:50]]
        )
        assert all(isinstance(item, Item) for item in stored)
        client.delete_items("digits", [images[3].name])
        client.update_items("digits", [NewItem(id=images[4].name, image=images[5], identity="changed")])
        items, *before = answers(client)
        assert len(items) == 49
        server.kill()
        assert server.wait(30) < 0

    with serving(bundle, galleries, log=tmp_path / "second.log") as (_, address), Client(address) as client:
        again, *after = answers(client)
        assert client.get_gallery("digits").item_count == 49
    assert exact(again) == exact(items)
    assert after == before


def test_a_server_killed_while_it_writes_keeps_what_it_acknowledged(
    bundle: Path, images: list[Path], tmp_path: Path
) -> None:
    acknowledged: list[str] = []
    enough = threading.Event()

    def write(address: str) -> None:
        with Client(address) as client:
            client.create_gallery("digits")
            embedding = client.embed(images[0])
            for number in range(100_000):
                names = [f"{number:06}-{part}" for part in range(8)]
                try:
                    client.update_items("digits", [NewItem(id=name, image=embedding) for name in names])
                except CallFailed:  # the server is gone
                    return
                acknowledged.extend(names)
                if number == 40:
                    enough.set()

    galleries = tmp_path / "galleries"
    with serving(bundle, galleries, log=tmp_path / "first.log") as (server, address):
        writer = threading.Thread(target=write, args=(address,))
        writer.start()
        assert enough.wait(60)
        server.kill()
        writer.join(60)
    with serving(bundle, galleries, log=tmp_path / "second.log") as (_, address), Client(address) as client:
        kept = [item.name.id for item in client.list_items("digits")]
    assert set(acknowledged) <= set(kept)
    assert len(kept) % 8 == 0, "a batch is stored whole or not at all"
