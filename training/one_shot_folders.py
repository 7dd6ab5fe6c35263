"""One-shot runs as folders, in the layout that Omniglot publishes its 20 runs in.

run01/training/class01.png …   one image of each identity
run01/test/item01.png …        one image of each identity to be named, in another order
run01/class_labels.txt         lines `run01/test/item01.png run01/training/class10.png`: what each shows
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from embedding.errors import AlreadyExists, InvalidDataset
from embedding.images import Preprocessing, decode
from training.datasets import ImageSet, load_path
from training.images import FolderImages, Images, ZipImages, check_inside, read_member, zip_members
from training.one_shot import Run, draw_runs, omniglot_drawers
from training.pairs import Ints

LABELS = "class_labels.txt"

_TO_CHECK = Preprocessing(image_size=16, channels=1)
"""Every image is read once before runs are drawn, so that none of them holds a bad one; the pixels are not used."""

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True, eq=False)
class RunFolders:
    """Runs read from a folder or zip."""

    runs: list[Run]
    """Rows of `images`."""
    run_names: list[str]
    """run01 and so on."""
    names: list[str]
    """Of each image: its path."""
    images: Images


def draw_folders(images: Path, *, out: Path, ways: int, runs: int, seed: int) -> None:
    """Draw runs from labelled images in folders of super-classes, and write them to a new folder.

    Raises InvalidDataset as `load_path` and `draw_runs` do, and AlreadyExists when `out` exists.
    """
    found = load_path(images, preprocessing=_TO_CHECK)
    if (groups_N := found.super_class_labels) is None:
        raise InvalidDataset(f"{images} has no folders of ALPHABET/CHARACTER; runs are drawn within an alphabet")
    drawn = draw_runs(
        found.labels_N,
        groups_N,
        drawers_N=omniglot_drawers(found.names),
        ways=ways,
        runs=runs,
        seed=seed,
    )
    write_runs(out, found, drawn, seed=seed)


def write_runs(out: Path, images: ImageSet, runs: Sequence[Run], *, seed: int = 0) -> None:
    """Write runs of rows of `images` to a new folder; `seed` shuffles classes and items.

    Raises AlreadyExists when `out` exists.
    """
    try:
        out.mkdir(parents=True)
    except FileExistsError as error:
        raise AlreadyExists(f"{out} exists; name a folder that does not") from error
    rng = np.random.default_rng(seed)
    for number, run in enumerate(runs, 1):
        folder = f"run{number:02d}"
        support_of_way = _write(out, f"{folder}/training/class", images, run.supports_W, rng)
        query_of_way = _write(out, f"{folder}/test/item", images, run.queries_W, rng)
        lines = sorted(f"{query} {support}" for query, support in zip(query_of_way, support_of_way, strict=True))
        (out / folder / LABELS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write(out: Path, start: str, images: ImageSet, rows_W: Ints, rng: np.random.Generator) -> list[str]:
    """Write images under numbers in random order; their paths in the given order."""
    paths = [f"{start}{number:02d}.png" for number in rng.permutation(len(rows_W)) + 1]
    (out / paths[0]).parent.mkdir(parents=True)
    for path, row in zip(paths, rows_W, strict=True):
        (out / path).write_bytes(_as_png(images.read(int(row))))
    return paths


def _as_png(data: bytes) -> bytes:
    if data.startswith(_PNG):
        return data
    buffer = io.BytesIO()
    decode(data).save(buffer, format="PNG")
    return buffer.getvalue()


def read_runs(path: Path) -> RunFolders:
    """The runs of a folder or zip. Raises InvalidDataset when it holds none, or when a run's labels are not usable."""
    labels = _labels_of_zip(path) if path.suffix.lower() == ".zip" else _labels_of_folder(path)
    if not labels:
        raise InvalidDataset(f"{path} holds no run; give a folder or zip of runNN folders, each with a {LABELS}")
    names: list[str] = []
    runs = []
    for file, text in labels.items():
        pairs = _parse(text, where=f"{path}/{file}")
        root = PurePosixPath(file).parent.parent
        start, ways = len(names), len(pairs)
        names += [(root / query).as_posix() for query, _ in pairs]
        names += [(root / support).as_posix() for _, support in pairs]
        runs.append(Run(queries_W=np.arange(start, start + ways), supports_W=np.arange(start + ways, start + 2 * ways)))
    if len(sizes := {len(run.queries_W) for run in runs}) > 1:
        raise InvalidDataset(f"the runs of {path} have between {min(sizes)} and {max(sizes)} ways; give runs of a kind")
    images = ZipImages(path, names) if path.suffix.lower() == ".zip" else FolderImages(path, names)
    run_names = [PurePosixPath(file).parent.name for file in labels]
    if len(set(run_names)) < len(run_names):  # in several folders of a zip
        run_names = [PurePosixPath(file).parent.as_posix() for file in labels]
    return RunFolders(runs=runs, run_names=run_names, names=names, images=images)


def _labels_of_folder(path: Path) -> dict[str, str]:
    if not path.is_dir():
        raise InvalidDataset(f"{path} is neither a folder nor a .zip; give a folder or a zip of runNN folders")
    files = sorted(path.glob(f"*/{LABELS}"))
    return {file.relative_to(path).as_posix(): _text(file.read_bytes(), where=str(file)) for file in files}


def _labels_of_zip(path: Path) -> dict[str, str]:
    members = [member for member in zip_members(path) if PurePosixPath(member).name == LABELS]
    return {member: _text(read_member(path, member), where=f"{path}/{member}") for member in members}


def _text(data: bytes, *, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidDataset(f"{where} is not text in UTF-8 ({error})") from error


def _parse(text: str, *, where: str) -> list[tuple[str, str]]:
    """Query and support of each line; each image stands in one line only."""
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        match line.split():
            case [query, support]:
                check_inside(query, where=where)
                check_inside(support, where=where)
                pairs.append((query, support))
            case []:
                continue
            case _:
                raise InvalidDataset(f"{where}, line {number}: takes a test and a training image; got {line!r}")
    if len(pairs) < 2 or len({name for pair in pairs for name in pair}) < 2 * len(pairs):
        raise InvalidDataset(f"{where} must list two images or more, each once, with a training image of its own")
    return pairs
