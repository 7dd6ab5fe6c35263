"""The bundles that a server was given: those named by its settings, and those in its folder of models.

The folder is read again whenever it is asked about, so that a bundle put there can be activated at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embedding.bundle import CALIBRATION, MANIFEST, SUMS, Described, describe
from embedding.errors import InvalidInput, LookalikeError, ModelAmbiguous, NotFound, StorageFailed

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """A model under one of its calibrations."""

    model: str
    calibration: int

    @classmethod
    def of(cls, bundle: Described) -> Choice:
        return cls(bundle.name, bundle.calibration.version)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model that is loaded or could be."""

    described: Described
    calibrations: Sequence[int]
    """Versions that can be activated, rising."""
    loaded: bool
    active: bool


class Stock:
    """Finds bundles by what they say of themselves; every method may be called from any thread.

    `named` are the bundles of the settings, `folder` holds further ones, a directory each.
    """

    def __init__(self, named: Sequence[Path], folder: Path | None = None) -> None:
        self._named = tuple(named)
        self._folder = folder
        self._known: dict[Path, tuple[object, Described]] = {}  # with what its files were like when they were read
        self._reported: dict[Path, str] = {}
        self._is_gone = False

    def in_folder(self) -> list[Path]:
        """The directories of bundles in the folder; without one, none.

        Raises InvalidInput when it is not at the path that the settings name, and StorageFailed. For the start: under a
        server that runs, a folder that has vanished is an empty one.
        """
        try:
            return self._listed()
        except FileNotFoundError as error:
            raise InvalidInput(
                f"there is no folder of models at {self._folder}; make it, or leave --models out", field="models"
            ) from error
        except OSError as error:
            raise StorageFailed(f"the disk refused {self._folder}: {error.strerror or error}") from error

    def all(self) -> list[Described]:
        """Every sound bundle, those of the settings first. One in the folder that is not sound is logged, once.

        Raises StorageFailed when the folder cannot be read, and whatever a bundle of the settings suffers from.
        """
        found = [self._named_one(path) for path in self._named]
        for path in self._still_in_folder():
            try:
                found.append(self._described(path))
            except LookalikeError as error:
                if self._reported.get(path) != str(error):
                    _log.warning("model folder: %s", error)
                    self._reported[path] = str(error)
        return found

    def damaged(self) -> dict[Path, LookalikeError]:
        """The bundles of the folder that are not sound, each with why. Raises InvalidInput and StorageFailed."""
        found: dict[Path, LookalikeError] = {}
        for path in self.in_folder():
            try:
                self._described(path)
            except LookalikeError as error:
                found[path] = error
        return found

    def find(self, model: str, calibration: int = 0) -> Described:
        """The bundle of this model with this calibration, 0 for its newest.

        Raises NotFound, and ModelAmbiguous when two bundles claim to be it and differ.
        """
        of_model = [bundle for bundle in self.all() if bundle.name == model]
        if not of_model:
            raise NotFound(
                f"no model {model!r} here; there are {', '.join(sorted({b.name for b in self.all()}))}; put its bundle "
                f"into {'the folder of models' if self._folder else 'a folder and name that with --models'}",
                field="name",
            )
        wanted = calibration or max(bundle.calibration.version for bundle in of_model)
        same = [bundle for bundle in of_model if bundle.calibration.version == wanted]
        if not same:
            versions = ", ".join(str(version) for version in sorted({b.calibration.version for b in of_model}))
            raise NotFound(f"model {model!r} has calibrations {versions}; there is no {wanted}", field="calibration")
        for other in same[1:]:
            if other.calibration != same[0].calibration:
                raise ModelAmbiguous(
                    f"the bundles {same[0].path.name!r} and {other.path.name!r} both hold calibration {wanted} of "
                    f"{model}, and differ; remove one of them",
                    field="name",
                )
        return same[0]

    def _named_one(self, path: Path) -> Described:
        try:
            return self._described(path)
        except LookalikeError:
            if path not in self._known:
                raise
            return self._known[path][1]  # it answers, whatever has become of its files

    def _still_in_folder(self) -> list[Path]:
        """Callers are told what is raised: it says nothing of where the folder is."""
        try:
            found = self._listed()
        except (FileNotFoundError, NotADirectoryError):
            if not self._is_gone:
                _log.warning("model folder: %s has vanished; what is loaded answers still", self._folder)
            self._is_gone = True
            return []
        except OSError as error:
            raise StorageFailed(f"the disk refused the folder of models: {error.strerror or error}") from error
        self._is_gone = False
        return found

    def _listed(self) -> list[Path]:
        """Raises OSError."""
        if self._folder is None:
            return []
        # Those whose name begins with a dot are being written.
        return sorted(
            path for path in self._folder.iterdir() if not path.name.startswith(".") and (path / MANIFEST).is_file()
        )

    def _described(self, path: Path) -> Described:
        signature = _signature(path)
        known = self._known.get(path)
        if known is not None and signature is not None and known[0] == signature:
            return known[1]
        described = describe(path)
        self._known[path] = (signature, described)
        return described


def _signature(path: Path) -> object:
    """Changes when the files that describe a bundle do; None when that cannot be told."""
    try:
        return tuple(
            (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            for stat in ((path / name).stat() for name in (MANIFEST, CALIBRATION, SUMS))
        )
    except OSError:
        return None
