"""The file of aliases: written as a whole, read only where it is what was written.

    {"format": 2, "aliases": {alias: gallery, …}, "sha256": sum of the aliases as compact JSON, by name}

Before that format it held the aliases alone, `{alias: gallery, …}`, which is still read; no change of one byte
makes one form into the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, RootModel, ValidationError

from embedding.durable import replace_file
from embedding.errors import DamagedData, InvalidInput, StorageFailed
from index.items import check_gallery_id

_FORMAT = 2


class _Old(RootModel[dict[str, str]]):
    """Aliases without a sum."""

    model_config = ConfigDict(strict=True)


class _Summed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    aliases: dict[str, str]
    sha256: str


def text_of(targets: Mapping[str, str]) -> bytes:
    """What a file of these aliases holds."""
    written = {"format": _FORMAT, "aliases": dict(sorted(targets.items())), "sha256": _sum(targets)}
    return json.dumps(written, indent=1).encode()


def write(path: Path, targets: Mapping[str, str]) -> None:
    """Write as a whole or not at all. Raises OSError."""
    replace_file(path, text_of(targets), restore=True)


def read(path: Path) -> dict[str, str] | None:
    """Galleries by alias, None when there is no file.

    Raises StorageFailed, and DamagedData for what is no list of aliases or not the one that was written.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageFailed(f"the disk refused {path}: {error.strerror or error}") from error
    try:
        targets = _parsed(data, path)
        for name in (*targets, *targets.values()):
            check_gallery_id(name, field="alias")
    except (ValidationError, InvalidInput) as error:
        raise DamagedData(f"{path} is no list of aliases") from error
    return targets


def _parsed(data: bytes, path: Path) -> dict[str, str]:
    try:
        return _Old.model_validate_json(data).root
    except ValidationError:
        found = _Summed.model_validate_json(data)
    if found.format != _FORMAT:
        raise DamagedData(
            f"{path} is of format {found.format}, and this version reads {_FORMAT}; open it with a newer one"
        )
    if found.sha256 != _sum(found.aliases):
        raise DamagedData(f"{path} does not agree with its checksum")
    return found.aliases


def _sum(targets: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(targets, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
