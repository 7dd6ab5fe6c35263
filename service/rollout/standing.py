"""Which models answer, remembered beside the galleries, so that an activation outlives the process.

It holds until the server is started with other bundles than when it was made: what an operator says last counts.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from embedding.durable import replace_file
from embedding.errors import DamagedData, StorageFailed
from service.rollout.stock import Choice

FILE = ".models.json"

_log = logging.getLogger(__name__)


class Standing(BaseModel):
    """What the file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1, 2] = 2
    """1 in files without a sum, of versions before this one."""
    given: tuple[Choice, ...]
    """The bundles that the settings named when it was written, the active one first."""
    active: Choice
    others: tuple[Choice, ...] = ()

    @property
    def sum(self) -> str:
        """SHA-256 of all of it: a changed digit would let another calibration answer."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class _Summed(Standing):
    """As it is written."""

    sha256: str


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
        return _parsed(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DamagedData(
            f"{path} cannot be read ({type(error).__name__}); the bundles of the settings answer"
        ) from error


def write(galleries: Path, standing: Standing) -> None:
    """Remember, durably. Raises StorageFailed."""
    path = galleries / FILE
    try:
        galleries.mkdir(parents=True, exist_ok=True)
        replace_file(
            path, _Summed(**dict(standing), sha256=standing.sum).model_dump_json(indent=1).encode(), restore=True
        )
    except OSError as error:
        raise StorageFailed(f"the disk refused {path}: {error.strerror or error}; nothing was activated") from error


def _parsed(data: bytes) -> Standing:
    """Raises ValueError for what is not what was written."""
    try:
        found = _Summed.model_validate_json(data)
    except ValidationError:
        old = Standing.model_validate_json(data)
        if old.format != 1:
            raise
        return old
    kept = Standing(**{name: getattr(found, name) for name in Standing.model_fields})
    if found.sha256 != kept.sum:
        raise ValueError("it does not agree with its checksum")
    return kept
