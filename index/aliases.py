"""Names that stand for galleries: one small file beside them, replaced as a whole, so that a move is one step.

root/.aliases.json              targets by alias
root/.aliases.copy.json         the same, written after it
root/.aliases.damaged-….json    what was found damaged, set aside
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from embedding.errors import DamagedData, LookalikeError, NotFound, StorageFailed
from index import alias_file
from index.absent import no_alias
from index.engine_catalog import GalleryCatalog
from index.items import check_gallery_id

FILE = ".aliases.json"
COPY = ".aliases.copy.json"
"""The same once more, for when the first cannot be read."""
ASIDE = ".aliases.damaged-"
"""How the name begins of a damaged file that was set aside."""

_log = logging.getLogger(__name__)


class Aliases:
    """The aliases of one folder of galleries; every method may be called from any thread, `put` and `delete` by the
    process alone that holds the folder for writing. Opened read-only they are those of the moment of opening, and those
    of the moment of asking when they `follow`.

    Where the file cannot be understood, its copy counts; a writer then sets the file aside and writes it anew. Where
    neither can be, both are read again at each question, so that what is brought back counts at once. Until then
    galleries are found by their names, which `is_gallery` knows, and everything else raises DamagedData. Raises
    StorageFailed where the disk refuses the file and there is no copy.
    """

    def __init__(
        self,
        root: Path,
        *,
        read_only: bool = False,
        follow: bool = False,
        is_gallery: Callable[[str], bool] = lambda _: False,
    ) -> None:
        read_only = read_only or follow
        self._follow = follow
        self._path = root / FILE
        self._read_only = read_only
        self._is_gallery = is_gallery
        self._changing = threading.RLock()
        self._damage: DamagedData | None = None
        self._read_targets: Mapping[str, str] = {}
        self._seen = self._look()
        self._take()

    @property
    def _targets(self) -> Mapping[str, str]:
        if self._follow and (now := self._look()) != self._seen:
            self._take()
            self._seen = now
        elif self._damage is not None:
            self._take()
        if self._damage is not None:
            raise self._damage
        return self._read_targets

    def _take(self) -> None:
        """Read the file, or else its copy; when neither can be read, what was read before stays, if anything was."""
        copy = self._path.with_name(COPY)
        with self._changing:
            try:
                found, why = alias_file.read(self._path), f"{self._path} is missing"
            except StorageFailed as error:
                if not copy.is_file():
                    raise  # the disk has its own reasons, and its own remedies
                found, why, is_there = None, str(error), True
            except DamagedData as error:
                found, why, is_there = None, str(error), True
            else:
                is_there = copy.exists()  # without either, there were never any
            if found is None and is_there:
                found = _or_none(copy)
                if found is None:
                    if not self._read_targets and self._damage is None:
                        self._damage = _lost(self._path)
                        _log.error("%s", self._damage)  # once, though it is looked at again and again
                    return
                _log.warning("%s; the aliases of %s count", why, copy)
                self._renew(found)
            elif found is not None and not self._read_only:
                self._bring_up(found)
            self._read_targets, self._damage = found or {}, None

    def _bring_up(self, targets: Mapping[str, str]) -> None:
        """Write what a version before this one wrote without a sum, or not at all, or a crash has left behind."""
        wanted = alias_file.text_of(targets)
        try:
            if self._path.read_bytes() != wanted:
                alias_file.write(self._path, targets)
        except OSError as error:  # it has just been read, and counts as it is
            _log.warning("%s cannot be written anew: %s", self._path, error.strerror or error)
        try:
            is_same = self._path.with_name(COPY).read_bytes() == wanted
        except OSError:
            is_same = False
        if not is_same:
            self._copy(targets)

    def _renew(self, targets: Mapping[str, str]) -> None:
        """Set a damaged file aside and write another."""
        if self._read_only:
            return
        try:
            if self._path.exists():
                self._path.rename(self._path.with_name(f"{ASIDE}{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}.json"))
            alias_file.write(self._path, targets)
        except OSError as error:
            _log.warning("%s cannot be written anew: %s", self._path, error.strerror or error)

    def _copy(self, targets: Mapping[str, str]) -> None:
        try:
            alias_file.write(self._path.with_name(COPY), targets)
        except OSError as error:  # the aliases themselves are written
            _log.warning("the copy of %s cannot be written: %s", self._path, error.strerror or error)

    def _look(self) -> tuple[int, int]:
        """Changes with every replacement of the file."""
        try:
            found = self._path.stat()
        except OSError:
            return 0, 0
        return found.st_ino, found.st_mtime_ns

    def resolve(self, name: str) -> str:
        """The gallery that `name` stands for; itself when it is no alias. Raises DamagedData when that is not known."""
        try:
            return self._targets.get(name, name)
        except DamagedData:
            if self._is_gallery(name):
                return name  # no alias has the name of a gallery
            raise

    def get(self, alias: str) -> str:
        """The gallery that the alias stands for. Raises NotFound."""
        try:
            return self._targets[alias]
        except KeyError:
            raise no_alias(alias) from None

    def all(self) -> Mapping[str, str]:
        """Galleries by alias, in the order of the aliases."""
        return dict(sorted(self._targets.items()))

    def of(self, gallery_id: str) -> list[str]:
        """The aliases of a gallery, by name."""
        return [alias for alias, target in self.all().items() if target == gallery_id]

    def put(self, alias: str, gallery_id: str, *, allow_missing: bool = True) -> None:
        """Let `alias` stand for a gallery, durably. Raises NotFound for a new one unless `allow_missing`."""
        check_gallery_id(alias, field="alias.name")
        with self._changing:
            if not allow_missing and alias not in self._targets:
                raise NotFound(f"no alias {alias!r} here; set allow_missing to create it", field="alias.name")
            self._write({**self._targets, alias: gallery_id})

    def delete(self, alias: str) -> None:
        """Raises NotFound."""
        with self._changing:
            self.get(alias)
            self._write({name: target for name, target in self._targets.items() if name != alias})

    def _write(self, targets: Mapping[str, str]) -> None:
        if self._read_only:
            raise StorageFailed(f"{self._path.parent} is open read-only; open it for writing")
        try:
            alias_file.write(self._path, targets)
        except OSError as error:
            raise StorageFailed(f"the disk refused {self._path}: {error.strerror or error}") from error
        self._read_targets = targets
        self._copy(targets)


def holds(catalog: GalleryCatalog, name: str) -> bool:
    """Whether there is a gallery of this name, sound or not."""
    try:
        return catalog.opened(name) is not None or catalog.get(name) is not None
    except NotFound:
        return False
    except LookalikeError:
        return True


def examined(root: Path) -> str:
    """What is wrong with the aliases of a folder; empty when nothing is. Changes nothing.

    Raises DamagedData where neither the file nor its copy can be understood.
    """
    path, copy = root / FILE, root / COPY
    try:
        if alias_file.read(path) is not None or not copy.exists():
            return ""
        why = f"{path} is missing"
    except (DamagedData, StorageFailed) as error:
        why = str(error)
    if _or_none(copy) is None:
        raise _lost(path)
    return why


def _or_none(path: Path) -> dict[str, str] | None:
    try:
        return alias_file.read(path)
    except LookalikeError:
        return None


def _lost(path: Path) -> DamagedData:
    return DamagedData(
        f"the aliases are damaged: neither {path} nor {COPY} beside it can be read, so that a name that is no "
        f"gallery's may be an alias. Restore {FILE} from a backup; or delete both files, and name the aliases again. "
        "Galleries answer to their own names meanwhile"
    )
