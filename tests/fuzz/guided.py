"""One target under atheris: `python -m tests.fuzz.guided TARGET [libFuzzer's options] CORPUS`."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["PIL", "embedding", "index", "service", "lark"], enable_loader_override=False):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    target = TARGETS[sys.argv.pop(1)]
    target.seeds()  # made before the clock runs

    def once(data: bytes) -> None:
        target.run(data)

    atheris.Setup(sys.argv, once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
