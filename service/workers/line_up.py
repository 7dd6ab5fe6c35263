"""Which models answer, as one worker tells another: enough to load the very same, or to notice that it is not there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from embedding.bundle import Bundle
from embedding.errors import DamagedData


class Named(BaseModel):
    """A bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    model: str
    calibration: int
    digest: str
    """Of all that its decisions depend on."""

    @classmethod
    def of(cls, bundle: Bundle) -> Named:
        return cls(
            path=bundle.path, model=bundle.name, calibration=bundle.calibration.version, digest=digest_of(bundle)
        )

    def load(self) -> Bundle:
        """The bundle. Raises DamagedData when another has taken its place, and whatever `Bundle.load` raises."""
        return self.checked(Bundle.load(self.path))

    def checked(self, bundle: Bundle) -> Bundle:
        """A bundle that was read from `path`. Raises DamagedData when it is not this one."""
        if digest_of(bundle) != self.digest:
            raise DamagedData(
                f"{self.path} is no longer what it was when calibration {self.calibration} of {self.model} was loaded "
                "from it; restore it, or restart the server to answer with what it is now"
            )
        return bundle


class LineUp(BaseModel):
    """The bundles that answer together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    active: Named
    others: tuple[Named, ...] = ()
    """They answer where a gallery holds embeddings of their model."""

    @classmethod
    def of(cls, bundles: Sequence[Bundle]) -> LineUp:
        """The first is the active one."""
        active, *others = map(Named.of, bundles)
        return cls(active=active, others=tuple(others))

    @property
    def all(self) -> tuple[Named, ...]:
        """Every bundle, the active one first."""
        return (self.active, *self.others)


def digest_of(bundle: Bundle) -> str:
    """Equal for bundles that decide alike: the same weights under the same calibration."""
    return hashlib.sha256(f"{bundle.fingerprint}\n{bundle.calibration.model_dump_json()}".encode()).hexdigest()
