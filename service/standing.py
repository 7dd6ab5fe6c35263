"""Which models answer, remembered beside the galleries, so that an activation outlives the process.

It holds until the server is started with other bundles than when it was made: what an operator says last counts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from embedding.errors import DamagedData, StorageFailed
from service.stock import Choice

FILE = ".models.json"

_log = logging.getLogger(__name__)


class Standing(BaseModel):
    """What the file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    given: tuple[Choice, ...]
    """The bundles that the settings named when it was written, the active one first."""
    active: Choice
    others: tuple[Choice, ...] = ()


def read(galleries: Path, given: Sequence[Choice]) -> Standing:
    """What answers: as remembered, or as the settings say when these have changed or nothing is remembered."""
    plain = Standing(given=tuple(given), active=given[0], others=tuple(given[1:]))
    try:
        remembered = kept(galleries)
    except DamagedData as error:
        _log.warning("%s", error)
        return plain
    if remembered is None:
        return plain
    if remembered.given != plain.given:
        _log.warning("the settings name other bundles than when a model was activated; these answer")
        return plain
    return remembered


def kept(galleries: Path) -> Standing | None:
    """What the file holds, whatever the settings say; None when nothing was activated. Raises DamagedData."""
    path = galleries / FILE
    try:
        return Standing.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeError, ValidationError) as error:
        raise DamagedData(
            f"{path} cannot be read ({type(error).__name__}); the bundles of the settings answer"
        ) from error


def write(galleries: Path, standing: Standing) -> None:
    """Remember, durably. Raises StorageFailed."""
    path = galleries / FILE
    partial = path.with_suffix(".partial")
    try:
        galleries.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(standing.model_dump_json(indent=1))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        descriptor = os.open(galleries, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageFailed(f"the disk refused {path}: {error.strerror or error}; nothing was activated") from error
