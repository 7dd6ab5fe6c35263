"""Print what extras of this project require, a line each: `python requirements.py serve onnx < pyproject.toml`.

pip installs a project's dependencies only together with the project. Listed apart they make an image layer that stays
the same until they change, whatever else is edited in pyproject.toml. Extras of extras are followed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence

Extras = Mapping[str, Sequence[str]]


def requirements(pyproject: str, wanted: Sequence[str]) -> list[str]:
    """The base requirements and those of the extras, sorted. Raises KeyError where there is no such extra."""
    project = tomllib.loads(pyproject)["project"]
    extras = project["optional-dependencies"]
    of_extras = (each for extra in wanted for each in _of_extra(extra, project["name"], extras))
    return sorted({*project["dependencies"], *of_extras})


def _of_extra(extra: str, project: str, extras: Extras) -> Iterator[str]:
    for requirement in extras[extra]:
        reference = re.fullmatch(rf"{re.escape(project)}\[([\w,. -]+)\]", requirement)
        if reference is None:
            yield requirement
            continue
        for name in reference[1].split(","):
            yield from _of_extra(name.strip(), project, extras)


if __name__ == "__main__":
    print(*requirements(sys.stdin.read(), sys.argv[1:]), sep="\n")
