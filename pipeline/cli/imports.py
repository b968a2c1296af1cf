"""Packages that transformers imports because they are installed, for work that no command does.

scikit-learn chooses a threshold in assisted generation, SciPy matches boxes in losses of object detection. Importing
both takes as long as importing torch. In the process of a command, transformers takes them for missing; whoever
imports them by name gets them.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_UNUSED = ("sklearn", "scipy")
_ASKED = "transformers.utils.import_utils"


class WithoutUnused(importlib.abc.MetaPathFinder):
    """Waits in `sys.meta_path` until transformers is imported, if it is, and answers for it what is installed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _ASKED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _answer(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _answer(import_utils: ModuleType) -> None:
    """Let transformers ask while the packages cannot be found; it keeps the answer."""
    for package in _UNUSED:
        is_available = getattr(import_utils, f"is_{package}_available", None)
        if is_available is not None and package not in sys.modules:
            sys.modules[package] = None  # type: ignore[assignment]  # so that it is not found
            try:
                is_available()
            finally:
                del sys.modules[package]
