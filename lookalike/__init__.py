"""lookalike answers two questions: are these two images a match, and what in my gallery matches this image?

Names are imported when one is first asked for: what they need takes the third of a second in which the command, which
is part of this package, could not answer an interrupt.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own takes as long to import as Python to start

if TYPE_CHECKING:
    from lookalike import client as client
    from lookalike import errors as errors
    from lookalike import types as types
    from lookalike import v1 as v1
    from lookalike._face import *  # noqa: F403
    from lookalike._face import __all__ as __all__
else:  # to type checkers a module with this function has every name
    _MODULES = frozenset({"client", "errors", "types", "v1"})

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        if name == "__all__" or not name.startswith("_"):
            face = import_module(f"{__name__}._face")
            if name == "__all__" or name in face.__all__:
                globals()[name] = getattr(face, name)
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        from lookalike._face import __all__

        return sorted({*globals(), *_MODULES, *__all__})
