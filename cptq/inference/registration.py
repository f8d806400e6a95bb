"""`import cptq` makes transformers know the quantization method `cptq`, without importing either.

transformers has no entry points for quantizers: a method exists once `register_quantizer` was
called in the process. Calling it means importing transformers and torch, seconds that `cptq --help`
must not take. So if `transformers.quantizers.auto`, the table of methods, is there already, it is
told at once; otherwise a finder waits at the head of `sys.meta_path` for that one module, lets the
usual finders load it, registers, and is gone. (This is what `wrapt.when_imported` does.)

Limit: what was registered lives in the process; a worker that never imports cptq does not know it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

#: holds transformers' tables of quantization methods
TABLE = "transformers.quantizers.auto"


def ensure_registered() -> None:
    """Register now, or as soon as transformers looks for its quantizers. Safe to call again."""
    table = sys.modules.get(TABLE)
    if table is not None and hasattr(table, "register_quantizer"):
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    import_module("cptq.inference.quantizer").register()  # by name: it imports torch


class _Waiting:
    """A finder. Finds nothing itself; sees the table of methods being imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)  # type: ignore[assignment]
        return spec


class _ThenRegister:
    """The usual loader, and a registration after it."""

    def __init__(self, usual: Loader) -> None:
        self._usual = usual

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._usual.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._usual
        module.__loader__ = self._usual
        self._usual.exec_module(module)
        _register()
