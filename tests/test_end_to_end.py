"""The whole path in real processes: the README's commands and Python, and a server that is killed and comes back."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from lookalike import CallFailed, Client, Decision, Item, ItemName, Neighbor, NewItem
from lookalike.__main__ import main
from tests.processes import environment, serving
from tests.transcripts import blocks, shape, transcript

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ADDRESS = "127.0.0.1:50051"
VARIABLES = {**environment(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def in_a_process(folder: Path, *words: str) -> str:
    """What it prints."""
    ran = subprocess.run(words, cwd=folder, env=VARIABLES, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{words}\n{ran.stderr}"
    return ran.stdout


@dataclass(frozen=True)
class Demo:
    """What `lookalike demo`, the README's first command, has left."""

    workplace: Path
    printed: str

    @property
    def bundle(self) -> Path:
        return self.workplace / "runs" / "demo" / "bundle"

    def digits(self, count: int) -> list[Path]:
        """Pictures of handwritten digits, of all ten among the first twenty; their folders are named by the digit."""
        return sorted((self.workplace / "runs" / "demo" / "images").glob("*/*.png"), key=lambda path: path.name)[:count]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """In a folder whose own recipe for digits takes fewer steps."""
    workplace = tmp_path_factory.mktemp("workplace")
    recipe = (ROOT / "recipes" / "digits.toml").read_text()
    (workplace / "recipes").mkdir()
    (workplace / "recipes" / "digits.toml").write_text(
        re.sub(r"^steps = \d+$", "steps = 20", recipe, flags=re.MULTILINE)
    )
    return Demo(workplace, in_a_process(workplace, "lookalike", "demo"))


def test_a_model_and_its_card_are_written(demo: Demo) -> None:
    card = (demo.bundle / "README.md").read_text()
    assert "learned margin" in card.lower()
    assert list((demo.bundle / "card").glob("*.png"))


def test_the_commands_of_the_readme_print_what_it_shows_and_its_python_runs(
    demo: Demo, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(demo.workplace)
    for variable in os.environ.keys() - VARIABLES.keys():
        monkeypatch.delenv(variable)
    (first, shown), (look, looks), (serve, _), *others = transcript(README)
    assert first == "lookalike demo"
    assert shape(demo.printed) == shape(shown)
    options = shlex.split(serve)
    assert (options[:2], options[-1]) == (["lookalike", "serve"], "&")
    bundle, galleries = (demo.workplace / options[options.index(option) + 1] for option in ("--bundle", "--data"))
    with serving(bundle, galleries, log=tmp_path / "log") as (_, address):
        for command, shown in [(look, looks), *others]:
            name, *words = shlex.split(command)
            assert name == "lookalike"
            capfd.readouterr()
            code = main([word.replace(ADDRESS, address) for word in words])
            out, err = capfd.readouterr()
            assert code == 0, f"{command}\n{err}"
            assert shape(out) == shape(shown), command
        for program in blocks(README, "python"):
            printed = in_a_process(demo.workplace, sys.executable, "-c", program.replace(ADDRESS, address))
            assert "Verdict." in printed


def test_a_server_killed_while_it_writes_comes_back_with_every_item_it_acknowledged_and_every_bit(
    demo: Demo, tmp_path: Path
) -> None:
    images = demo.digits(60)
    acknowledged: list[str] = []
    enough = threading.Event()

    def answers(client: Client) -> tuple[list[Item], Decision, list[Neighbor], list[object]]:
        items = [client.get_item(item.name) for item in client.list_items("digits")]
        return (
            items,
            client.verify(images[0], ItemName("digits", "07")),
            client.search("digits", images[1], k=60),
            list(client.search_batch("digits", images[:20], k=5)),
        )

    def exact(items: list[Item]) -> list[tuple[str, str, bytes]]:
        return [
            (item.name.id, item.etag, b"" if item.embedding is None else item.embedding.tobytes()) for item in items
        ]

    def write(address: str) -> None:
        with Client(address) as client:
            client.create_gallery("many")
            embedding = client.embed(images[0])
            for number in range(100_000):
                names = [f"{number:06}-{part}" for part in range(8)]
                try:
                    client.update_items("many", [NewItem(id=name, image=embedding) for name in names])
                except CallFailed:  # the server is gone
                    return
                acknowledged.extend(names)
                if number == 40:
                    enough.set()

    galleries = tmp_path / "galleries"
    with serving(demo.bundle, galleries, log=tmp_path / "first.log") as (server, address), Client(address) as client:
        client.create_gallery("digits")
        stored = client.update_items(
            "digits",
            [NewItem(id=f"{i:02}", image=path, identity=path.parent.name) for i, path in enumerate(images[:50])],
        )
        assert all(isinstance(item, Item) for item in stored)
        client.delete_items("digits", ["03"])
        client.update_items("digits", [NewItem(id="04", image=images[5], identity="changed")])
        items, *before = answers(client)
        assert len(items) == 49
        writer = threading.Thread(target=write, args=(address,))
        writer.start()
        assert enough.wait(60)
        server.kill()
        assert server.wait(30) < 0
        writer.join(60)

    with serving(demo.bundle, galleries, log=tmp_path / "second.log") as (_, address), Client(address) as client:
        again, *after = answers(client)
        assert client.get_gallery("digits").item_count == 49
        kept = [item.name.id for item in client.list_items("many")]
    assert exact(again) == exact(items)
    assert after == before
    assert set(acknowledged) <= set(kept)
    assert len(kept) % 8 == 0, "a batch is stored whole or not at all"
