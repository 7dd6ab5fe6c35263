"""The bundle: one directory that holds a trained model as data, never as code.

    bundle.json          name, architecture, preprocessing, lineage, fingerprint
    calibration.json     learned margin, error rates, match probability
    weights.safetensors
    reference.json       distances and norms of the calibration's images; not in bundles of earlier versions
    seen.json            digests of what it was trained on, likewise
    SHA256SUMS           checksums of these, and of further weights, verified on every load
    README.md, card/     the model card

The fingerprint covers weights, architecture and preprocessing, hence everything that an embedding depends on; a new
calibration of the same weights keeps it. Written beside its destination and renamed, so that no half bundle appears.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self, TypedDict

import torch
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from embedding import destination
from embedding.calibration import Calibration
from embedding.durable import sync_folder
from embedding.errors import DamagedData, NotFound, StorageFailed
from embedding.images import Preprocessing
from embedding.networks import Architecture, EmbeddingNetwork, build
from embedding.reference import Reference
from embedding.seen import Seen

WEIGHTS = "weights.safetensors"
MANIFEST = destination.MANIFEST
CALIBRATION = "calibration.json"
REFERENCE = "reference.json"
SEEN = "seen.json"
SUMS = "SHA256SUMS"
_CARD = "README.md"
_SUMMED = (MANIFEST, CALIBRATION, WEIGHTS)
_WEIGHTS_SUFFIX = ".safetensors"

NAME_PATTERN = r"^[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?$"


class Lineage(BaseModel):
    """Where a bundle comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    created: AwareDatetime
    recipe: dict[str, JsonValue]
    """The whole recipe as validated, defaults included."""
    data: dict[str, JsonValue]
    """Counts of images and identities a side of the split, skipped files, protocol."""
    metrics: dict[str, JsonValue]
    """Evaluation on the test side, by metric name."""
    environment: dict[str, str]
    """Versions and hardware that it was trained with."""


_LEARNED = "learned by the loss: "


def learned_metrics(learned: Mapping[str, float]) -> dict[str, JsonValue]:
    """What a loss has learned itself, such as the boundary β of the margin loss, as metrics of a lineage."""
    return {f"{_LEARNED}{name}": value for name, value in learned.items()}


def learned_by_loss(lineage: Lineage) -> dict[str, float]:
    """The same, read back; empty where the loss learned nothing."""
    found = {name: value for name, value in lineage.metrics.items() if name.startswith(_LEARNED)}
    return {name.removeprefix(_LEARNED): float(value) for name, value in found.items() if isinstance(value, float)}


class Manifest(BaseModel):
    """What `bundle.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    modality: Literal["image"] = "image"
    architecture: Architecture
    preprocessing: Preprocessing
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    lineage: Lineage

    @model_validator(mode="after")
    def _same_input(self) -> Self:
        seen = (self.preprocessing.image_size, self.preprocessing.channels)
        if seen != (self.architecture.image_size, self.architecture.channels):
            raise ValueError("preprocessing and architecture must agree on image_size and channels")
        return self


@dataclass(frozen=True, kw_only=True)
class Described:
    """A bundle on disk, known by its manifest and its calibration, whose checksums have been verified."""

    path: Path
    manifest: Manifest
    calibration: Calibration
    reference: Reference | None = None
    """What live distances and norms are compared with; None in bundles of earlier versions."""
    seen: Seen | None = None
    """What it was trained on; None in bundles of earlier versions."""

    @property
    def name(self) -> str:
        """Identifier of the model: the recipe's name and the start of the fingerprint."""
        return f"{self.manifest.name}-{self.fingerprint[:12]}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 over weights, architecture and preprocessing, in hexadecimal."""
        return self.manifest.fingerprint

    @property
    def architecture(self) -> Architecture:
        return self.manifest.architecture

    @property
    def preprocessing(self) -> Preprocessing:
        return self.manifest.preprocessing

    @property
    def lineage(self) -> Lineage:
        return self.manifest.lineage

    @property
    def embedding_dim(self) -> int:
        """Width D of an embedding, all views joined."""
        return self.preprocessing.embedding_dim(self.architecture.embedding_dim)


def describe(path: Path | str) -> Described:
    """Read what a bundle says of itself, without its weights. Raises NotFound or DamagedData."""
    path = Path(path)
    return Described(path=path, **_parsed(path, _read_verified(path, (MANIFEST, CALIBRATION))))


