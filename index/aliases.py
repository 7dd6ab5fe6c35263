"""Names that stand for galleries: one small file beside them, replaced as a whole, so that a move is one step."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from embedding.errors import DamagedData, InvalidInput, NotFound, StorageFailed
from index.items import check_gallery_id
from index.segments import sync_folder

FILE = ".aliases.json"


class Aliases:
    """The aliases of one folder of galleries; every method may be called from any thread, `put` and `delete` by the
    process alone that holds the folder for writing. Opened read-only they are those of the moment of opening, and those
    of the moment of asking when they `follow`.

    Raises DamagedData when the file cannot be understood.
    """

    def __init__(self, root: Path, *, read_only: bool = False, follow: bool = False) -> None:
        read_only = read_only or follow
        self._follow = follow
        self._path = root / FILE
        self._read_only = read_only
        self._changing = threading.Lock()
        self._seen = self._look()
        self._read_targets: Mapping[str, str] = _read(self._path)

    @property
    def _targets(self) -> Mapping[str, str]:
        if self._follow and (now := self._look()) != self._seen:
            self._read_targets, self._seen = _read(self._path), now
        return self._read_targets

    def _look(self) -> tuple[int, int]:
        """Changes with every replacement of the file."""
        try:
            found = self._path.stat()
        except OSError:
            return 0, 0
        return found.st_ino, found.st_mtime_ns

    def resolve(self, name: str) -> str:
        """The gallery that `name` stands for; itself when it is no alias."""
        return self._targets.get(name, name)

    def get(self, alias: str) -> str:
        """The gallery that the alias stands for. Raises NotFound."""
        try:
            return self._targets[alias]
        except KeyError:
            raise NotFound(f"no alias {alias!r} here", field="name") from None

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
        partial = self._path.with_suffix(".partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                json.dump(targets, file, indent=1, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path)
            sync_folder(self._path.parent)
        except OSError as error:
            raise StorageFailed(f"the disk refused {self._path}: {error.strerror or error}") from error
        self._read_targets = targets


def _read(path: Path) -> dict[str, str]:
    try:
        targets = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageFailed(f"the disk refused {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise _damaged(path) from error
    if not isinstance(targets, dict) or not all(isinstance(target, str) for target in targets.values()):
        raise _damaged(path)
    try:
        for name in (*targets, *targets.values()):
            check_gallery_id(name, field="alias")
    except InvalidInput as error:
        raise _damaged(path) from error
    return targets


def _damaged(path: Path) -> DamagedData:
    return DamagedData(f"{path} is not a list of aliases; restore it from a copy, or delete it and name them again")
