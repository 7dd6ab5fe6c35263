"""`lookalike demo`: the whole path on handwritten digits, in front of the reader."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedding.errors import AlreadyExists, StorageFailed
from lookalike.cli import show
from lookalike.cli.serve import READY_LINE
from lookalike.client import Client
from lookalike.types import ItemName, NewItem

if TYPE_CHECKING:
    from training.config import Recipe

GALLERY = "digits"
IMAGES_PER_IDENTITY = 40
STOP_SECONDS = 10.0
_MARK = "lookalike-demo"
"""A file that marks a folder as the demo's own, so that running it again may replace it."""


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to write.")] = Path("runs/demo"),
) -> None:
    """Train on handwritten digits, learn the margin, build a gallery, serve it, and ask: under a minute."""
    from lookalike.cli.recipes import find_recipe
    from training.config import load_recipe
    from training.pipeline import train

    started = time.monotonic()
    console = show.console()
    _prepare(out)
    recipe_path = find_recipe("digits")
    recipe = load_recipe(recipe_path)

    console.rule("1. train, and learn the margin on digits that training never saw", align="left")
    bundle = train(recipe, out=out / "bundle", console=console)
    calibration = bundle.calibration
    console.print(
        f"{bundle.name}: learned margin {calibration.learned_margin:.4f}, from "
        f"{calibration.matching_pairs:,} matching and {calibration.impostor_pairs:,} other pairs of "
        f"{calibration.identities} held-out digits. Model card: {out / 'bundle' / 'README.md'}"
    )
    folders = _write_images(recipe, out / "images")

    console.rule("2. serve it, and fill a gallery with digits of the test side", align="left")
    with _server(out) as target, Client(target) as client:
        console.print(f"a server in another process answers on {target}")
        client.create_gallery(GALLERY)
        items = [
            NewItem(id=f"{folder.name}:{path.name}", image=path, identity=folder.name)
            for folder in folders
            for path in sorted(folder.iterdir())
        ]
        client.update_items(GALLERY, items)
        console.print(f"gallery {GALLERY}: {client.get_gallery(GALLERY).item_count} items")

        console.rule("3. are these two images a match?", align="left")
        first, second = (sorted(folder.iterdir()) for folder in folders[:2])
        pairs = ((first[0], first[1]), (first[0], second[0]))
        for a, b in pairs:
            console.print(f"{a.relative_to(out)} and {b.relative_to(out)}:")
            show.decision(client.verify(a, b), console)

        console.rule("4. what in the gallery matches this image?", align="left")
        console.print(f"{first[0].relative_to(out)}, which itself is left out:")
        show.neighbors(client.search(GALLERY, ItemName(GALLERY, f"{folders[0].name}:{first[0].name}"), k=5), console)

    console.rule(f"done in {time.monotonic() - started:.0f} s; each step by hand", align="left")
    for command in _commands(recipe_path, out, first[0], second[0]):
        console.print(command, soft_wrap=True, markup=False)


def _prepare(out: Path) -> None:
    """An empty folder, where there was none or where an earlier demo wrote."""
    if out.exists() and any(out.iterdir()) and not (out / _MARK).is_file():
        raise AlreadyExists(f"{out} holds other files; choose another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARK).touch()


def _write_images(recipe: Recipe, folder: Path) -> list[Path]:
    """Images of the test side as PNG files in class folders, which are returned."""
    from PIL import Image

    from training.datasets import load
    from training.splits import split

    images = load(recipe.data, data_root=None, preprocessing=recipe.preprocessing)
    test = images.subset(split(images, recipe.split).test_N)
    folders: dict[str, Path] = {}
    for label, identity in enumerate(test.identities):
        members_N = (test.labels_N == label).nonzero()[0][:IMAGES_PER_IDENTITY]
        if len(members_N) == 0:
            continue
        folders[identity] = folder / f"digit-{identity}"
        folders[identity].mkdir(parents=True)
        for number, pixels_CHW in enumerate(test.pixels(members_N, recipe.preprocessing)):
            Image.fromarray(pixels_CHW[0]).save(folders[identity] / f"{number:02}.png")
    return list(folders.values())


@contextmanager
def _server(out: Path) -> Iterator[str]:
    """A server in another process, on a free port of the loopback interface; yields its address."""
    command = [sys.executable, "-m", "lookalike", "serve", "--port", "0"]
    command += ["--bundle", str(out / "bundle"), "--data", str(out / "galleries")]
    log = out / "server.log"
    with log.open("wb") as errors:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            yield _address(server, log)
        finally:
            server.terminate()
            try:
                server.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            if server.stdout:
                server.stdout.close()


def _address(server: subprocess.Popen[str], log: Path) -> str:
    for line in server.stdout or ():
        if line.startswith(READY_LINE):
            return line.removeprefix(READY_LINE).strip()
    raise StorageFailed(f"the server ended before it answered; {log} says why")


def _commands(recipe: Path, out: Path, a: Path, b: Path) -> list[str]:
    bundle, galleries = out / "bundle", out / "galleries"
    target = ["--target", "127.0.0.1:50051"]
    commands: list[list[str | Path]] = [
        ["train", recipe, "--out", bundle, "--overwrite"],
        ["model", "show", bundle],
        ["serve", "--bundle", bundle, "--data", galleries, "&"],
        ["gallery", "create", "mine", *target],
        ["gallery", "add", "mine", out / "images", *target],
        ["verify", a, b, *target],
        ["search", a, "--gallery", "mine", *target],
        ["batch-search", out / "images", "--gallery", "mine", "--out", out / "neighbours.parquet", *target],
    ]
    return [
        " ".join(["lookalike", *(word if word == "&" else shlex.quote(str(word)) for word in command)])
        for command in commands
    ]