@dataclass(frozen=True, kw_only=True)
class Bundle(Described):
    """A bundle on disk whose checksums and schema have all been verified. Weights are read by `network`."""

    _weights: bytes

    def network(self) -> EmbeddingNetwork:
        """The trained network, in evaluation mode, on the CPU."""
        with torch.random.fork_rng(devices=[]):  # building draws random weights that the trained ones replace
            network = build(self.architecture)
        try:
            network.load_state_dict(load_tensors(self._weights))
        except (SafetensorError, RuntimeError) as error:
            raise DamagedData(
                f"{self.path / WEIGHTS} does not fit the architecture in {MANIFEST}: train again"
            ) from error
        return network.eval()

    @classmethod
    def load(cls, path: Path | str) -> Bundle:
        """Read and verify a bundle. Raises NotFound, or DamagedData when it was truncated or edited."""
        path = Path(path)
        files = _read_verified(path)
        parsed = _parsed(path, files)
        manifest = parsed["manifest"]
        if fingerprint(manifest.architecture, manifest.preprocessing, files[WEIGHTS]) != manifest.fingerprint:
            raise DamagedData(f"{path}: the fingerprint in {MANIFEST} is not that of its weights; restore the bundle")
        return cls(path=path, **parsed, _weights=files[WEIGHTS])


