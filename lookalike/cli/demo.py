"""`lookalike demo`: the whole path on handwritten digits, in front of the reader."""

from __future__ import annotations

import os
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

from embedding.errors import AlreadyExists, InvalidInput, StorageFailed
from lookalike.cli import show
from lookalike.cli.serve import READY_LINE
from lookalike.client import Client
from lookalike.types import ItemName, NewItem

if TYPE_CHECKING:
    from rich.console import Console

    from training.config import Recipe

RECIPE = "digits"
GALLERY = "digits"
IMAGES_PER_IDENTITY = 40
SAME = 5
"""Which image to compare with the first of the same digit."""
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
    recipe = load_recipe(find_recipe(RECIPE))

    _say("1. Train, and learn the margin on digits that training never saw", console)
    bundle = train(recipe, out=out / "bundle", console=console)
    if bundle is None:
        raise InvalidInput("the demo trains in one process; start it without torchrun")
    calibration = bundle.calibration
    console.print(
        f"{bundle.name}: learned margin {calibration.learned_margin:.4f}, from "
        f"{calibration.matching_pairs:,} matching and {calibration.impostor_pairs:,} other pairs of "
        f"{calibration.identities} held-out digits; model card: {out / 'bundle' / 'README.md'}"
    )
    folders = _write_images(recipe, out / "images")

    _say("2. Serve it, and fill a gallery with digits that neither training nor calibration saw", console)
    with _server(out) as target, Client(target) as client:
        console.print(f"a server in another process answers on {target}")
        client.create_gallery(GALLERY)
        client.update_items(
            GALLERY,
            (
                NewItem(id=f"{folder.name}:{path.name}", image=path, identity=folder.name)
                for folder in folders
                for path in sorted(folder.iterdir())
            ),
        )
        console.print(f"gallery {GALLERY} holds {client.get_gallery(GALLERY).item_count} items")

        _say("3. Are these two images a match?", console)
        first, second = (sorted(folder.iterdir()) for folder in folders[:2])
        a, same, other = first[0], first[SAME], second[0]
        for b, truth in ((same, "the same digit, written twice"), (other, "two different digits")):
            console.print(f"{a.relative_to(out)} and {b.relative_to(out)}, {truth}:")
            show.decision(client.verify(a, b), console)

        _say("4. What in the gallery matches this image?", console)
        console.print(f"{a.relative_to(out)}, itself left out:")
        show.neighbors(client.search(GALLERY, ItemName(GALLERY, f"{a.parent.name}:{a.name}"), k=5), console)

    _say(f"Done in {time.monotonic() - started:.0f} s. Each step by hand:", console)
    for command in _commands(out, a, other):
        console.print(command, soft_wrap=True)


def _say(step: str, console: Console) -> None:
    console.print(f"\n{step}", style="bold")


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


def _commands(out: Path, a: Path, b: Path) -> list[str]:
    bundle, galleries = out / "bundle", out / "galleries"
    target = ["--target", "127.0.0.1:50051"]
    commands: list[list[str | Path]] = [
        ["train", RECIPE, "--out", bundle, "--overwrite"],
        ["model", "show", bundle],
        ["serve", "--bundle", bundle, "--data", galleries, "&"],
        ["gallery", "create", "mine", *target],
        ["gallery", "add", "mine", out / "images", *target],
        ["verify", a, b, *target],
        ["search", a, "--gallery", "mine", *target],
        ["batch-search", out / "images", "--gallery", "mine", "--out", out / "neighbours.parquet", *target],
    ]
    quoted = [[word if word == "&" else shlex.quote(str(word)) for word in command] for command in commands]
    environment = Path(os.path.relpath(sys.prefix))
    activate = [] if shutil.which("lookalike") else [f". {shlex.quote(str(environment / 'bin' / 'activate'))}"]
    written = [" ".join(["lookalike", *words]) for words in quoted]
    serving = next(at for at, words in enumerate(quoted) if words[-1] == "&")
    # A server takes seconds to start, and a command that comes before ends with an error.
    written.insert(serving + 1, f"until lookalike health {' '.join(target)} > /dev/null; do sleep 1; done")
    return [*activate, *written]
