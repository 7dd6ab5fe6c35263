"""Calibrations as the text that they are kept as, made once of each: no answer should wait for that every time."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from embedding.calibration import Calibration
from embedding.errors import DamagedData

MAX_KEPT = 256
"""Texts remembered, and as many calibrations read from one; those used longest ago are forgotten first."""


@dataclass(frozen=True, slots=True)
class Text:
    """What decides, without the held-out pairs."""

    text: str
    digest: str


class CalibrationTexts:
    """Remembers both ways; every method may be called from any thread."""

    def __init__(self) -> None:
        # By identity: hashing a calibration takes as long as writing it. It is kept too, so that its id stays its own.
        self._texts: dict[int, tuple[Calibration, Text]] = {}
        self._read: dict[str, Calibration] = {}
        self._lock = threading.Lock()

    def of(self, calibrations: Sequence[Calibration]) -> list[Text]:
        """The text of each."""
        with self._lock:
            return [self._of(each) for each in calibrations]

    def read(self, digest: str) -> Calibration | None:
        """The calibration that was last read from the text of this digest, if it is remembered."""
        with self._lock:
            found = self._read.pop(digest, None)
            if found is not None:
                self._read[digest] = found
            return found

    def parsed(self, text: str, digest: str) -> Calibration:
        """The calibration of a text. Raises DamagedData where the text is not what was kept."""
        if _digest(text) != digest:
            raise DamagedData("a calibration in it does not agree with its checksum")
        found = Calibration.model_validate_json(text)
        with self._lock:
            self._read[digest] = found
            if len(self._read) > MAX_KEPT:
                del self._read[next(iter(self._read))]
        return found

    def _of(self, calibration: Calibration) -> Text:
        known = self._texts.pop(id(calibration), None)
        if known is None:
            text = calibration.model_dump_json(exclude={"held_out"})
            known = calibration, Text(text, _digest(text))
        self._texts[id(calibration)] = known
        if len(self._texts) > MAX_KEPT:
            del self._texts[next(iter(self._texts))]
        return known[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