def write_bundle(
    path: Path | str,
    *,
    name: str,
    network: EmbeddingNetwork,
    preprocessing: Preprocessing,
    calibration: Calibration,
    lineage: Lineage,
    reference: Reference | None = None,
    seen: Seen | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Write a bundle atomically and read it back.

    `extra_files` maps relative paths to contents, such as the model card; weights among them (.safetensors) are
    listed in SHA256SUMS and verified with the rest. Raises AlreadyExists unless `overwrite`
    takes the place of a bundle, and StorageFailed when the disk refuses; neither leaves anything behind.
    """
    path = Path(path)
    destination.check_destination(path, overwrite=overwrite)
    weights = save_tensors({key: tensor.contiguous().cpu() for key, tensor in network.state_dict().items()})
    manifest = Manifest(
        name=name,
        architecture=network.architecture,
        preprocessing=preprocessing,
        fingerprint=fingerprint(network.architecture, preprocessing, weights),
        lineage=lineage,
    )
    files = {
        MANIFEST: manifest.model_dump_json(indent=2).encode(),
        CALIBRATION: calibration.model_dump_json(indent=2).encode(),
        WEIGHTS: weights,
    }
    if reference is not None:
        files[REFERENCE] = reference.model_dump_json(indent=2).encode()
    if seen is not None:
        files[SEEN] = seen.model_dump_json(indent=2).encode()
    written = {**(extra_files or {}), **files}
    summed = [*_SUMMED, *sorted(name for name in written if name not in _SUMMED and _is_summed(name))]
    sums = "".join(f"{hashlib.sha256(written[name]).hexdigest()}  {name}\n" for name in summed)
    _write_directory(path, {**written, SUMS: sums.encode()})
    return Bundle.load(path)


def recalibrated(
    bundle: Bundle,
    path: Path | str,
    *,
    calibration: Calibration,
    learned_from: Mapping[str, JsonValue],
    note: str,
    reference: Reference | None = None,
) -> Bundle:
    """Write the same model under another calibration, atomically, and read it back; its fingerprint stays.

    `learned_from` is kept in the lineage's data, by the calibration's version; `note`, Markdown, heads the model card.
    `reference` is that of the calibration's images, where these are others. All other files are copied. Raises
    AlreadyExists, and StorageFailed with nothing left behind.
    """
    path = Path(path)
    destination.check_destination(path, overwrite=None)
    data = {**bundle.lineage.data, f"calibration {calibration.version}": dict(learned_from)}
    lineage = bundle.lineage.model_copy(update={"data": data})
    manifest = bundle.manifest.model_copy(update={"lineage": lineage})
    try:
        files = {
            file.relative_to(bundle.path).as_posix(): file.read_bytes()
            for file in sorted(bundle.path.rglob("*"))
            if file.is_file()
        }
    except OSError as error:
        raise _unreadable(bundle.path, error) from error
    files[MANIFEST] = manifest.model_dump_json(indent=2).encode()
    files[CALIBRATION] = calibration.model_dump_json(indent=2).encode()
    files[_CARD] = f"{note.rstrip()}\n\n".encode() + files.get(_CARD, b"")
    listed = [line.partition("  ")[2] for line in files[SUMS].decode("ascii").splitlines()]
    if reference is not None:
        files[REFERENCE] = reference.model_dump_json(indent=2).encode()
        listed += [] if REFERENCE in listed else [REFERENCE]
    files[SUMS] = "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in listed).encode()
    _write_directory(path, files)
    return Bundle.load(path)


def fingerprint(architecture: Architecture, preprocessing: Preprocessing, weights: bytes) -> str:
    """SHA-256, in hexadecimal, over everything that an embedding depends on."""
    # Fields that came later are named only where they change something, so that older bundles keep their fingerprint.
    unused = {"views", "join_views"} if preprocessing.views == ("as-is",) else set()
    if preprocessing.size_normalisation is None:
        unused.add("size_normalisation")
    described = json.dumps(
        {
            "architecture": architecture.model_dump(mode="json"),
            "preprocessing": preprocessing.model_dump(mode="json", exclude=unused),
            "weights": hashlib.sha256(weights).hexdigest(),
        },
        sort_keys=True,
    )
    return hashlib.sha256(described.encode()).hexdigest()


def _is_summed(name: str) -> bool:
    """Whether a file beside the three that every bundle has is verified too."""
    return name.endswith(_WEIGHTS_SUFFIX) or name in {REFERENCE, SEEN}


class _Parsed(TypedDict):
    manifest: Manifest
    calibration: Calibration
    reference: Reference | None
    seen: Seen | None


def _parsed(path: Path, files: Mapping[str, bytes]) -> _Parsed:
    try:
        return {
            "manifest": Manifest.model_validate_json(files[MANIFEST]),
            "calibration": Calibration.model_validate_json(files[CALIBRATION]),
            "reference": Reference.model_validate_json(files[REFERENCE]) if REFERENCE in files else None,
            "seen": Seen.model_validate_json(files[SEEN]) if SEEN in files else None,
        }
    except ValidationError as error:
        raise DamagedData(f"{path} was written by another version of lookalike: {_first(error)}") from error


def _unreadable(path: Path, error: OSError) -> StorageFailed:
    file = f"{Path(error.filename).name}: " if error.filename else ""
    return StorageFailed(f"cannot read the bundle at {path}: {file}{error.strerror or error}")


def _read_verified(path: Path, only: Sequence[str] | None = None) -> dict[str, bytes]:
    """The files that the checksums list, or `only` those named."""
    if not (path / MANIFEST).is_file():
        raise NotFound(f"no bundle at {path}: {MANIFEST} is missing; make one with `lookalike train`")
    try:
        listed = (path / SUMS).read_text("ascii").split("\n")
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in listed)}
        further = {name for name in sums if _is_summed(name) and name == Path(name).name}
        wanted = only or (*_SUMMED, *sorted(further - {*_SUMMED}))
        files = {name: (path / name).read_bytes() for name in wanted}
    except FileNotFoundError as error:
        raise DamagedData(
            f"the bundle at {path} lacks {Path(error.filename).name}; restore it or train again"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:  # not ASCII, or a name that no file can have
        raise DamagedData(f"{path / SUMS} is no list of checksums: {error}; restore the bundle") from error
    for name, content in files.items():
        if sums.get(name) != hashlib.sha256(content).hexdigest():
            raise DamagedData(
                f"{path / name} was truncated or edited: its checksum differs from {SUMS}; restore the bundle"
            )
    return files


def _write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Write all files into a new directory beside `path`, make them durable, and rename it into place."""
    partial: Path | None = None
    replaced: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
        partial.chmod(0o755)
        for name, content in files.items():
            _write_durably(partial / name, content)
        sync_folder(partial)
        if path.exists():
            replaced = partial.with_name(f"{partial.name}.replaced")
            path.rename(replaced)
        partial.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise StorageFailed(
            f"cannot write the bundle to {path}: {error.strerror or error}; nothing was left there"
        ) from error
    finally:
        if replaced is not None:
            with suppress(OSError):  # where the new one, or another's, stands there
                replaced.rename(path)
            shutil.rmtree(replaced, ignore_errors=True)
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _write_durably(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
