"""Who calls, and what they may do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias, get_args

Scope: TypeAlias = Literal["read", "write", "admin"]
"""What a call does: `read` asks, `write` changes items, `admin` changes galleries, aliases, models and operations.
None implies another: a key that fills galleries need not be able to read them."""

SCOPES: tuple[Scope, ...] = get_args(Scope)

PATTERN = r"[a-z0-9*-]{1,63}"
"""A pattern of gallery ids, in which `*` stands for any characters, or none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Principal:
    """Somebody whose credentials were verified."""

    name: str
    """As logs and the audit log show it; calls of one name share their rate and their turn."""
    scopes: frozenset[Scope] = frozenset()
    galleries: tuple[str, ...] = ()
    """Patterns of the ids of the galleries, and the aliases, that its scopes hold for."""
    per_second: float | None = None
    """Calls a second, in the long run; None for no limit."""
    burst: int = 1
    """Calls that may come at once after a rest."""
    expires: float | None = None
    """Seconds since the epoch."""
    key: str = ""
    """The id of its record in the file of keys, which is looked up again while a stream lasts."""

    def allows(self, gallery: str) -> bool:
        """Whether its scopes hold for a gallery of this id, or an alias of this name."""
        return "*" in self.galleries or _compiled(self.galleries).fullmatch(gallery) is not None

    def may_all(self, scopes: Iterable[Scope]) -> bool:
        """Whether it may do these in any gallery."""
        return "*" in self.galleries and self.scopes.issuperset(scopes)


ANYBODY = Principal(name="", scopes=frozenset(SCOPES), galleries=("*",))
"""Who calls a server that asks for no credentials."""


@lru_cache(maxsize=1024)
def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(each).replace(r"\*", ".*") for each in patterns) or "(?!)", re.DOTALL)
