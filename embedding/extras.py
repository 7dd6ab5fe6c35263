"""How an extra is installed that is not there, as every message about one says it."""

from __future__ import annotations


def installing(extra: str) -> str:
    """Nothing has been released: what an index of packages has under this name is not ours."""
    return f"install lookalike's extra {extra}, in its checkout by pip install -c constraints.txt '.[{extra}]'"
