"""torchvision's models, without PyTorch's compiler: importing that takes a second of the processor, and 150 MB.

torchvision asks the compiler one question where it defines an operation that none of our networks has. Imported here,
when a network needs it.
"""

from __future__ import annotations

import importlib
import sys
import threading
from types import ModuleType
from typing import Any

_COMPILER = ("torch._dynamo", "torch._dynamo.utils")

_importing = threading.Lock()


def torchvision_models() -> ModuleType:
    """`torchvision.models`, imported where it is not yet. Raises ImportError where the extra is missing."""
    with _importing:
        if "torchvision" not in sys.modules and not any(name in sys.modules for name in _COMPILER):
            package, utils = (_Absent(name) for name in _COMPILER)
            package.__path__ = []
            sys.modules.update(zip(_COMPILER, (package, utils), strict=True))
            try:
                return importlib.import_module("torchvision.models")
            finally:
                _leave(package, utils)
        return importlib.import_module("torchvision.models")


class _Absent(ModuleType):
    """Stands for a module of the compiler while torchvision is imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def asked(*args: Any, **options: Any) -> Any:
            """The real function, once somebody does ask."""
            return getattr(importlib.import_module(self.__name__), name)(*args, **options)

        return asked


def _leave(package: ModuleType, utils: ModuleType) -> None:
    """Let whoever imports the compiler from now on get it."""
    for module in (package, utils):
        if sys.modules.get(module.__name__) is module:
            del sys.modules[module.__name__]
    torch = sys.modules.get("torch")
    if torch is not None and torch.__dict__.get("_dynamo") is package:
        del torch._dynamo
